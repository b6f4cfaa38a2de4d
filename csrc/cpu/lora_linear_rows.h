// What LoRA adds to a frozen product, a block of rows at a time. The entry points are those of lora_linear_args.h.
#pragma once
#include "lora_linear_args.h"
#include "narrow.h"
#include "philox.h"
#include "rows.h"

namespace fastadapt::FA_TARGET::lora_linear {

using namespace fastadapt::lora_linear;

// Rows that are worked on at once, and columns of them: a strip is copied where it can't be read in place.
constexpr int64_t block_rows = 96, strip = 256;

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
    const Spilled<C, MR, NV> spilled(acc);
    for (int t = 0; t < MR; ++t)
      for (int v = 0; v < NV; ++v) {
        const int64_t c = j + v * L;
        if (c >= columns) break;
        Vec<C> value = spilled.tile[t][v];
        if (factors) {
          const Vec<C> factor = load<C>(factors + (i + t) * ld + c);
          value = factor != 0 ? value * factor : Vec<C>{};
        }
        store_at<C>(out[i + t], c, columns - c, value);
      }
  }
};

template <class T, class W>
struct Pass : Parameters<T, W> {
  using Base = Parameters<T, W>;
  using C = Compute<T>;
  static constexpr int L = lanes<C>;
  static constexpr int64_t factor_ld = round_up(strip, drawn_columns);

  // Memory of a thread. Packed weights: `down` takes rows to r columns, strip by strip; `up` takes those back.
  struct Thread {
    C *down, *up;
    C *factor, *bias, *gain;  // scale * diagonal; bias and gain, each with room for a panel
    C *z, *u, *grad_u;        // of a block of rows, padded(r) apart
    C *copy, *drawn;          // a strip of a block of rows, and the factors of dropout for it
  };

  // Sums over the rows of a segment.
  struct Partial {
    C *a, *b;                   // (r, padded(k)) of grad_u.T @ dropout(x); (r, padded(n)) of u.T @ grad_y
    C *bias, *gain, *diagonal;  // of grad_y, of grad_y * (y - bias), of (gain * grad_y @ b) * u
  };

  static FA_INLINE int64_t strip_size(const Problem& p) { return projection_size<C>(strip, p.r); }

  static FA_INLINE Thread thread(const Problem& p, bool backward, Arena& arena) {
    const int64_t hidden = block_rows * padded<C>(p.r), inner = backward ? p.n : p.k, outer = backward ? p.k : p.n;
    Thread t = {};
    t.down = arena.take<C>(ceil_div(inner, strip) * strip_size(p));
    t.up = arena.take<C>(packed_size<C>(p.r, outer));
    t.factor = arena.take<C>(padded<C>(p.r));
    t.bias = arena.take<C>(padded<C>(p.n) + panel_width<C>);
    t.gain = arena.take<C>(padded<C>(p.n));
    t.z = arena.take<C>(hidden);
    t.u = arena.take<C>(backward ? hidden : 0);
    t.grad_u = arena.take<C>(backward ? hidden : 0);
    t.copy = arena.take<C>(block_rows * strip);
    t.drawn = arena.take<C>(p.dropped ? block_rows * factor_ld : 0);
    return t;
  }

  static FA_INLINE Partial partial(const Problem& p, Arena& arena) {
    Partial q = {};
    if (p.wants[grad_a]) q.a = arena.take<C>(p.r * padded<C>(p.k));
    if (p.wants[grad_b]) q.b = arena.take<C>(p.r * padded<C>(p.n));
    if (p.wants[grad_bias]) q.bias = arena.take<C>(padded<C>(p.n));
    if (p.wants[grad_gain]) q.gain = arena.take<C>(padded<C>(p.n));
    if (p.wants[grad_diagonal]) q.diagonal = arena.take<C>(padded<C>(p.r));
    return q;
  }

  static Sizes sizes(const Problem& p) {
    Arena forward(nullptr), backward(nullptr), part(nullptr);
    thread(p, false, forward);
    thread(p, true, backward);
    partial(p, part);
    return {most(forward.used(), backward.used()), part.used()};
  }

  // factor = scale * diagonal, and the parameters along n.
  static void read_vectors(const Problem& p, const Thread& t) {
    if (p.diagonal.data) Base::read(p.diagonal, 0, p.r, t.factor, padded<C>(p.r));
    for (int64_t j = 0; j < padded<C>(p.r); ++j)
      t.factor[j] = (p.diagonal.data ? t.factor[j] : j < p.r ? 1 : 0) * static_cast<C>(p.scale);
    Base::read(p.bias, 0, p.bias.data ? p.n : 0, t.bias, padded<C>(p.n) + panel_width<C>);
    if (p.gain.data) Base::read(p.gain, 0, p.n, t.gain, padded<C>(p.n));
  }

  // Element (i, j) of an (inner x r) matrix at data[i * inner_stride + j * rank_stride], row i times gain[i] if given.
  static void pack_down(const Problem& p, const Weight& w, int64_t inner, int64_t inner_stride, int64_t rank_stride,
                        const C* gain, C* out) {
    for (int64_t c = 0; c < inner; c += strip, out += strip_size(p)) {
      const W* data = static_cast<const W*>(w.data) + c * inner_stride;
      const int64_t rows = least(strip, inner - c);
      pack_projection(Source<C, W>{data, inner_stride, rank_stride, rows, p.r, gain ? gain + c : nullptr, nullptr}, out, 0, 1);
    }
  }

  // Element (i, j) of an (r x outer) matrix at data[i * rank_stride + j * outer_stride], row i times factor[i] if given.
  static void pack_up(const Problem& p, const Weight& w, int64_t outer, int64_t rank_stride, int64_t outer_stride,
                      const C* factor, C* out) {
    const W* data = static_cast<const W*>(w.data);
    pack_part(Source<C, W>{data, rank_stride, outer_stride, p.r, outer, factor, nullptr}, out, 0, 1);
  }

  // Columns [c, c + n) of a block of rows, in place or copied. With `whole`, whole vectors may be read.
  static FA_INLINE Operand<C> columns(const T* const* rows, int64_t count, int64_t c, int64_t n, int64_t step, C* copy,
                                      bool whole) {
    const T* at[block_rows];
    for (int64_t i = 0; i < count; ++i) at[i] = rows[i] + c * step;
    return operand(at, count, n, step, copy, whole);
  }

  // The same of dropout(x). Without x only the factors of dropout are drawn.
  static FA_INLINE Operand<C> inputs(const Problem& p, const Thread& t, const T* const* x, int64_t begin, int64_t count,
                                     int64_t c, int64_t n, bool whole) {
    if (!p.dropped) return x ? columns(x, count, c, n, p.x.step, t.copy, whole) : Operand<C>{};
    const Dropout drop = {p.seed, p.dropped, p.kept_scale};
    for (int64_t i = 0; i < count; ++i) {
      const C* factors = t.drawn + i * factor_ld;
      dropout_factors(drop, begin + i, c, n, t.drawn + i * factor_ld);
      for (int64_t j = 0; x && j < n; j += L) {
        const Vec<C> factor = load<C>(factors + j);
        store(t.copy + i * strip + j, factor != 0 ? factor * load_at<C>(x[i] + c * p.x.step, j, n - j, p.x.step) : Vec<C>{});
      }
    }
    return {t.copy, strip};
  }

  // z = rows @ down, where rows(c, n) are columns [c, c + n).
  template <class F>
  static FA_INLINE void project(const Problem& p, int64_t count, int64_t inner, const Thread& t, F&& rows) {
    const int64_t ldz = padded<C>(p.r);
    const C* down = t.down;
    for (int64_t c = 0; c < inner; c += strip, down += strip_size(p)) {
      const int64_t n = least(strip, inner - c);
      const Operand<C> left = rows(c, n);
      project_rows(count, n, p.r, left.data, left.ld, down, static_cast<const C*>(nullptr), t.z, c > 0);
    }
    for (int64_t i = 0; inner == 0 && i < count * ldz; ++i) t.z[i] = 0;
  }

  static void forward(const Problem& p, void* memory, int64_t first, int64_t last) {
    Arena arena(memory);
    const Thread t = thread(p, false, arena);
    read_vectors(p, t);
    pack_down(p, p.a, p.k, p.a.stride_1, p.a.stride_0, nullptr, t.down);
    pack_up(p, p.b, p.n, p.b.stride_1, p.b.stride_0, t.factor, t.up);
    const int64_t ldz = padded<C>(p.r);
    const T* x[block_rows];
    T* y[block_rows];
    for (int64_t begin = first; begin < last; begin += block_rows) {
      const int64_t count = least(block_rows, last - begin);
      locate_rows(p.x, nullptr, begin, count, x);
      project(p, count, p.k, t, [&](int64_t c, int64_t n) FA_FORCED { return inputs(p, t, x, begin, count, c, n, false); });
      for (int64_t i = 0; i < count; ++i) {
        y[i] = static_cast<T*>(p.y) + (begin + i) * p.n;
        memcpy(static_cast<C*>(p.u) + (begin + i) * p.r, t.z + i * ldz, p.r * sizeof(C));
      }
      gemm_epilogue(count, p.r, p.n, t.z, ldz, t.up, p.gain.data ? nullptr : t.bias, Store<T, C>{y, p.n});
    }
  }

  static void finish(const Problem& p, int64_t begin, int64_t end) {
    for (int64_t j = 0; j < p.n; j += L) {
      const int64_t count = p.n - j;
      const Vec<C> gain = Base::parameter_at(p.gain, 0, j, least(L, count));
      const Vec<C> bias = p.bias.data ? Base::parameter_at(p.bias, 0, j, least(L, count)) : Vec<C>{};
      for (int64_t i = begin; i < end; ++i) {
        T* row = static_cast<T*>(p.y) + i * p.n;
        store_at<C>(row, j, count, load_at<C>(row, j, count, 1) * gain + bias);
      }
    }
  }

  // From t = gain * grad_y @ b in z: u, grad_u, and the sums of t * u.
  static void hidden_gradients(const Problem& p, const Thread& t, const Partial& q, int64_t begin, int64_t count) {
    const int64_t ldz = padded<C>(p.r);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j < ldz; j += L) {
        const Vec<C> u = load_at<C>(static_cast<const C*>(p.u) + (begin + i) * p.r, j, p.r - j, 1);
        const Vec<C> v = load<C>(t.z + i * ldz + j);
        store(t.u + i * ldz + j, u);
        store(t.grad_u + i * ldz + j, v * load<C>(t.factor + j));
        if (q.diagonal) store(q.diagonal + j, load<C>(q.diagonal + j) + v * u);
      }
  }

  // The sums over a block of rows of columns [c, c + n) of grad_y and of grad_y * (y - bias); and gain * grad_y.
  static void outputs(const Problem& p, const Thread& t, const Partial& q, const Operand<C>& g, const T* const* y,
                      int64_t begin, int64_t count, int64_t c, int64_t n) {
    for (int64_t j = 0; j < n; j += L) {
      const Vec<C> bias = load<C>(t.bias + c + j), gain = p.gain.data ? load<C>(t.gain + c + j) : Vec<C>{};
      Vec<C> total[4] = {}, product[4] = {};
      for (int64_t i = 0; i < count; ++i) {
        const Vec<C> v = load<C>(g.data + i * g.ld + j);
        total[i % 4] += v;
        if (q.gain) product[i % 4] += v * (load_at<C>(y[i], c + j, n - j, p.saved_y.step) - bias);
        if (p.scaled_grad_y) store_at<C>(static_cast<T*>(p.scaled_grad_y) + (begin + i) * p.n + c, j, n - j, v * gain);
      }
      auto add = [&](C* sums, const Vec<C>(&v)[4]) FA_FORCED {
        if (sums) store(sums + c + j, load<C>(sums + c + j) + ((v[0] + v[1]) + (v[2] + v[3])));
      };
      add(q.bias, total);
      add(q.gain, product);
    }
  }

  static void backward(const Problem& p, void* memory, const Segment& s, void* partial_memory) {
    Arena arena(memory), part(partial_memory);
    const Thread t = thread(p, true, arena);
    const Partial q = partial(p, part);
    const bool hidden = p.wants[grad_x] || q.a || q.diagonal;
    if (!s.packed) {
      read_vectors(p, t);
      if (hidden) pack_down(p, p.b, p.n, p.b.stride_0, p.b.stride_1, p.gain.data ? t.gain : nullptr, t.down);
      if (p.wants[grad_x]) pack_up(p, p.a, p.k, p.a.stride_0, p.a.stride_1, nullptr, t.up);
    }
    const int64_t ldz = padded<C>(p.r);
    for (C* sums : {q.bias, q.gain})
      for (int64_t j = 0; sums && j < padded<C>(p.n); ++j) sums[j] = 0;
    for (int64_t j = 0; q.diagonal && j < ldz; ++j) q.diagonal[j] = 0;
    const T *x[block_rows], *g[block_rows], *y[block_rows];
    for (int64_t begin = s.begin; begin < s.end; begin += block_rows) {
      const int64_t count = least(block_rows, s.end - begin);
      const bool more = begin > s.begin;
      locate_rows(p.grad_y, nullptr, begin, count, g);
      locate_rows(p.x, nullptr, begin, count, x);
      if (q.gain) locate_rows(p.saved_y, nullptr, begin, count, y);
      if (hidden)
        project(p, count, p.n, t,
                [&](int64_t c, int64_t n) FA_FORCED { return columns(g, count, c, n, p.grad_y.step, t.copy, false); });
      if (hidden || q.b) hidden_gradients(p, t, q, begin, count);
      for (int64_t c = 0; c < p.n && (q.b || q.bias || q.gain || p.scaled_grad_y); c += strip) {
        const int64_t n = least(strip, p.n - c);
        const Operand<C> rows = columns(g, count, c, n, p.grad_y.step, t.copy, true);
        if (q.b) gemm_transposed(p.r, count, n, t.u, ldz, rows.data, rows.ld, more, q.b + c, padded<C>(p.n));
        if (q.bias || q.gain || p.scaled_grad_y) outputs(p, t, q, rows, y, begin, count, c, n);
      }
      for (int64_t c = 0; c < p.k && (q.a || p.wants[grad_x]); c += strip) {
        const int64_t n = least(strip, p.k - c);
        const Operand<C> rows = inputs(p, t, q.a ? x : nullptr, begin, count, c, n, true);
        if (q.a) gemm_transposed(p.r, count, n, t.grad_u, ldz, rows.data, rows.ld, more, q.a + c, padded<C>(p.k));
        if (p.wants[grad_x]) input_gradients(p, t, begin, count, c, n);
      }
    }
  }

  static void input_gradients(const Problem& p, const Thread& t, int64_t begin, int64_t count, int64_t c, int64_t n) {
    T* out[block_rows];
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T*>(p.grads[grad_x]) + (begin + i) * p.k + c;
    const C* up = t.up + c * p.r;  // a strip is whole panels
    gemm_epilogue(count, p.r, n, t.grad_u, padded<C>(p.r), up, static_cast<const C*>(nullptr),
                  Store<T, C>{out, n, p.dropped ? t.drawn : nullptr, factor_ld});
  }

  static void reduce(const Problem& p, void* partials, int64_t segments, int64_t part, int64_t parts) {
    Arena arena(partials);
    const Partial first = partial(p, arena);
    // The sum over the segments, in order, of a vector of theirs.
    auto sum = [&, size = arena.used()](const C* of_first) FA_FORCED {
      const char* at = reinterpret_cast<const char*>(of_first);
      Vec<C> total = {};
      for (int64_t i = 0; i < segments; ++i, at += size) total += load<C>(reinterpret_cast<const C*>(at));
      return total;
    };
    auto each = [&](int64_t columns, auto f) FA_FORCED {
      const int64_t vectors = ceil_div(columns, L);
      for (int64_t v = vectors * part / parts; v < vectors * (part + 1) / parts; ++v) f(v * L, columns - v * L);
    };
    if (p.wants[grad_a])
      each(p.k, [&](int64_t j, int64_t count) FA_FORCED {
        for (int64_t i = 0; i < p.r; ++i)
          store_at<C>(static_cast<W*>(p.grads[grad_a]) + i * p.k, j, count, sum(first.a + i * padded<C>(p.k) + j));
      });
    each(p.n, [&](int64_t j, int64_t count) FA_FORCED {
      const int64_t some = least(L, count);
      const Vec<C> gain = p.gain.data ? Base::parameter_at(p.gain, 0, j, some) : broadcast<C>(1);
      for (int64_t i = 0; p.wants[grad_b] && i < p.r; i += L) {
        Vec<C> v[L];  // some columns of some ranks, then of each column its ranks
        for (int64_t t = 0; t < L; ++t) v[t] = i + t < p.r ? sum(first.b + (i + t) * padded<C>(p.n) + j) * gain : Vec<C>{};
        transpose<C>(v);
        Vec<C> factor = broadcast<C>(static_cast<C>(p.scale));
        if (p.diagonal.data) factor *= Base::parameter_at(p.diagonal, 0, i, least(L, p.r - i));
        for (int64_t t = 0; t < some; ++t)
          store_at<C>(static_cast<W*>(p.grads[grad_b]) + (j + t) * p.r, i, p.r - i, v[t] * factor);
      }
      if (p.wants[grad_bias]) Base::write(p.bias, p.grads[grad_bias], j, sum(first.bias + j), some);
      if (!p.wants[grad_gain]) return;
      const Vec<C> none = broadcast<C>(__builtin_nan(""));  // where the gain is zero y holds but the rounding of bias
      Base::write(p.gain, p.grads[grad_gain], j, gain != 0 ? sum(first.gain + j) / gain : none, some);
    });
    if (p.wants[grad_diagonal])
      each(p.r, [&](int64_t j, int64_t count) FA_FORCED {
        const Vec<C> v = sum(first.diagonal + j) * static_cast<C>(p.scale);
        Base::write(p.diagonal, p.grads[grad_diagonal], j, v, least(L, count));
      });
  }

  static Kernel kernel() { return {sizes, forward, finish, backward, reduce}; }
};

}  // namespace fastadapt::FA_TARGET::lora_linear

namespace fastadapt::lora_linear::FA_TARGET {

Kernel kernel(Dtype dtype, Dtype weight_dtype) {
  return fastadapt::FA_TARGET::kernel_of<fastadapt::FA_TARGET::lora_linear::Pass>(dtype, weight_dtype);
}

}  // namespace fastadapt::lora_linear::FA_TARGET
