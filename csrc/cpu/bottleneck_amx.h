// The bottleneck adapter on bfloat16 rows where the processor has AMX: the products of amx.h instead of those of gemm.h. Left
// operands are rounded to bfloat16 (normalized rows, hidden values and their gradients), as plain PyTorch does.
//
// The sums of weight gradients are too large to pass them between the caches and the tiles for every block of rows. So backward
// keeps the hidden values, a small matrix, and `reduce` multiplies them with all rows, a strip of columns at a time.
#pragma once
#include "amx.h"
#include "bottleneck_reduce.h"

#if FASTADAPT_AMX
namespace fastadapt::FA_TARGET::bottleneck {

template <class W>
struct AmxPass : Pass<BFloat16, W> {
  using Base = Pass<BFloat16, W>;
  using T = BFloat16;
  using C = float;
  using Weights = Adapter<C, T>;

  // Of a thread, for blocks of rows.
  struct Memory {
    Scratch<C> hidden;
    C *mean, *row_add, *row_skip;
    T *tiles, *a, *normed;
    T *x, *residual, *grad_y;  // null where the tiles can read the rows in place
  };

  // Of a thread, for the sums of weight gradients in a strip of columns.
  struct Strip {
    C *up, *down, *skip, *down_bias;
    T *tiles, *x, *grad_y;
  };

  // What a segment leaves for the weight gradients: its hidden values and their gradients, transposed, with a row of ones below
  // the former, and the moments of its rows.
  struct Kept {
    C *down_bias, *hidden_skip, *mean, *rstd;
    T *a, *grad_z;
  };

  static FA_INLINE int64_t product_stride(const Problem&) { return amx::accumulator_stride(strip_width); }

  // In backward whole steps of the tiles' inner dimension.
  static FA_INLINE int64_t block_rows(const Problem& p) {
    const int64_t bytes = p.d * static_cast<int64_t>(sizeof(T));
    return p.backward ? least(96, most(32, (int64_t{192} << 10) / most(1, bytes) / 32 * 32)) : 48;
  }

  static FA_INLINE int64_t kept_rows(const Problem& p) { return needs_up_product(p) ? p.r : 0; }
  static FA_INLINE bool needs_sums(const Problem& p) { return p.wants[grad_up_bias] || p.wants[grad_scale]; }

  static FA_INLINE Weights adapter(const Problem& p, Arena& arena) {
    const int64_t d = p.d, r = p.r;
    Weights w = {};
    w.down_bias = arena.take<C>(padded<C>(r));
    w.up_bias = arena.take<C>(padded<C>(d) + panel_width<C>);
    if (p.by_columns) return w;
    if (needs_hidden(p)) w.down = arena.take<T>(amx::packed_size(r, d));
    if (!p.backward) w.up = arena.take<T>(amx::packed_size(d, r));
    if (p.backward && needs_grad_a(p)) w.up_back = arena.take<T>(amx::packed_size(r, d));
    if (p.backward && p.wants[grad_x]) w.down_back = arena.take<T>(amx::packed_size(d, r));
    if (p.backward && p.wants[grad_x] && p.norm_weight.data) w.norm_sum = arena.take<C>(padded<C>(r));
    return w;
  }

  static FA_INLINE Memory memory(const Problem& p, Arena& arena) {
    const int64_t rows = round_up(block_rows(p), 32), hidden = rows * padded<C>(p.r), wide = rows * p.d;
    Memory s = {};
    s.tiles = arena.take<T>(amx::scratch_size(rows, p.d));
    s.a = arena.take<T>(rows * round_up(p.r, 32));
    s.hidden.z = arena.take<C>(hidden);
    if (p.norm_weight.data) {
      s.normed = arena.take<T>(wide);
      s.hidden.rstd = arena.take<C>(rows);
      s.mean = arena.take<C>(rows);
    }
    if (p.x.step != 1) s.x = arena.take<T>(wide);
    if (p.residual.step != 1) s.residual = arena.take<T>(wide);
    if (!p.backward) return s;
    if (p.grad_y.step != 1) s.grad_y = arena.take<T>(wide);
    s.hidden.grad_a = arena.take<C>(hidden);
    s.hidden.a = arena.take<C>(hidden);
    s.hidden.mean = arena.take<C>(rows);
    s.hidden.mean_x = arena.take<C>(rows);
    s.row_add = arena.take<C>(rows);
    s.row_skip = arena.take<C>(rows);
    return s;
  }

  static FA_INLINE Strip strip(const Problem& p, Arena& arena) {
    const int64_t rows = block_rows(p), stride = product_stride(p);
    Strip s = {};
    s.tiles = arena.take<T>(amx::scratch_size(rows, 0));
    s.up = arena.take<C>(round_up(kept_rows(p) + needs_sums(p), 16) * stride);
    s.down = arena.take<C>(round_up(p.r, 16) * stride);
    s.skip = arena.take<C>(strip_width);
    s.down_bias = arena.take<C>(padded<C>(p.r));
    s.x = arena.take<T>(rows * strip_width);
    s.grad_y = arena.take<T>(rows * strip_width);
    return s;
  }

  static FA_INLINE Kept kept(const Problem& p, Arena& arena) {
    const int64_t rows = round_up(p.segment_rows, 32);
    Kept k = {};
    k.down_bias = arena.take<C>(padded<C>(p.r));
    k.hidden_skip = arena.take<C>(padded<C>(p.r));
    if (p.norm_weight.data) k.mean = arena.take<C>(rows), k.rstd = arena.take<C>(rows);
    if (kept_rows(p) + needs_sums(p)) k.a = arena.take<T>(round_up(kept_rows(p) + needs_sums(p), 16) * rows);
    if (needs_down_product(p)) k.grad_z = arena.take<T>(round_up(p.r, 16) * rows);
    return k;
  }

  // The part of Kept that is a sum already.
  static FA_INLINE Partial<C> sums_of(const Kept& k) {
    Partial<C> q = {};
    q.down_bias = k.down_bias;
    q.hidden_skip = k.hidden_skip;
    return q;
  }
  static FA_INLINE Partial<C> partial(const Problem& p, Arena& arena) { return sums_of(kept(p, arena)); }

  static Sizes sizes(const Problem& p) {
    Arena shared(nullptr), thread(nullptr), columns(nullptr), part(nullptr);
    Base::common(p, shared);
    adapter(p, p.own_weights ? thread : shared);
    memory(p, thread);
    if (p.backward) strip(p, columns), kept(p, part);
    return {shared.used(), most(thread.used(), columns.used()), part.used()};
  }

  // The scale of up and the norm's weight of down_back are left to the epilogue, which applies them in float32.
  static void pack_adapter(const Problem& p, const Common<C>& c, const Weights& w, int64_t id, int64_t part, int64_t parts) {
    const W *down = Base::element(p.down, id, 0, 0), *up = Base::element(p.up, id, 0, 0);
    amx::pack_part(w.down, down, p.down.stride_0, p.down.stride_1, c.norm_weight, p.r, p.d, part, parts);
    amx::pack_part(w.up, up, p.up.stride_0, p.up.stride_1, nullptr, p.d, p.r, part, parts);
    amx::pack_part(w.up_back, up, p.up.stride_1, p.up.stride_0, c.scale, p.r, p.d, part, parts);
    amx::pack_part(w.down_back, down, p.down.stride_1, p.down.stride_0, nullptr, p.d, p.r, part, parts);
    Base::add_norm(p, c, w, id, part, parts);
  }

  // Locates a block and the left operand of its down projection: x, or x normalized but for the norm's weight and bias.
  static void begin_block(const Problem& p, int64_t begin, int64_t n, const Memory& s, Block<T>& b, const T** left) {
    locate(p, begin, n, b);
    if (s.normed && needs_hidden(p)) {
      for (int64_t i = 0; i < n; ++i) moments(b.x[i], p.d, p.x.step, p.norm_eps, s.mean + i, s.hidden.rstd + i);
      contiguous_rows(p.x, b.x, n, 0, p.d, s.mean, s.hidden.rstd, s.normed, left);
    }
    if (s.x) contiguous_rows(p.x, b.x, n, 0, p.d, s.x, b.x);
    if (s.residual) contiguous_rows(p.residual, b.residual, n, 0, p.d, s.residual, b.residual);
    if (s.grad_y) contiguous_rows(p.grad_y, b.grad_y, n, 0, p.d, s.grad_y, b.grad_y);
    for (int64_t i = 0; i < n && !s.normed; ++i) left[i] = b.x[i];
  }

  static void forward(const Problem& p, void* shared_memory, void* thread_memory, const Segment& seg) {
    if (seg.adapter < 0) return Base::pass_through(p, seg);
    Arena shared(shared_memory), thread(thread_memory);
    const Common<C> c = Base::common(p, shared);
    const Weights w = Base::template enter<AmxPass>(p, c, shared, thread, seg);
    const Memory s = memory(p, thread);
    const int64_t block = block_rows(p), width = padded<C>(p.r);
    const amx::TileScope scope(s.tiles, round_up(block, 32));
    Block<T> b;
    const T* left[max_rows];
    for (int64_t begin = seg.begin; begin < seg.end; begin += block) {
      begin_block(p, begin, least(block, seg.end - begin), s, b, left);
      amx::down(scope, left, b.n, p.d, w.down, p.r, w.down_bias, s.hidden.z, width);
      activate(p, b.n * width, s.hidden.z, c.hidden_skip);
      amx::round_rows(s.hidden.z, width, b.n, p.r, s.a);
      amx::Epilogue e;
      e.col_mul = c.scale;
      e.col_add = w.up_bias;
      e.residual = p.add_x ? b.x : p.residual.data ? b.residual : nullptr;
      if (c.skip) e.col_skip = c.skip, e.skip = b.x;
      amx::up(scope, s.a, b.n, p.r, w.up, p.d, e, b.out);
    }
  }

  static void input_gradient(const Problem& p, const amx::TileScope& scope, const Memory& s, const Common<C>& c,
                             const Weights& w, const Block<T>& b, const T* const* left) {
    amx::Epilogue e;
    if (p.add_x) e.residual = b.grad_y;
    if (c.skip) e.col_skip = c.skip, e.skip = b.grad_y;
    if (s.normed) {
      Base::norm_means(p, b.n, s.hidden, w);
      for (int64_t i = 0; i < b.n; ++i) {
        s.row_add[i] = -s.hidden.rstd[i] * s.hidden.mean[i];
        s.row_skip[i] = -s.hidden.rstd[i] * s.hidden.mean_x[i];
      }
      e.col_mul = c.norm_weight;
      e.row_mul = s.hidden.rstd, e.row_add = s.row_add, e.row_skip = s.row_skip, e.normed = left;
    }
    amx::round_rows(s.hidden.grad_a, padded<C>(p.r), b.n, p.r, s.a);
    amx::up(scope, s.a, b.n, p.r, w.down_back, p.d, e, b.out);
  }

  static void backward(const Problem& p, void* shared_memory, void* thread_memory, const Segment& seg, void* partial_memory) {
    if (seg.adapter < 0) {
      if (p.wants[grad_x]) Base::pass_through(p, seg);
      return;
    }
    Arena shared(shared_memory), thread(thread_memory), part(partial_memory);
    const Common<C> c = Base::common(p, shared);
    const Weights w = Base::template enter<AmxPass>(p, c, shared, thread, seg);
    const Memory s = memory(p, thread);
    const Kept k = kept(p, part);
    const Partial<C> q = sums_of(k);
    const int64_t block = block_rows(p), width = padded<C>(p.r), lda = round_up(seg.end - seg.begin, 32);
    for (int64_t j = 0; j < width; ++j) q.down_bias[j] = q.hidden_skip[j] = 0;
    const amx::TileScope scope(s.tiles, round_up(block, 32));
    Block<T> b;
    const T* left[max_rows];
    for (int64_t at = 0; at < seg.end - seg.begin; at += block) {
      begin_block(p, seg.begin + at, least(block, seg.end - seg.begin - at), s, b, left);
      if (needs_hidden(p)) {
        amx::down(scope, left, b.n, p.d, w.down, p.r, w.down_bias, s.hidden.z, width);
        if (needs_grad_a(p)) amx::down(scope, b.grad_y, b.n, p.d, w.up_back, p.r, nullptr, s.hidden.grad_a, width);
        hidden_gradients(p, b.n, s.hidden, c.hidden_skip, q);
      }
      for (int64_t i = 0; k.mean && i < b.n; ++i) k.mean[at + i] = s.mean[i], k.rstd[at + i] = s.hidden.rstd[i];
      if (k.a) amx::transpose_round(s.hidden.a, width, b.n, kept_rows(p), needs_sums(p), k.a + at, lda);
      if (k.grad_z) amx::transpose_round(s.hidden.grad_a, width, b.n, p.r, false, k.grad_z + at, lda);
      if (p.wants[grad_x]) input_gradient(p, scope, s, c, w, b, left);
    }
  }
};

template <class W>
struct AmxReduce : Reduce<BFloat16, W, AmxPass<W>> {
  using Base = Reduce<BFloat16, W, AmxPass<W>>;
  using T = BFloat16;
  using C = float;

  // Adds a segment to the sums of columns [c, c + width).
  static void add(const Problem& p, const amx::TileScope& scope, const Segment& seg, const typename Base::Kept& k,
                  const typename Base::Strip& s, int64_t c, int64_t width, bool fresh) {
    const int64_t block = Base::block_rows(p), rows = seg.end - seg.begin, lda = round_up(rows, 32);
    const int64_t ldc = Base::product_stride(p);
    Block<T> b;
    const T *x[max_rows], *grad_y[max_rows];
    for (int64_t at = 0; at < rows; at += block, fresh = false) {
      locate(p, seg.begin + at, least(block, rows - at), b);
      if (k.a || p.wants[grad_skip]) contiguous_rows(p.grad_y, b.grad_y, b.n, c, width, s.grad_y, grad_y);
      if (k.a)
        amx::accumulate(scope, k.a + at, lda, Base::kept_rows(p) + Base::needs_sums(p), grad_y, b.n, width, fresh, s.up, ldc);
      if (k.grad_z) {
        contiguous_rows(p.x, b.x, b.n, c, width, k.mean ? k.mean + at : nullptr, k.mean ? k.rstd + at : nullptr, s.x, x);
        amx::accumulate(scope, k.grad_z + at, lda, p.r, x, b.n, width, fresh, s.down, ldc);
      }
      for (int64_t j = 0; p.wants[grad_skip] && j < width; j += lanes<C>) {
        Vec<C> total = fresh ? Vec<C>{} : load<C>(s.skip + j);
        for (int64_t i = 0; i < b.n; ++i)
          total += load_at<C>(grad_y[i], j, width - j, 1) * load_at<C>(b.x[i] + c * p.x.step, j, width - j, p.x.step);
        store(s.skip + j, total);
      }
    }
    for (int64_t j = 0; j < padded<C>(p.r); ++j) s.down_bias[j] += k.down_bias[j];
  }

  static void clear(const Problem& p, const typename Base::Strip& s) {
    const int64_t stride = Base::product_stride(p);
    for (int64_t j = 0; j < (Base::kept_rows(p) + Base::needs_sums(p)) * stride; ++j) s.up[j] = 0;
    for (int64_t j = 0; j < p.r * stride; ++j) s.down[j] = 0;
    for (int64_t j = 0; j < strip_width; ++j) s.skip[j] = 0;
  }

  // The gradients of the weights in columns [c, c + width).
  static void weight_gradients(const Problem& p, const Common<C>& common, const amx::TileScope& scope,
                               const typename Base::Strip& s, const Segment* segments, int64_t count, void* partials,
                               int64_t bytes, int64_t c, int64_t width) {
    typename Base::Sums sums[strip_width / lanes<C>] = {};
    typename Base::Run run = {segments, static_cast<char*>(partials), 0, 0, bytes};
    for (int64_t id = 0; id < p.g; ++id) {
      run.next(count, id);
      if (run.first == run.last) clear(p, s);
      for (int64_t j = 0; j < padded<C>(p.r); ++j) s.down_bias[j] = 0;
      for (int64_t i = run.first; i < run.last; ++i) {
        Arena arena(run.memory + i * bytes);
        add(p, scope, segments[i], Base::kept(p, arena), s, c, width, i == run.first);
      }
      typename Base::Whole whole = {};
      whole.sums.up = s.up - c;
      whole.sums.sum_g = s.up + Base::kept_rows(p) * Base::product_stride(p) - c;
      whole.sums.down = s.down - c;
      whole.sums.skip = s.skip - c;
      whole.sums.down_bias = s.down_bias;
      Base::columns(p, whole, common, id, c, width, sums);
    }
    Base::write_sums(p, sums, c, width);
  }

  // f(first column, number of columns) for the share `part` of `parts`.
  template <class F>
  static FA_INLINE void each_strip(const Problem& p, int64_t part, int64_t parts, const F& f) {
    const int64_t steps = ceil_div(p.d, 32), end = least(p.d, steps * (part + 1) / parts * 32);
    for (int64_t c = steps * part / parts * 32; c < end; c += strip_width) f(c, least(strip_width, end - c));
  }

  static void reduce(const Problem& p, void* shared_memory, void* thread_memory, const Segment* segments, int64_t count,
                     void* partials, int64_t part, int64_t parts) {
    Arena shared(shared_memory), thread(thread_memory);
    const Common<C> common = Base::common(p, shared);
    const typename Base::Strip s = Base::strip(p, thread);
    const int64_t bytes = Base::sizes(p).partial;
    const amx::TileScope scope(s.tiles, Base::block_rows(p));
    each_strip(p, part, parts, [&](int64_t c, int64_t width) {
      weight_gradients(p, common, scope, s, segments, count, partials, bytes, c, width);
    });
  }

  static Kernel kernel() {
    Kernel k = Base::kernel();
    k.reduce = reduce;
    k.chunk_rows = 16;
    return k;
  }
};

}  // namespace fastadapt::FA_TARGET::bottleneck
#endif
