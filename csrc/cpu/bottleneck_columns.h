// Few rows, or large weights: threads share the work by columns, so that each weight is read once, packed where it is used
// and never stored.
//   project  partial sums of z (and of grad_a) over a chunk of the columns of x (and of grad_y)
//   hidden   their sum, and what follows from it for the hidden values
//   expand   the columns of y, or of grad_x and of the weight gradients
#pragma once
#include "bottleneck_reduce.h"

namespace fastadapt::FA_TARGET::bottleneck {

// Chunks don't depend on the number of threads, so neither do the sums.
constexpr int64_t column_chunks = 8;

// Rows that a thread works on at once.
constexpr int64_t row_block = 96;

// The memory of K, which goes by columns or, as its base, by rows.
template <class K>
Sizes column_sizes(const Problem& p) {
  if (!p.by_columns) return K::Base::sizes(p);
  Arena shared(nullptr), thread(nullptr), part(nullptr);
  K::layout(p, shared);
  K::local(p, thread);
  if (p.backward) K::partial(p, part);
  return {shared.used(), thread.used(), part.used()};
}

template <class K>
Kernel column_kernel() {
  Kernel k = K::Base::kernel();
  k.sizes = column_sizes<K>;
  k.project = K::project;
  k.hidden = K::hidden;
  k.expand = K::expand;
  return k;
}

template <class T, class W>
struct Columns : Reduce<T, W> {
  using Base = Reduce<T, W>;
  using C = Compute<T>;

  struct Shared {
    Common<C> common;
    Adapter<C> adapter;              // the biases
    Scratch<C> hidden;               // z, grad_a and a of every row
    C *z_chunks, *grad_a_chunks;     // few rows: column_chunks of them
    C* sums;                         // many rows: the sums of hidden_gradients, for each block of rows
  };

  struct Local {
    C *packed, *x, *grad_y;  // a strip of a weight, and of rows that can't be read in place
    C *up, *down;            // sums of a strip of the weight gradients, as in Partial
  };

  static FA_INLINE int64_t hidden_size(const Problem& p) { return p.m * padded<C>(p.r); }

  static FA_INLINE Shared layout(const Problem& p, Arena& arena) {
    Shared s = {};
    s.common = Base::common(p, arena);
    s.adapter = Base::adapter(p, arena);
    s.hidden.z = arena.take<C>(hidden_size(p));
    if (few(p)) s.z_chunks = arena.take<C>(column_chunks * hidden_size(p));
    if (!p.backward) return s;
    s.hidden.a = arena.take<C>(hidden_size(p));
    s.hidden.grad_a = arena.take<C>(hidden_size(p));
    if (few(p)) s.grad_a_chunks = arena.take<C>(column_chunks * hidden_size(p));
    if (!few(p)) s.sums = arena.take<C>(ceil_div(p.m, row_block) * 2 * padded<C>(p.r));
    return s;
  }

  // Few rows share the projection by columns too, many by rows: then each thread packs the weights again, for many rows.
  static FA_INLINE bool few(const Problem& p) { return p.m <= 256; }

  static FA_INLINE Local local(const Problem& p, Arena& arena) {
    const int64_t rows = least(p.m, row_block) * strip_width;
    Local l = {};
    l.packed = arena.take<C>(most(projection_size<C>(strip_width, p.r), packed_size<C>(p.r, strip_width)));
    l.x = arena.take<C>(rows);
    l.grad_y = arena.take<C>(p.backward ? rows : 0);
    if (p.backward && needs_up_product(p)) l.up = arena.take<C>(p.r * strip_width);
    if (p.backward && needs_down_product(p)) l.down = arena.take<C>(p.r * strip_width);
    return l;
  }

  // Columns [c, c + n) of some rows, in place or copied, see `operand`.
  static FA_INLINE Operand<C> columns(const T* const* rows, int64_t m, int64_t c, int64_t n, int64_t step, C* copy,
                                      bool whole = false) {
    const T* at[max_rows];
    for (int64_t i = 0; i < m; ++i) at[i] = rows[i] + c * step;
    return operand(at, m, n, step, copy, whole);
  }

  // Calls f(block, first row) for rows [begin, end).
  template <class F>
  static FA_INLINE void for_row_blocks(const Problem& p, int64_t begin, int64_t end, F&& f) {
    Block<T> b;
    for (int64_t row = begin; row < end; row += row_block) {
      locate(p, row, least(row_block, end - row), b);
      f(b, row);
    }
  }

  // z += x * down and grad_a += grad_y * up over columns [c, c + n), for rows [begin, end); `fresh` overwrites.
  static void project_strip(const Problem& p, const Shared& s, const Local& l, int64_t c, int64_t n, int64_t begin, int64_t end,
                            bool fresh, C* z, C* grad_a) {
    const int64_t ldz = padded<C>(p.r);
    const Source<C, W> down = {Base::element(p.down, 0, 0, c), p.down.stride_1, p.down.stride_0, n, p.r, nullptr, nullptr};
    pack_projection(down, l.packed, 0, 1);
    for_row_blocks(p, begin, end, [&](const Block<T>& b, int64_t row) FA_FORCED {
      const Operand<C> x = columns(b.x, b.n, c, n, p.x.step, l.x);
      project_rows(b.n, n, p.r, x.data, x.ld, l.packed, static_cast<const C*>(nullptr), z + row * ldz, !fresh);
    });
    if (!grad_a) return;
    const Source<C, W> up = {Base::element(p.up, 0, c, 0), p.up.stride_0, p.up.stride_1, n, p.r,
                             s.common.scale ? s.common.scale + c : nullptr, nullptr};
    pack_projection(up, l.packed, 0, 1);
    for_row_blocks(p, begin, end, [&](const Block<T>& b, int64_t row) FA_FORCED {
      const Operand<C> g = columns(b.grad_y, b.n, c, n, p.grad_y.step, l.grad_y);
      project_rows(b.n, n, p.r, g.data, g.ld, l.packed, static_cast<const C*>(nullptr), grad_a + row * ldz, !fresh);
    });
  }

  static void project(const Problem& p, void* shared_memory, void* thread_memory, int64_t part, int64_t parts) {
    if (!needs_hidden(p)) return;
    Arena shared(shared_memory), thread(thread_memory);
    const Shared s = layout(p, shared);
    const Local l = local(p, thread);
    const bool both = p.backward && needs_grad_a(p);
    if (!few(p)) {
      const int64_t blocks = ceil_div(p.m, row_block), begin = blocks * part / parts * row_block;
      const int64_t end = least(p.m, blocks * (part + 1) / parts * row_block);
      C* grad_a = both ? s.hidden.grad_a : nullptr;
      for (int64_t c = 0; c < p.d; c += strip_width)
        project_strip(p, s, l, c, least(strip_width, p.d - c), begin, end, c == 0, s.hidden.z, grad_a);
      return activate_rows(p, s, begin, end);
    }
    const int64_t size = hidden_size(p), width = round_up(ceil_div(p.d, column_chunks), lanes<C>);
    for (int64_t chunk = column_chunks * part / parts; chunk < column_chunks * (part + 1) / parts; ++chunk) {
      const int64_t begin = least(p.d, chunk * width), end = least(p.d, begin + width);
      C *z = s.z_chunks + chunk * size, *grad_a = both ? s.grad_a_chunks + chunk * size : nullptr;
      int64_t c = begin;
      do {  // an empty chunk still clears its sums
        const int64_t n = least(strip_width, end - c);
        project_strip(p, s, l, c, n, 0, p.m, c == begin, z, grad_a);
        c += n;
      } while (c < end);
    }
  }

  // Many rows: what follows from z, a block of rows at a time.
  static void activate_rows(const Problem& p, const Shared& s, int64_t begin, int64_t end) {
    const int64_t width = padded<C>(p.r);
    for (int64_t row = begin; row < end; row += row_block) {
      const int64_t n = least(row_block, end - row);
      Scratch<C> h = {};
      h.z = s.hidden.z + row * width;
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < width; j += lanes<C>)
          store(h.z + i * width + j, load<C>(h.z + i * width + j) + load<C>(s.adapter.down_bias + j));
      if (!p.backward) {
        activate(p, n * width, h.z, s.common.hidden_skip);
        continue;
      }
      h.a = s.hidden.a + row * width;
      h.grad_a = s.hidden.grad_a + row * width;
      Partial<C> q = {};
      q.down_bias = s.sums + row / row_block * 2 * width;
      q.hidden_skip = q.down_bias + width;
      for (int64_t j = 0; j < 2 * width; ++j) q.down_bias[j] = 0;
      hidden_gradients(p, n, h, s.common.hidden_skip, q);
    }
  }

  static FA_INLINE void add_chunks(const Problem& p, const C* chunks, const C* start, C* out) {
    const int64_t size = hidden_size(p), width = padded<C>(p.r);
    for (int64_t i = 0; i < size; i += width)
      for (int64_t j = i; j < i + width; j += lanes<C>) {
        Vec<C> even = start ? load<C>(start + j - i) : Vec<C>{}, odd = {};
#pragma GCC unroll 4
        for (int64_t chunk = 0; chunk < column_chunks; chunk += 2) {
          even += load<C>(chunks + chunk * size + j);
          odd += load<C>(chunks + (chunk + 1) * size + j);
        }
        store(out + j, even + odd);
      }
  }

  static void hidden(const Problem& p, void* shared_memory, void* partial_memory) {
    Arena shared(shared_memory), part(partial_memory);
    const Shared s = layout(p, shared);
    if (few(p) && needs_hidden(p)) add_chunks(p, s.z_chunks, s.adapter.down_bias, s.hidden.z);
    if (!p.backward) {
      if (few(p)) activate(p, hidden_size(p), s.hidden.z, s.common.hidden_skip);
      return;
    }
    const Partial<C> q = Base::partial(p, part);
    Base::clear(p, q);
    if (!needs_hidden(p)) return;
    if (few(p)) {
      if (needs_grad_a(p)) add_chunks(p, s.grad_a_chunks, nullptr, s.hidden.grad_a);
      return hidden_gradients(p, p.m, s.hidden, s.common.hidden_skip, q);
    }
    const int64_t width = padded<C>(p.r);
    for (int64_t block = 0; block < ceil_div(p.m, row_block); ++block)
      for (int64_t j = 0; j < width; ++j) {
        q.down_bias[j] += s.sums[block * 2 * width + j];
        q.hidden_skip[j] += s.sums[(block * 2 + 1) * width + j];
      }
  }

  static void expand(const Problem& p, void* shared_memory, void* thread_memory, void* partials, int64_t part, int64_t parts) {
    Arena shared(shared_memory), thread(thread_memory), partial(partials);
    const Shared s = layout(p, shared);
    const Local l = local(p, thread);
    const Partial<C> q = p.backward ? Base::partial(p, partial) : Partial<C>{};
    const int64_t panels = ceil_div(p.d, panel_width<C>), end = least(p.d, panels * (part + 1) / parts * panel_width<C>);
    for (int64_t c = panels * part / parts * panel_width<C>; c < end; c += strip_width) {
      const int64_t n = least(strip_width, end - c);
      if (p.backward) {
        backward_strip(p, s, l, q, c, n);
        weight_gradients(p, s, l, q, c, n);
        continue;
      }
      pack_strip(p, p.up, p.up.stride_0, p.up.stride_1, c, n, s.common.scale, l.packed);
      for_row_blocks(p, 0, p.m, [&](const Block<T>& b, int64_t row) FA_FORCED {
        const int64_t ldz = padded<C>(p.r);
        gemm_epilogue(b.n, p.r, n, s.hidden.z + row * ldz, ldz, l.packed, s.adapter.up_bias + c,
                      UpEpilogue<T, C>{b, p, s.common.skip, c});
      });
    }
  }

  static void backward_strip(const Problem& p, const Shared& s, const Local& l, const Partial<C>& q, int64_t c, int64_t n) {
    const int64_t width = padded<C>(p.r);
    if (p.wants[grad_x]) pack_strip(p, p.down, p.down.stride_1, p.down.stride_0, c, n, nullptr, l.packed);
    for_row_blocks(p, 0, p.m, [&](const Block<T>& b, int64_t row) FA_FORCED {
      const Operand<C> g = columns(b.grad_y, b.n, c, n, p.grad_y.step, l.grad_y, true);
      const C *a = s.hidden.a + row * width, *grad_z = s.hidden.grad_a + row * width;
      if (l.up) gemm_transposed(p.r, b.n, n, a, width, g.data, g.ld, row > 0, l.up, strip_width);
      if (q.sum_g || q.skip) Base::column_sums(p, b, g, q, c, c + n);
      if (p.wants[grad_x])
        gemm_epilogue(b.n, p.r, n, grad_z, width, l.packed, static_cast<const C*>(nullptr),
                      GradEpilogue<T, C>{b, p, s.common.skip, {}, g, nullptr, nullptr, nullptr, c});
      if (l.down) {
        const Operand<C> x = columns(b.x, b.n, c, n, p.x.step, l.x, true);
        gemm_transposed(p.r, b.n, n, grad_z, width, x.data, x.ld, row > 0, l.down, strip_width);
      }
    });
  }

  static void weight_gradients(const Problem& p, const Shared& s, const Local& l, const Partial<C>& q, int64_t c, int64_t n) {
    typename Base::Whole whole = {q};
    if (l.up) whole.sums.up = l.up - c;
    if (l.down) whole.sums.down = l.down - c;
    typename Base::Sums sums[strip_width / lanes<C>] = {};
    Base::columns(p, whole, s.common, 0, c, n, sums);
    Base::write_sums(p, sums, c, n);
  }

  // Columns [c, c + n) of a right operand with r rows.
  static FA_INLINE void pack_strip(const Problem& p, const Weight& w, int64_t column_stride, int64_t rank_stride, int64_t c,
                                   int64_t n, const C* scale, C* packed) {
    const W* data = static_cast<const W*>(w.data) + c * column_stride;
    const Source<C, W> source = {data, rank_stride, column_stride, p.r, n, nullptr, scale ? scale + c : nullptr};
    pack_part(source, packed, 0, 1);
  }

  static Kernel kernel() { return column_kernel<Columns>(); }
};

}  // namespace fastadapt::FA_TARGET::bottleneck
