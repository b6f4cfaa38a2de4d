// The bottleneck adapter on bfloat16 rows where the processor has AMX: as bottleneck_rows.h, with the products of amx.h.
// Left operands are rounded to bfloat16: the normalized rows, the hidden values and their gradients, as plain PyTorch does.
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

  static constexpr bool rank_rows = true;
  static FA_INLINE int64_t product_stride(const Problem& p) { return amx::accumulator_stride(p.d); }

  // `small` holds the vectors; its packed weights stay null. The scale and the norm's weight enter a product behind which
  // nothing could apply them, and otherwise its epilogue, in float32.
  struct Weights {
    Adapter<C> small;
    T *down, *up, *up_back, *down_back;
  };

  struct Memory {
    Scratch<C> hidden;
    T *tiles, *a, *a_transposed;
    C* row;                       // one row in float32, on its way through the norm
    C *row_add, *row_skip;        // of the norm's backward
    T *x, *residual, *grad_y;     // blocks of rows that are normalized, or that the tiles can't read in place
  };

  // The row blocks of backward are longer: a block loads and stores all the sums of the weight gradients.
  static FA_INLINE int64_t block_rows(const Problem& p) {
    const int64_t bytes = p.d * static_cast<int64_t>(sizeof(T));
    return p.backward ? least(96, most(32, (int64_t{192} << 10) / most(1, bytes) / 32 * 32)) : 48;
  }

  static FA_INLINE Weights weights(const Problem& p, Arena& arena) {
    const int64_t d = p.d, r = p.r;
    Weights w = {};
    w.small.down_bias = arena.take<C>(padded<C>(r));
    w.small.up_bias = arena.take<C>(padded<C>(d) + panel_width<C>);
    if (needs_hidden(p)) w.down = arena.take<T>(amx::packed_size(r, d));
    if (!p.backward) w.up = arena.take<T>(amx::packed_size(d, r));
    if (p.backward && needs_grad_a(p)) w.up_back = arena.take<T>(amx::packed_size(r, d));
    if (p.backward && p.wants[grad_x]) w.down_back = arena.take<T>(amx::packed_size(d, r));
    if (p.backward && p.wants[grad_x] && p.norm_weight.data) w.small.norm_sum = arena.take<C>(padded<C>(r));
    return w;
  }

  static FA_INLINE Memory memory(const Problem& p, Arena& arena) {
    const int64_t rows = round_up(block_rows(p), 32), hidden = rows * padded<C>(p.r), wide = rows * p.d;
    Memory s = {};
    s.tiles = arena.take<T>(amx::scratch_size(rows, p.d));
    s.a = arena.take<T>(rows * round_up(p.r, 32));
    s.hidden.z = arena.take<C>(hidden);
    if (p.norm_weight.data) s.row = arena.take<C>(padded<C>(p.d)), s.hidden.rstd = arena.take<C>(rows);
    if (p.norm_weight.data || p.x.step != 1) s.x = arena.take<T>((p.norm_weight.data && p.x.step != 1 ? 2 : 1) * wide);
    if (p.residual.step != 1) s.residual = arena.take<T>(wide);
    if (!p.backward) return s;
    if (p.grad_y.step != 1) s.grad_y = arena.take<T>(wide);
    s.a_transposed = arena.take<T>(rows * round_up(p.r + 1, 16));
    s.hidden.grad_a = arena.take<C>(hidden);
    s.hidden.a = arena.take<C>(hidden);
    s.hidden.mean = arena.take<C>(rows);
    s.hidden.mean_x = arena.take<C>(rows);
    s.row_add = arena.take<C>(rows);
    s.row_skip = arena.take<C>(rows);
    return s;
  }

  // Sums of weight gradients have one row a hidden value; the column sums of grad_y are a row more of the same product.
  static FA_INLINE Partial<C> partial(const Problem& p, Arena& arena) {
    Partial<C> q = {};
    const int64_t stride = amx::accumulator_stride(p.d), up_rows = needs_up_product(p) ? p.r : 0;
    const bool sums = p.wants[grad_up_bias] || p.wants[grad_scale];
    if (up_rows + sums) q.up = arena.take<C>(round_up(up_rows + sums, 16) * stride);
    if (sums) q.sum_g = q.up + up_rows * stride;
    if (needs_down_product(p)) q.down = arena.take<C>(round_up(p.r, 16) * stride);
    if (p.wants[grad_skip]) q.skip = arena.take<C>(padded<C>(p.d));
    q.down_bias = arena.take<C>(padded<C>(p.r));
    q.hidden_skip = arena.take<C>(padded<C>(p.r));
    return q;
  }

  static Sizes sizes(const Problem& p) {
    Arena shared(nullptr), thread(nullptr), part(nullptr);
    Base::common(p, shared);
    weights(p, p.bank ? thread : shared);
    memory(p, thread);
    partial(p, part);
    return {shared.used(), thread.used(), p.backward ? part.used() : 0};
  }

  // Packs the share `part` of `parts` of a right operand.
  static FA_INLINE void pack_share(const W* w, int64_t stride_n, int64_t stride_k, const C* scale, int64_t n, int64_t k,
                                   T* packed, int64_t part, int64_t parts) {
    const int64_t panels = packed ? round_up(n, 32) / 16 : 0;
    for (int64_t j = panels * part / parts; j < panels * (part + 1) / parts; ++j)
      amx::pack(packed, w, stride_n, stride_k, scale, n, k, j);
  }

  static void pack_adapter(const Problem& p, const Common<C>& c, const Weights& w, int64_t id, int64_t part, int64_t parts) {
    const W *down = Base::element(p.down, id, 0, 0), *up = Base::element(p.up, id, 0, 0);
    pack_share(down, p.down.stride_0, p.down.stride_1, c.norm_weight, p.r, p.d, w.down, part, parts);
    pack_share(up, p.up.stride_0, p.up.stride_1, nullptr, p.d, p.r, w.up, part, parts);
    pack_share(up, p.up.stride_1, p.up.stride_0, c.scale, p.r, p.d, w.up_back, part, parts);
    pack_share(down, p.down.stride_1, p.down.stride_0, nullptr, p.d, p.r, w.down_back, part, parts);
    Base::pack_adapter(p, c, w.small, id, part, parts);
  }

  static void pack(const Problem& p, void* shared, int64_t part, int64_t parts) {
    Arena arena(shared);
    const Common<C> c = Base::common(p, arena);
    pack_adapter(p, c, weights(p, arena), 0, part, parts);
  }

  static FA_INLINE Weights enter(const Problem& p, const Common<C>& c, Arena& shared, Arena& thread, int64_t id) {
    if (!p.bank) return weights(p, shared);
    const Weights w = weights(p, thread);
    Base::read_biases(p, c, w.small, id);
    pack_adapter(p, c, w, id, 0, 1);
    return w;
  }

  // Makes the rows contiguous where they aren't.
  static FA_INLINE void gather(const Rows& rows, const T** at, int64_t n, int64_t d, T* copy) {
    if (rows.step == 1 || !rows.data) return;
    for (int64_t i = 0; i < n; ++i, copy += d) {
      for (int64_t j = 0; j < d; ++j) copy[j] = at[i][j * rows.step];
      at[i] = copy;
    }
  }

  // Locates a block and the left operand of its down projection: x, or x normalized but for the norm's weight and bias.
  static void begin_block(const Problem& p, int64_t begin, int64_t n, const Memory& s, Block<T>& b, const T** left) {
    locate(p, begin, n, b);
    const bool norm = s.hidden.rstd;
    gather(p.x, b.x, n, p.d, norm ? s.x + round_up(block_rows(p), 32) * p.d : s.x);
    gather(p.residual, b.residual, n, p.d, s.residual);
    gather(p.grad_y, b.grad_y, n, p.d, s.grad_y);
    for (int64_t i = 0; i < n; ++i) {
      left[i] = b.x[i];
      if (!norm || !needs_hidden(p)) continue;
      normalize(b.x + i, 1, p.d, 1, p.norm_eps, s.row, s.hidden.rstd + i);
      T* out = s.x + i * p.d;
      for (int64_t j = 0; j < p.d; j += lanes<C>) store_at<C>(out, j, p.d - j, load<C>(s.row + j));
      left[i] = out;
    }
  }

  static void forward(const Problem& p, void* shared_memory, void* thread_memory, const Segment& seg) {
    if (seg.adapter < 0) return Base::pass_through(p, seg);
    Arena shared(shared_memory), thread(thread_memory);
    const Common<C> c = Base::common(p, shared);
    const Weights w = enter(p, c, shared, thread, seg.adapter);
    const Memory s = memory(p, thread);
    const int64_t block = block_rows(p), width = padded<C>(p.r);
    const amx::Session session(s.tiles, round_up(block, 32));
    Block<T> b;
    const T* left[max_rows];
    for (int64_t begin = seg.begin; begin < seg.end; begin += block) {
      begin_block(p, begin, least(block, seg.end - begin), s, b, left);
      amx::down(session, left, b.n, p.d, w.down, p.r, w.small.down_bias, s.hidden.z, width);
      Base::activate(p, b.n * width, s.hidden.z, c.hidden_skip);
      amx::round_rows(s.hidden.z, width, b.n, p.r, s.a);
      amx::Epilogue e;
      e.col_mul = c.scale;
      e.col_add = w.small.up_bias;
      e.residual = p.add_x ? b.x : p.residual.data ? b.residual : nullptr;
      if (c.skip) e.col_skip = c.skip, e.skip = b.x;
      amx::up(session, s.a, b.n, p.r, w.up, p.d, e, b.out);
    }
  }

  static void weight_sums(const Problem& p, const amx::Session& session, const Memory& s, const Block<T>& b,
                          const T* const* left, bool fresh, const Partial<C>& q) {
    const int64_t width = padded<C>(p.r), up_rows = needs_up_product(p) ? p.r : 0;
    if (q.up) {
      amx::transpose_round(s.hidden.a, width, b.n, up_rows, q.sum_g, s.a_transposed);
      amx::accumulate(session, s.a_transposed, up_rows + (q.sum_g != nullptr), b.grad_y, b.n, p.d, fresh, q.up);
    }
    if (q.down) {
      amx::transpose_round(s.hidden.grad_a, width, b.n, p.r, false, s.a_transposed);
      amx::accumulate(session, s.a_transposed, p.r, left, b.n, p.d, fresh, q.down);
    }
    for (int64_t j = 0; q.skip && j < p.d; j += lanes<C>) {
      Vec<C> total = fresh ? Vec<C>{} : load<C>(q.skip + j);
      for (int64_t i = 0; i < b.n; ++i) total += load_at<C>(b.grad_y[i], j, p.d - j, 1) * load_at<C>(b.x[i], j, p.d - j, 1);
      store(q.skip + j, total);
    }
  }

  static void input_gradient(const Problem& p, const amx::Session& session, const Memory& s, const Common<C>& c,
                             const Weights& w, const Block<T>& b, const T* const* left) {
    amx::Epilogue e;
    if (p.add_x) e.residual = b.grad_y;
    if (c.skip) e.col_skip = c.skip, e.skip = b.grad_y;
    if (s.hidden.rstd) {
      Base::norm_means(p, b.n, s.hidden, w.small);
      for (int64_t i = 0; i < b.n; ++i) {
        s.row_add[i] = -s.hidden.rstd[i] * s.hidden.mean[i];
        s.row_skip[i] = -s.hidden.rstd[i] * s.hidden.mean_x[i];
      }
      e.col_mul = c.norm_weight;
      e.row_mul = s.hidden.rstd, e.row_add = s.row_add, e.row_skip = s.row_skip, e.normed = left;
    }
    amx::round_rows(s.hidden.grad_a, padded<C>(p.r), b.n, p.r, s.a);
    amx::up(session, s.a, b.n, p.r, w.down_back, p.d, e, b.out);
  }

  static void backward(const Problem& p, void* shared_memory, void* thread_memory, const Segment& seg, void* partial_memory) {
    if (seg.adapter < 0) {
      if (p.wants[grad_x]) Base::pass_through(p, seg);
      return;
    }
    Arena shared(shared_memory), thread(thread_memory), part(partial_memory);
    const Common<C> c = Base::common(p, shared);
    const Weights w = enter(p, c, shared, thread, seg.adapter);
    const Memory s = memory(p, thread);
    const Partial<C> q = partial(p, part);
    const int64_t block = block_rows(p), width = padded<C>(p.r);
    for (int64_t j = 0; j < width; ++j) q.down_bias[j] = q.hidden_skip[j] = 0;
    const amx::Session session(s.tiles, round_up(block, 32));
    Block<T> b;
    const T* left[max_rows];
    for (int64_t begin = seg.begin; begin < seg.end; begin += block) {
      begin_block(p, begin, least(block, seg.end - begin), s, b, left);
      if (needs_hidden(p)) {
        amx::down(session, left, b.n, p.d, w.down, p.r, w.small.down_bias, s.hidden.z, width);
        if (needs_grad_a(p)) amx::down(session, b.grad_y, b.n, p.d, w.up_back, p.r, nullptr, s.hidden.grad_a, width);
        Base::hidden_gradients(p, b.n, s.hidden, c.hidden_skip, q);
      }
      weight_sums(p, session, s, b, left, begin == seg.begin, q);
      if (p.wants[grad_x]) input_gradient(p, session, s, c, w, b, left);
    }
  }
};

}  // namespace fastadapt::FA_TARGET::bottleneck

namespace fastadapt::bottleneck::FA_TARGET {

// For bfloat16 rows.
Kernel amx_kernel(Dtype weight_dtype) {
  using namespace fastadapt::FA_TARGET::bottleneck;
  if (weight_dtype == Dtype::float32) return Reduce<BFloat16, float, AmxPass<float>>::kernel();
  return Reduce<BFloat16, BFloat16, AmxPass<BFloat16>>::kernel();
}

}  // namespace fastadapt::bottleneck::FA_TARGET
#endif
