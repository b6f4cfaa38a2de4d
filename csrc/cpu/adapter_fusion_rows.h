// Forward and backward of adapter_fusion, a few rows at a time: what the adapters give for them stays in the first-level cache
// from its products with other rows to the sum that is weighted by them.
#pragma once
#include "adapter_fusion_args.h"
#include "rows.h"

namespace fastadapt::FA_TARGET::adapter_fusion {

using namespace fastadapt::adapter_fusion;

// What the rows of a block may take of the first-level cache.
constexpr int64_t block_bytes = 24 << 10;

template <int64_t N>
using Constant = std::integral_constant<int64_t, N>;

template <class T>
struct Pass {
  using C = Compute<T>;
  static constexpr int64_t L = lanes<C>;
  static constexpr C smallest = sizeof(C) == sizeof(double) ? __DBL_MIN__ : __FLT_MIN__;  // that is normal

  // Adapters, or vectors of a row, that are worked on at once.
  static constexpr int64_t group = 4;

  // Of a block of at most L rows: where each begins in every tensor; then vectors, one an adapter, with a lane for each row;
  // then numbers of a single row.
  struct Scratch {
    const T **query, **grad_y, **keys, **values;
    T *query_copy, *grad_y_copy, *keys_copy, *values_copy;  // of rows whose elements don't lie side by side
    C *scores, *products, *weights;
    C* factors;
    int64_t rows;
  };

  static FA_INLINE Scratch scratch(const Problem& p, Arena& arena) {
    Scratch s = {};
    const int64_t kept = p.shared || p.wants[grad_scale] ? p.g + 2 : 2;  // those that are read twice
    const int64_t n = s.rows = most(1, least(L, block_bytes / (kept * p.d * static_cast<int64_t>(sizeof(T)))));
    const auto copy = [&](const Rows& rows, int64_t count) FA_FORCED {
      return rows.step == 1 ? nullptr : arena.take<T>(count * p.d);
    };
    s.query_copy = copy(p.query, n);
    s.grad_y_copy = copy(p.grad_y, n);
    s.keys_copy = copy(p.keys.rows, n * p.g);
    s.values_copy = p.shared ? s.keys_copy : copy(p.values.rows, n * p.g);
    s.query = arena.take<const T*>(n);
    s.grad_y = arena.take<const T*>(n);
    s.keys = arena.take<const T*>(n * p.g);
    s.values = p.shared ? s.keys : arena.take<const T*>(n * p.g);
    for (C** vectors : {&s.scores, &s.products, &s.weights}) *vectors = arena.take<C>(p.g * L);
    s.factors = arena.take<C>(p.g);
    return s;
  }

  static int64_t thread_bytes(const Problem& p) {
    Arena arena(nullptr);
    scratch(p, arena);
    return arena.used();
  }

  // Where n rows begin, and those of each adapter: in place or copied.
  static FA_INLINE void locate(const Problem& p, const Rows& rows, int64_t begin, int64_t n, T* copies, const T** out) {
    locate_rows(rows, nullptr, begin, n, out);
    contiguous_rows(rows, out, n, 0, p.d, copies, out);
  }
  static FA_INLINE void locate(const Problem& p, const Stack& stack, int64_t begin, int64_t n, T* copies, const T** out) {
    for (int64_t r = 0; r < n; ++r) {
      const T* first;
      locate_rows(stack.rows, nullptr, begin + r, 1, &first);
      for (int64_t i = 0; i < p.g; ++i) out[r * p.g + i] = first + i * stack.stride;
    }
    contiguous_rows(stack.rows, out, n * p.g, 0, p.d, copies, out);
  }

  static FA_INLINE C scale(const Problem& p) {
    return p.scale.data ? Parameters<T, T>::parameter_at(p.scale, 0, 0, 1)[0] : static_cast<C>(p.scale_value);
  }

  // f(first column, vectors, columns) for all columns of a row, with constants but for the columns of its last vector.
  template <class F>
  static FA_INLINE void for_columns(int64_t d, const F& f) {
    int64_t j = 0;
    for (; j + group * L <= d; j += group * L) f(j, Constant<group>{}, Constant<group * L>{});
    for (; j + L <= d; j += L) f(j, Constant<1>{}, Constant<L>{});
    if (j < d) f(j, Constant<1>{}, d - j);
  }

  // out[i * L] = <row, rows[i]> for N adapters.
  template <int64_t N>
  static FA_INLINE void few_products(int64_t d, const T* row, const T* const* rows, C* out) {
    Vec<C> acc[N] = {};
    for_columns(d, [&](int64_t j, auto vectors, auto columns) FA_FORCED {
#pragma GCC unroll 4
      for (int64_t v = 0; v < vectors * L; v += L) {
        const Vec<C> x = load_at<C>(row + j, v, columns - v, 1);
#pragma GCC unroll 4
        for (int64_t i = 0; i < N; ++i) acc[i] += x * load_at<C>(rows[i] + j, v, columns - v, 1);
      }
    });
#pragma GCC unroll 4
    for (int64_t i = 0; i < N; ++i) out[i * L] = sum<C>(acc[i]);
  }

  static void products(const Problem& p, const T* row, const T* const* rows, C* out) {
    int64_t i = 0;
    for (; i + group <= p.g; i += group) few_products<group>(p.d, row, rows + i, out + i * L);
    for (; i + 2 <= p.g; i += 2) few_products<2>(p.d, row, rows + i, out + i * L);
    if (i < p.g) few_products<1>(p.d, row, rows + i, out + i * L);
  }

  // out = the sum over adapters of factors[i] * rows[i], first of groups and then of these: rounding grows with the longer sum.
  static void weighted_sum(const Problem& p, const C* factors, const T* const* rows, T* out) {
    for_columns(p.d, [&](int64_t j, auto vectors, auto columns) FA_FORCED {
      constexpr int64_t V = decltype(vectors)::value;
      Vec<C> total[V] = {};
      const auto add = [&](int64_t i, auto n) FA_FORCED {
        Vec<C> few[V] = {};
#pragma GCC unroll 4
        for (int64_t t = i; t < i + n; ++t)
#pragma GCC unroll 4
          for (int64_t v = 0; v < V; ++v) few[v] += factors[t] * load_at<C>(rows[t] + j, v * L, columns - v * L, 1);
#pragma GCC unroll 4
        for (int64_t v = 0; v < V; ++v) total[v] += few[v];
      };
      int64_t i = 0;
      for (; i + group <= p.g; i += group) add(i, Constant<group>{});
      if (i < p.g) add(i, p.g - i);
#pragma GCC unroll 4
      for (int64_t v = 0; v < V; ++v) store_at<C>(out + j, v * L, columns - v * L, total[v]);
    });
  }

  // out[i] = a[i] * x, or with BOTH a[i] * x + b[i] * y, for each adapter, whose rows of `out` are m * d elements apart.
  template <bool BOTH>
  static void multiples(const Problem& p, const C* a, const T* x, const C* b, const T* y, T* out) {
    for (int64_t i = 0; i < p.g; ++i, out += p.m * p.d)
      for_columns(p.d, [&](int64_t j, auto vectors, auto columns) FA_FORCED {
#pragma GCC unroll 4
        for (int64_t v = 0; v < vectors * L; v += L) {
          Vec<C> value = a[i] * load_at<C>(x + j, v, columns - v, 1);
          if constexpr (BOTH) value += b[i] * load_at<C>(y + j, v, columns - v, 1);
          store_at<C>(out + j, v, columns - v, value);
        }
      });
  }

  // The weights of scale * scores, in place. As in PyTorch a NaN, an infinity or nothing but minus infinity makes all of a row
  // NaN. Weights so small that they are subnormal become zero: products with them would take many times as long.
  static FA_INLINE void softmax(int64_t g, C scale, C* scores) {
    Vec<C> top = scale * load<C>(scores), total = {};
    for (int64_t i = 0; i < g * L; i += L) {
      const Vec<C> score = scale * load<C>(scores + i);
      store(scores + i, score);
      top = maximum<C>(top, score);
    }
    for (int64_t i = 0; i < g * L; i += L) {
      const Vec<C> weight = exp(load<C>(scores + i) - top);
      store(scores + i, weight);
      total += weight;
    }
    for (int64_t i = 0; i < g * L; i += L) {
      const Vec<C> weight = load<C>(scores + i) / total;
      store(scores + i, weight < smallest ? Vec<C>{} : weight);
    }
  }

  // weights * (grads - the mean of grads by these weights), in place: from gradients of weights those of scores. The mean is
  // refined by that of what it leaves, or little would be right of a row in which one weight is almost 1.
  static FA_INLINE void softmax_gradient(int64_t g, const C* weights, C* grads) {
    for (int time = 0; time < 2; ++time) {
      Vec<C> mean = {};
      for (int64_t i = 0; i < g * L; i += L) mean += load<C>(weights + i) * load<C>(grads + i);
      for (int64_t i = 0; i < g * L; i += L) store(grads + i, load<C>(grads + i) - mean);
    }
    for (int64_t i = 0; i < g * L; i += L) store(grads + i, load<C>(weights + i) * load<C>(grads + i));
  }

  // A row's share of the gradient of the scale, where `grads` are those of its scores. These add up to nothing, so that the
  // products may be taken from their mean: if they are almost the same, the rounding of `grads` does no harm.
  static FA_INLINE double share_of_scale(int64_t g, const C* weights, const C* grads, const C* products) {
    double mean = 0, share = 0;
    for (int64_t i = 0; i < g * L; i += L) mean += static_cast<double>(weights[i]) * products[i];
    for (int64_t i = 0; i < g * L; i += L) share += grads[i] * (products[i] - mean);
    return share;
  }

  static void forward(const Problem& p, void* thread, int64_t begin, int64_t end) {
    Arena arena(thread);
    const Scratch s = scratch(p, arena);
    const C scale = Pass::scale(p);
    memset(s.scores, 0, p.g * L * sizeof(C));
    for (; begin < end; begin += s.rows) {
      const int64_t n = least(s.rows, end - begin);
      locate(p, p.query, begin, n, s.query_copy, s.query);
      locate(p, p.keys, begin, n, s.keys_copy, s.keys);
      if (!p.shared) locate(p, p.values, begin, n, s.values_copy, s.values);
      for (int64_t r = 0; r < n; ++r) products(p, s.query[r], s.keys + r * p.g, s.scores + r);
      softmax(p.g, scale, s.scores);
      for (int64_t r = 0; r < n; ++r) {
        C* const weights = static_cast<C*>(p.weights) + (begin + r) * p.g;
        for (int64_t i = 0; i < p.g; ++i) weights[i] = s.scores[i * L + r];
        weighted_sum(p, weights, s.values + r * p.g, static_cast<T*>(p.y) + (begin + r) * p.d);
      }
    }
  }

  static double backward(const Problem& p, void* thread, int64_t begin, int64_t end) {
    Arena arena(thread);
    const Scratch s = scratch(p, arena);
    const C scale = Pass::scale(p);
    const bool wants_scores = p.wants[grad_query] || p.wants[grad_keys] || p.wants[grad_scale];
    const bool reads_query = p.wants[grad_keys] || p.wants[grad_scale], reads_keys = p.wants[grad_query] || p.wants[grad_scale];
    double grad_of_scale = 0;
    for (C* vectors : {s.scores, s.weights}) memset(vectors, 0, p.g * L * sizeof(C));
    for (; begin < end; begin += s.rows) {
      const int64_t n = least(s.rows, end - begin);
      const C* const weights = static_cast<const C*>(p.weights) + begin * p.g;
      locate(p, p.grad_y, begin, n, s.grad_y_copy, s.grad_y);
      if (reads_query) locate(p, p.query, begin, n, s.query_copy, s.query);
      if (p.shared || reads_keys) locate(p, p.keys, begin, n, s.keys_copy, s.keys);
      if (!p.shared && wants_scores) locate(p, p.values, begin, n, s.values_copy, s.values);
      for (int64_t r = 0; wants_scores && r < n; ++r) {
        products(p, s.grad_y[r], s.values + r * p.g, s.scores + r);
        if (p.wants[grad_scale]) products(p, s.query[r], s.keys + r * p.g, s.products + r);
        for (int64_t i = 0; i < p.g; ++i) s.weights[i * L + r] = weights[r * p.g + i];
      }
      softmax_gradient(p.g, s.weights, s.scores);
      for (int64_t r = 0; r < n; ++r) {
        const auto grads = [&](Gradient which) FA_FORCED { return static_cast<T*>(p.grads[which]) + (begin + r) * p.d; };
        const C* const row_weights = weights + r * p.g;
        if (p.wants[grad_scale]) grad_of_scale += share_of_scale(p.g, s.weights + r, s.scores + r, s.products + r);
        for (int64_t i = 0; i < p.g; ++i) s.factors[i] = scale * s.scores[i * L + r];
        if (p.wants[grad_query]) weighted_sum(p, s.factors, s.keys + r * p.g, grads(grad_query));
        if (p.wants[grad_values]) multiples<false>(p, row_weights, s.grad_y[r], nullptr, nullptr, grads(grad_values));
        if (!p.wants[grad_keys]) continue;
        if (p.shared)
          multiples<true>(p, s.factors, s.query[r], row_weights, s.grad_y[r], grads(grad_keys));
        else
          multiples<false>(p, s.factors, s.query[r], nullptr, nullptr, grads(grad_keys));
      }
    }
    return grad_of_scale;
  }

  static void write_grad_scale(const Problem& p, double value) {
    Parameters<T, T>::write(p.scale, p.grads[grad_scale], 0, broadcast<C>(value), 1);
  }

  static Kernel kernel() { return {thread_bytes, forward, backward, write_grad_scale}; }
};

}  // namespace fastadapt::FA_TARGET::adapter_fusion

namespace fastadapt::adapter_fusion::FA_TARGET {
Kernel kernel(Dtype dtype) {
  using namespace fastadapt::FA_TARGET::adapter_fusion;
  switch (dtype) {
    case Dtype::float16: return Pass<Half>::kernel();
    case Dtype::bfloat16: return Pass<BFloat16>::kernel();
    case Dtype::float64: return Pass<double>::kernel();
    default: return Pass<float>::kernel();
  }
}
}  // namespace fastadapt::adapter_fusion::FA_TARGET
