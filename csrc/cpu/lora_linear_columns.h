// The step of lora_linear by columns: what the branch adds to y and to grad_x, and the gradients of the parameters.
#pragma once
#include "lora_linear_rows.h"

namespace fastadapt::FA_TARGET::lora_linear {

template <class T, class W>
struct Pass : RowPass<T, W> {
  using Base = RowPass<T, W>;
  using C = typename Base::C;
  using Thread = typename Base::Thread;
  using Base::L, Base::parameter_at, Base::ranks, Base::columns, Base::element;

  static void expand(const Problem& p, void* memory, const Segment& s, int64_t begin, int64_t end) {
    Arena arena(memory);
    const Thread t = Base::thread(p, arena);
    const int64_t n = end - begin, r = s.adapter < 0 ? 0 : p.r;
    if (r) {
      Base::read_factor(p, t.factor, s.adapter);
      const W* b = element(p.b, s.adapter, begin, 0);
      pack_part(Source<C, W>{b, p.b.stride_1, p.b.stride_0, r, n, t.factor, nullptr}, t.up, 0, 1);
    }
    if (!p.gain.data) Base::read_columns(p.bias, begin, n, t.bias, padded<C>(n) + panel_width<C>);
    T* z[high_rows];
    for (int64_t first = s.begin; first < s.end; first += high_rows) {
      const int64_t count = least(high_rows, s.end - first);
      const C* u = p.order ? t.z : ranks(p, p.u, first);
      for (int64_t i = 0; i < count; ++i) {
        z[i] = static_cast<T*>(p.z) + (p.order ? p.order[first + i] : first + i) * p.n + begin;
        if (p.order) memcpy(t.z + i * r, Base::row_of_u(p, first + i), r * sizeof(C));
      }
      gemm_epilogue(count, r, n, u, r, t.up, p.gain.data ? nullptr : t.bias, Store<T, C>{z, n});
    }
  }

  static void finish(const Problem& p, int64_t begin, int64_t end) {
    for (int64_t j = 0; j < p.n; j += L) {
      const int64_t count = p.n - j;
      const Vec<C> gain = parameter_at(p.gain, 0, j, least(L, count));
      const Vec<C> bias = p.bias.data ? parameter_at(p.bias, 0, j, least(L, count)) : Vec<C>{};
      for (int64_t i = begin; i < end; ++i) {
        const T* row = static_cast<const T*>(p.z) + i * p.n;
        store_at<C>(static_cast<T*>(p.y) + i * p.n, j, count, load_at<C>(row, j, count, 1) * gain + bias);
      }
    }
  }

  // Columns [c, c + n) of dropout(x), for a block of rows, and the factors of dropout; these alone without x.
  static FA_INLINE Operand<C> inputs(const Problem& p, const Thread& t, const T* const* x, int64_t begin, int64_t count,
                                     int64_t c, int64_t n) {
    if (!p.dropped) return columns(x, count, c, n, p.x.step, t.copy, true);
    for (int64_t i = 0; i < count; ++i) {
      C* factors = t.drawn + i * high_columns;
      Base::draw(p, begin + i, c, n, factors);
      for (int64_t j = 0; x && j < n; j += L)
        store(t.copy + i * high_columns + j, Base::dropped(p, x[i], c + j, n - j, factors + j));
    }
    return {t.copy, high_columns};
  }

  // The sums over a block of rows of columns [c, c + n) of grad_y and of grad_y * z; and gain * grad_y.
  static void vectors(const Problem& p, const Thread& t, const Operand<C>& g, const T* const* z, T* const* scaled,
                      int64_t count, int64_t c, int64_t n) {
    C *sums = t.sums + p.r * high_columns, *dots = sums + high_columns;
    for (int64_t j = 0; j < n; j += L) {
      const Vec<C> gain = load<C>(t.gain + j);
      Vec<C> total[4] = {}, product[4] = {};
      for (int64_t i = 0; i < count; ++i) {
        const Vec<C> v = load<C>(g.data + i * g.ld + j);
        total[i % 4] += v;
        if (p.wants[grad_gain]) product[i % 4] += v * load_at<C>(z[i], c + j, n - j, p.saved_z.step);
        if (p.scaled_grad_y) store_at<C>(scaled[i] + c, j, n - j, v * gain);
      }
      store(sums + j, load<C>(sums + j) + ((total[0] + total[1]) + (total[2] + total[3])));
      store(dots + j, load<C>(dots + j) + ((product[0] + product[1]) + (product[2] + product[3])));
    }
  }

  // grad_a of columns [c, c + n) of a.
  static void write_a(const Problem& p, const Thread& t, int64_t adapter, int64_t c, int64_t n) {
    const int64_t k = p.k;
    W* out = static_cast<W*>(p.grads[grad_a]) + adapter * p.r * k + c;
    for (int64_t i = 0; i < p.r; ++i, out += k) {
      const C *sums = t.sums + i * high_columns, factor = t.factor[i];
      int64_t j = 0;
      for (; j + L <= n; j += L) store(out + j, load<C>(sums + j) * factor);
      if (j < n) store_some<C>(out + j, load<C>(sums + j) * factor, n - j);
    }
  }

  // grad_b of rows [c, c + n) of b: each has its ranks side by side.
  static void write_b(const Problem& p, const Thread& t, int64_t adapter, int64_t c, int64_t n) {
    const int64_t r = p.r;
    const bool gain = p.gain.data;
    Base::read_factor(p, t.factor, adapter);
    for (int64_t j = 0; j < n; j += L) {
      W* const out = static_cast<W*>(p.grads[grad_b]) + (adapter * p.n + c + j) * r;
      const int64_t count = least(L, n - j);
      for (int64_t i = 0; i < r; i += L) {
        Vec<C> v[L];  // some columns of some ranks, then of each column its ranks
        const C* sums = t.sums + i * high_columns + j;
        for (int64_t k = 0; k < L; ++k) v[k] = i + k < r ? load<C>(sums + k * high_columns) : Vec<C>{};
        transpose<C>(v);
        const Vec<C> factor = load<C>(t.factor + i);
        for (int64_t k = 0; k < count; ++k) store_at<C>(out + k * r, i, r - i, v[k] * (gain ? factor * t.gain[j + k] : factor));
      }
    }
  }

  // Gradients from columns [c, c + n) of grad_y.
  static void over_grad_y(const Problem& p, const Thread& t, const Segment* segments, int64_t many, int64_t c, int64_t n) {
    const bool rest = p.wants[grad_bias] || p.wants[grad_gain] || p.scaled_grad_y;
    Base::read_columns(p.gain, c, n, t.gain, high_columns);
    C *sums = t.sums + p.r * high_columns, *dots = sums + high_columns;
    memset(sums, 0, 2 * high_columns * sizeof(C));
    const T *g[high_rows], *z[high_rows];
    T* scaled[high_rows];
    for (int64_t k = 0; k < many; ++k) {
      const Segment& s = segments[k];
      const bool weight = p.wants[grad_b] && s.adapter >= 0;
      for (int64_t begin = s.begin; begin < s.end && (weight || rest); begin += high_rows) {
        const int64_t count = least(high_rows, s.end - begin);
        locate_rows(p.grad_y, p.order, begin, count, g);
        const Operand<C> rows = columns(g, count, c, n, p.grad_y.step, t.copy, true);
        if (weight)
          gemm_transposed(p.r, count, n, ranks(p, p.v, begin), p.r, rows.data, rows.ld, begin > s.begin, t.sums, high_columns);
        if (!rest) continue;
        if (p.wants[grad_gain]) locate_rows(p.saved_z, p.order, begin, count, z);
        for (int64_t i = 0; p.scaled_grad_y && i < count; ++i)
          scaled[i] = static_cast<T*>(p.scaled_grad_y) + (p.order ? p.order[begin + i] : begin + i) * p.n;
        vectors(p, t, rows, z, scaled, count, c, n);
      }
      if (weight) write_b(p, t, s.adapter, c, n);
    }
    for (int64_t j = 0; j < n; j += L) {
      if (p.wants[grad_bias]) Base::write(p.bias, p.grads[grad_bias], c + j, load<C>(sums + j), least(L, n - j));
      if (p.wants[grad_gain]) Base::write(p.gain, p.grads[grad_gain], c + j, load<C>(dots + j), least(L, n - j));
    }
  }

  // Columns [c, c + n) of grad_a, and of the branch's part of grad_x.
  static void over_x(const Problem& p, const Thread& t, const Segment* segments, int64_t many, int64_t c, int64_t n) {
    const T* x[high_rows];
    T* out[high_rows];
    const bool branch = p.wants[grad_x] && !p.joined;
    for (int64_t k = 0; k < many; ++k) {
      const Segment& s = segments[k];
      const bool weight = p.wants[grad_a] && s.adapter >= 0;
      const int64_t r = s.adapter < 0 ? 0 : p.r;
      if (r) Base::read_factor(p, t.factor, s.adapter);
      if (r && branch)
        pack_part(Source<C, W>{element(p.a, s.adapter, 0, c), p.a.stride_0, p.a.stride_1, r, n, t.factor, nullptr}, t.up, 0, 1);
      for (int64_t begin = s.begin; begin < s.end; begin += high_rows) {
        const int64_t count = least(high_rows, s.end - begin);
        locate_rows(p.x, p.order, begin, count, x);
        const C* left = ranks(p, p.t, begin);
        if (weight || p.dropped) {
          const Operand<C> rows = inputs(p, t, weight ? x : nullptr, begin, count, c, n);
          if (weight) gemm_transposed(r, count, n, left, r, rows.data, rows.ld, begin > s.begin, t.sums, high_columns);
        }
        if (!branch) continue;
        for (int64_t i = 0; i < count; ++i)
          out[i] = static_cast<T*>(p.grads[grad_x]) + (p.order ? p.order[begin + i] : begin + i) * p.k + c;
        gemm_epilogue(count, r, n, left, r, t.up, static_cast<const C*>(nullptr),
                      Store<T, C>{out, n, p.dropped ? t.drawn : nullptr, high_columns});
      }
      if (weight) write_a(p, t, s.adapter, c, n);
    }
  }

  // grad_diagonal = scale * the sum of t * u over the rows.
  static void diagonal(const Problem& p, const Segment& s) {
    for (int64_t j = 0; j < p.r; j += L) {
      const int64_t count = least(L, p.r - j);
      Vec<C> total = {};
      for (int64_t begin = s.begin; begin < s.end; begin += high_rows) {
        Vec<C> block = {};
        for (int64_t i = begin; i < least(begin + high_rows, s.end); ++i)
          block += load_some<C>(ranks(p, p.t, i) + j, count) * load_some<C>(ranks(p, p.v, i) + j, count);
        total += block;
      }
      Base::write(p.diagonal, p.grads[grad_diagonal], s.adapter * p.r + j, total * static_cast<C>(p.scale), count);
    }
  }

  static void gradients(const Problem& p, void* memory, const Segment* segments, int64_t many, int64_t part, int64_t parts) {
    Arena arena(memory);
    const Thread t = Base::thread(p, arena);
    auto each = [&](int64_t columns, auto f) FA_FORCED {
      const int64_t panels = ceil_div(columns, panel_width<C>);
      const int64_t end = least(columns, panels * (part + 1) / parts * panel_width<C>);
      for (int64_t c = panels * part / parts * panel_width<C>; c < end; c += high_columns) f(c, least(high_columns, end - c));
    };
    if (p.wants[grad_b] || p.wants[grad_bias] || p.wants[grad_gain] || p.scaled_grad_y)
      each(p.n, [&](int64_t c, int64_t n) FA_FORCED { over_grad_y(p, t, segments, many, c, n); });
    if (p.wants[grad_a] || (p.wants[grad_x] && !p.joined))
      each(p.k, [&](int64_t c, int64_t n) FA_FORCED { over_x(p, t, segments, many, c, n); });
    for (int64_t k = part; p.wants[grad_diagonal] && k < many; k += parts)
      if (segments[k].adapter >= 0) diagonal(p, segments[k]);
  }
};

}  // namespace fastadapt::FA_TARGET::lora_linear
