// What LoRA adds to a frozen product, and its gradients: first by rows all that has r columns, then by columns all that is as
// wide as x or y. The entry points are those of lora_linear_args.h.
#pragma once
#include "lora_linear_args.h"
#include "narrow.h"
#include "philox.h"
#include "rows.h"

namespace fastadapt::FA_TARGET::lora_linear {

using namespace fastadapt::lora_linear;

// Rows and columns of the blocks that are worked on at once. By rows these are wide, since a narrow product ends with sums over
// lanes; by columns they are high, since each passes over sums as large as the adapter's weights.
constexpr int64_t wide_rows = 48, wide_columns = narrow_inner, high_rows = 192, high_columns = 256;
constexpr int64_t block_size = high_rows * high_columns;
static_assert(block_size >= wide_rows * wide_columns);

// Writes a product; with `factors`, as dropout leaves it.
template <class T, class C>
struct Store {
  T* const* out;
  int64_t columns;
  const C* factors = nullptr;
  int64_t ld = 0;

  template <int MR, int NV>
  FA_INLINE void operator()(int64_t i, int64_t j, Vec<C> (&acc)[MR][NV]) const {
    constexpr int L = lanes<C>;
    if (j + NV * L <= columns && !factors) {
#pragma GCC unroll 16
      for (int t = 0; t < MR; ++t)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) store(out[i + t] + j + v * L, acc[t][v]);
      return;
    }
    loop(Spilled<C, MR, NV>(acc).tile[0], MR, NV, i, j);
  }

  FA_NOINLINE void loop(const Vec<C>* tile, int rows, int vectors, int64_t i, int64_t j) const {
    for (int t = 0; t < rows; ++t, tile += vectors)
      for (int v = 0; v < vectors; ++v) {
        const int64_t c = j + v * lanes<C>;
        if (c >= columns) break;
        Vec<C> value = tile[v];
        if (factors) {
          const Vec<C> factor = load<C>(factors + (i + t) * ld + c);
          value = factor != 0 ? value * factor : Vec<C>{};
        }
        store_at<C>(out[i + t], c, columns - c, value);
      }
  }
};

// What both steps share, and the step by rows.
template <class T, class W>
struct RowPass : Parameters<T, W> {
  using Base = Parameters<T, W>;
  using C = Compute<T>;
  static constexpr int L = lanes<C>;
  using Base::element;

  // Memory of a thread.
  struct Thread {
    C *down, *up;         // packed: the weight that takes rows to r columns, in strips, and that which takes those back
    C *factor, *z;        // scale * diagonal; r columns of a block of rows, padded(r) apart
    C *bias, *gain;       // of the columns at hand; bias in forward alone, with room for a panel
    C* sums;              // (r, high_columns) of a weight gradient, then that many of bias, and of gain
    C *copy, *drawn;      // a block of rows, and the factors of dropout for it
  };

  static FA_INLINE Thread thread(const Problem& p, Arena& arena) {
    const int64_t inner = p.backward ? p.n : p.k, columns = p.backward ? high_columns : padded<C>(p.n);
    Thread t = {};
    t.down = arena.take<C>(ceil_div(inner, wide_columns) * projection_size<C>(wide_columns, p.r));
    t.up = arena.take<C>(packed_size<C>(p.r, columns));
    t.factor = arena.take<C>(padded<C>(p.r));
    t.z = arena.take<C>(high_rows * padded<C>(p.r));
    t.bias = arena.take<C>(p.backward ? 0 : columns + panel_width<C>);
    t.gain = arena.take<C>(padded<C>(p.n));
    t.sums = arena.take<C>(p.backward ? (p.r + 2) * high_columns : 0);
    t.copy = arena.take<C>(block_size);
    t.drawn = arena.take<C>(p.dropped ? block_size : 0);
    return t;
  }

  static int64_t thread_bytes(const Problem& p) {
    Arena arena(nullptr);
    thread(p, arena);
    return arena.used();
  }

  // out = elements [begin, begin + n) of q, or zeros without q, and zeros up to `room`.
  static void read_columns(const Parameter& q, int64_t begin, int64_t n, C* out, int64_t room) {
    for (int64_t j = 0; j < room; j += L)
      store(out + j, q.data && j < n ? Base::parameter_at(q, 0, begin + j, least(L, n - j)) : Vec<C>{});
  }

  // factor = scale * diagonal.
  static void read_factor(const Problem& p, C* factor, int64_t adapter) {
    for (int64_t j = 0; j < p.r; j += L) {
      const Vec<C> d = p.diagonal.data ? Base::parameter_at(p.diagonal, adapter, j, least(L, p.r - j)) : broadcast<C>(1);
      store(factor + j, d * static_cast<C>(p.scale));
    }
  }

  // Columns [c, c + n) of a block of rows, in place or copied. With `whole`, whole vectors may be read.
  static FA_INLINE Operand<C> columns(const T* const* rows, int64_t count, int64_t c, int64_t n, int64_t step, C* copy,
                                      bool whole) {
    const T* at[high_rows];
    for (int64_t i = 0; i < count; ++i) at[i] = rows[i] + c * step;
    return operand(at, count, n, step, copy, whole);
  }

  // The factors of dropout for columns [c, c + n) of the row at a position.
  static FA_INLINE void draw(const Problem& p, int64_t position, int64_t c, int64_t n, C* factors) {
    dropout_factors({p.seed, p.dropped, p.kept_scale}, p.order ? p.order[position] : position, c, n, factors);
  }
  // Elements [j, j + lanes) of a row as dropout leaves them.
  static FA_INLINE Vec<C> dropped(const Problem& p, const T* row, int64_t j, int64_t count, const C* factors) {
    const Vec<C> factor = load<C>(factors);
    return factor != 0 ? factor * load_at<C>(row + j * p.x.step, 0, count, p.x.step) : Vec<C>{};
  }

  // Columns [c, c + n) of dropout(x), for a block of rows.
  static FA_INLINE Operand<C> inputs(const Problem& p, const Thread& t, int64_t begin, int64_t count, int64_t c, int64_t n) {
    const T* x[wide_rows];
    locate_rows(p.x, p.order, begin, count, x);
    if (!p.dropped) return columns(x, count, c, n, p.x.step, t.copy, false);
    for (int64_t i = 0; i < count; ++i) {
      draw(p, begin + i, c, n, t.drawn);
      for (int64_t j = 0; j < n; j += L)
        store(t.copy + i * wide_columns + j, dropped(p, x[i], c + j, n - j, t.drawn + j));
    }
    return {t.copy, wide_columns};
  }

  // Whether b, (n, r), lies as it would be packed.
  static FA_INLINE const C* packed_b(const Problem& p, int64_t adapter) {
    if constexpr (sizeof(W) == sizeof(C)) {
      const bool dense = p.b.stride_1 == 1 && p.b.stride_0 == p.r && !p.gain.data;
      if (dense && p.r % L == 0 && p.r <= panel_width<C> && !is_narrow(p.r)) return element(p.b, adapter, 0, 0);
    }
    return nullptr;
  }

  static FA_INLINE C* ranks(const Problem& p, void* matrix, int64_t position) {
    return static_cast<C*>(matrix) + position * p.r;
  }
  static FA_INLINE C* row_of_u(const Problem& p, int64_t position) {
    return ranks(p, p.u, p.order ? p.order[position] : position);
  }

  // The rows of a segment times `weight`, (inner, r) with row i times gain[i] if given; what(begin, count, c, n) are columns
  // [c, c + n) of some of them. The weight lies packed, or each strip of it will be before its first use. `out` takes the rows
  // as they come, or by order.
  template <class F>
  static FA_INLINE void project_rows_of(const Problem& p, const Thread& t, const Segment& s, const Source<C, W>& weight,
                                        const C* packed, void* out, const int64_t* order, F&& what) {
    const int64_t ldz = padded<C>(p.r), strip_size = projection_size<C>(wide_columns, p.r), inner = weight.k;
    const bool once = s.end - s.begin <= high_rows;
    for (int64_t first = s.begin; first < s.end; first += high_rows) {
      const int64_t rows = least(high_rows, s.end - first);
      C* z = p.r == ldz && !order ? ranks(p, out, first) : t.z;
      for (int64_t c = 0; c == 0 || c < inner; c += wide_columns) {
        const int64_t n = least(wide_columns, inner - c);
        C* strip = t.down + (once ? 0 : c / wide_columns * strip_size);
        if (!packed && first == s.begin) {
          Source<C, W> part = weight;
          part.data += c * weight.k_stride;
          part.k = n;
          if (part.k_factor) part.k_factor += c;
          pack_projection(part, strip, 0, 1);
        }
        for (int64_t i = 0; i < rows; i += wide_rows) {
          const int64_t count = least(wide_rows, rows - i);
          const Operand<C> left = what(first + i, count, c, n);
          project_rows(count, n, p.r, left.data, left.ld, packed ? packed + c * p.r : strip, static_cast<const C*>(nullptr),
                       z + i * ldz, c > 0);
        }
      }
      for (int64_t i = 0; z == t.z && i < rows; ++i)
        memcpy(ranks(p, out, order ? order[first + i] : first + i), z + i * ldz, p.r * sizeof(C));
    }
  }

  // u, by rows.
  static void project_x(const Problem& p, const Thread& t, const Segment& s) {
    const Source<C, W> a{element(p.a, s.adapter, 0, 0), p.a.stride_1, p.a.stride_0, p.k, p.r, nullptr, nullptr};
    project_rows_of(p, t, s, a, nullptr, p.u, p.order, [&](int64_t begin, int64_t count, int64_t c, int64_t n) FA_FORCED {
      return inputs(p, t, begin, count, c, n);
    });
  }

  // t, and v.
  static void project_grad_y(const Problem& p, const Thread& t, const Segment& s) {
    for (int64_t i = s.begin; p.order && i < s.end; ++i) memcpy(ranks(p, p.v, i), row_of_u(p, i), p.r * sizeof(C));
    if (!p.t) return;
    if (p.gain.data) read_columns(p.gain, 0, p.n, t.gain, padded<C>(p.n));
    const C* gain = p.gain.data ? t.gain : nullptr;
    const Source<C, W> b{element(p.b, s.adapter, 0, 0), p.b.stride_0, p.b.stride_1, p.n, p.r, gain, nullptr};
    const C* packed = packed_b(p, s.adapter);
    project_rows_of(p, t, s, b, packed, p.t, nullptr, [&](int64_t begin, int64_t count, int64_t c, int64_t n) FA_FORCED {
      const T* g[wide_rows];
      locate_rows(p.grad_y, p.order, begin, count, g);
      return columns(g, count, c, n, p.grad_y.step, t.copy, false);
    });
  }

  static void project(const Problem& p, void* memory, const Segment& s) {
    Arena arena(memory);
    const Thread t = thread(p, arena);
    if (s.adapter < 0)
      for (int64_t i = s.begin; !p.backward && i < s.end; ++i) memset(row_of_u(p, i), 0, p.r * sizeof(C));
    else
      p.backward ? project_grad_y(p, t, s) : project_x(p, t, s);
  }
};

}  // namespace fastadapt::FA_TARGET::lora_linear
