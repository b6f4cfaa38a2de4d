// Forward and backward of adapter_fusion, a row at a time: what g adapters give for a row stays in the first-level cache from its
// products with another row to the sum that is weighted by them.
#pragma once
#include "adapter_fusion_args.h"
#include "rows.h"

namespace fastadapt::FA_TARGET::adapter_fusion {

using namespace fastadapt::adapter_fusion;

template <int64_t N>
using Constant = std::integral_constant<int64_t, N>;

template <class T>
struct Pass {
  using C = Compute<T>;
  static constexpr int64_t L = lanes<C>;

  // Adapters, or vectors of a row, that are worked on at once.
  static constexpr int64_t group = 4;

  struct Scratch {
    const T **keys, **values;
    T *query_copy, *grad_y_copy, *keys_copy, *values_copy;  // of rows whose elements don't lie side by side
    C *scores, *products;                                   // g of them, whole vectors
  };

  static FA_INLINE Scratch scratch(const Problem& p, Arena& arena) {
    Scratch s = {};
    const auto copy = [&](const Rows& rows, int64_t count) FA_FORCED {
      return rows.step == 1 ? nullptr : arena.take<T>(count * p.d);
    };
    s.query_copy = copy(p.query, 1);
    s.grad_y_copy = copy(p.grad_y, 1);
    s.keys_copy = copy(p.keys.rows, p.g);
    s.values_copy = p.shared ? s.keys_copy : copy(p.values.rows, p.g);
    s.keys = arena.take<const T*>(p.g);
    s.values = p.shared ? s.keys : arena.take<const T*>(p.g);
    s.scores = arena.take<C>(padded<C>(p.g));
    s.products = arena.take<C>(padded<C>(p.g));
    return s;
  }

  static int64_t thread_bytes(const Problem& p) {
    Arena arena(nullptr);
    scratch(p, arena);
    return arena.used();
  }

  // A row of `rows`, and one of each adapter: in place or copied.
  static FA_INLINE const T* locate(const Problem& p, const Rows& rows, int64_t row, T* copy) {
    const T* out;
    locate_rows(rows, nullptr, row, 1, &out);
    contiguous_rows(rows, &out, 1, 0, p.d, copy, &out);
    return out;
  }
  static FA_INLINE void locate(const Problem& p, const Stack& stack, int64_t row, T* copies, const T** out) {
    const T* first;
    locate_rows(stack.rows, nullptr, row, 1, &first);
    for (int64_t i = 0; i < p.g; ++i) out[i] = first + i * stack.stride;
    contiguous_rows(stack.rows, out, p.g, 0, p.d, copies, out);
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

  // out[i] = <row, rows[i]> for N adapters.
  template <int64_t N>
  static FA_INLINE void few_products(int64_t d, const T* row, const T* const* rows, C* out) {
    Vec<C> acc[N] = {};
    for_columns(d, [&](int64_t j, auto vectors, auto columns) FA_FORCED {
      for (int64_t v = 0; v < vectors * L; v += L) {
        const Vec<C> x = load_at<C>(row + j, v, columns - v, 1);
        for (int64_t i = 0; i < N; ++i) acc[i] += x * load_at<C>(rows[i] + j, v, columns - v, 1);
      }
    });
    for (int64_t i = 0; i < N; ++i) out[i] = sum<C>(acc[i]);
  }

  static void products(const Problem& p, const T* row, const T* const* rows, C* out) {
    int64_t i = 0;
    for (; i + group <= p.g; i += group) few_products<group>(p.d, row, rows + i, out + i);
    for (; i + 2 <= p.g; i += 2) few_products<2>(p.d, row, rows + i, out + i);
    if (i < p.g) few_products<1>(p.d, row, rows + i, out + i);
  }

  // out = the sum over adapters of factors[i] * rows[i], first of groups and then of these: rounding grows with the longer sum.
  static void weighted_sum(const Problem& p, const C* factors, const T* const* rows, T* out) {
    for_columns(p.d, [&](int64_t j, auto vectors, auto columns) FA_FORCED {
      constexpr int64_t V = decltype(vectors)::value;
      Vec<C> total[V] = {};
      const auto add = [&](int64_t i, auto n) FA_FORCED {
        Vec<C> few[V] = {};
        for (int64_t t = i; t < i + n; ++t)
          for (int64_t v = 0; v < V; ++v) few[v] += factors[t] * load_at<C>(rows[t] + j, v * L, columns - v * L, 1);
        for (int64_t v = 0; v < V; ++v) total[v] += few[v];
      };
      int64_t i = 0;
      for (; i + group <= p.g; i += group) add(i, Constant<group>{});
      if (i < p.g) add(i, p.g - i);
      for (int64_t v = 0; v < V; ++v) store_at<C>(out + j, v * L, columns - v * L, total[v]);
    });
  }

  // out[i] = a[i] * x, or with BOTH a[i] * x + b[i] * y, for each adapter, whose rows of `out` are m * d elements apart.
  template <bool BOTH>
  static void multiples(const Problem& p, const C* a, const T* x, const C* b, const T* y, T* out) {
    for (int64_t i = 0; i < p.g; ++i, out += p.m * p.d)
      for_columns(p.d, [&](int64_t j, auto vectors, auto columns) FA_FORCED {
        for (int64_t v = 0; v < vectors * L; v += L) {
          Vec<C> value = a[i] * load_at<C>(x + j, v, columns - v, 1);
          if constexpr (BOTH) value += b[i] * load_at<C>(y + j, v, columns - v, 1);
          store_at<C>(out + j, v, columns - v, value);
        }
      });
  }

  // In place, of g scores followed by those of no adapter. As in PyTorch a NaN, an infinity or nothing but minus infinity makes
  // all of them NaN.
  static FA_INLINE void softmax(int64_t g, C* scores) {
    for (int64_t i = g; i < padded<C>(g); ++i) scores[i] = -__builtin_inf();
    Vec<C> top = load<C>(scores), total = {};
    for (int64_t i = L; i < g; i += L) top = maximum<C>(top, load<C>(scores + i));
    const C highest = largest<C>(top);
    for (int64_t i = 0; i < g; i += L) {
      const Vec<C> weight = exp(load<C>(scores + i) - highest);
      store(scores + i, weight);
      total += weight;
    }
    const C whole = sum<C>(total);
    for (int64_t i = 0; i < g; i += L) store(scores + i, load<C>(scores + i) / whole);
  }

  static void forward(const Problem& p, void* thread, int64_t begin, int64_t end) {
    Arena arena(thread);
    const Scratch s = scratch(p, arena);
    const C scale = Pass::scale(p);
    for (int64_t row = begin; row < end; ++row) {
      locate(p, p.keys, row, s.keys_copy, s.keys);
      if (!p.shared) locate(p, p.values, row, s.values_copy, s.values);
      products(p, locate(p, p.query, row, s.query_copy), s.keys, s.scores);
      for (int64_t i = 0; i < p.g; ++i) s.scores[i] *= scale;
      softmax(p.g, s.scores);
      memcpy(static_cast<C*>(p.weights) + row * p.g, s.scores, p.g * sizeof(C));
      weighted_sum(p, s.scores, s.values, static_cast<T*>(p.y) + row * p.d);
    }
  }

  // weights[i] * (grads[i] - the mean of grads by these weights), in place: from gradients of weights those of scores. The mean
  // is refined by that of what it leaves, or little would be right of a row in which one weight is almost 1.
  static FA_INLINE void softmax_gradient(int64_t g, const C* weights, C* grads) {
    for (int time = 0; time < 2; ++time) {
      Vec<C> total = {};
      for (int64_t i = 0; i < g; i += L) total += load_at<C>(weights, i, g - i, 1) * load_at<C>(grads, i, g - i, 1);
      const C mean = sum<C>(total);
      for (int64_t i = 0; i < g; ++i) grads[i] -= mean;
    }
    for (int64_t i = 0; i < g; ++i) grads[i] *= weights[i];
  }

  // A row's share of the gradient of the scale, where `grads` are those of its scores. These add up to nothing, so that the
  // products may be taken from their mean: if they are almost the same, the rounding of `grads` does no harm.
  static FA_INLINE double share_of_scale(int64_t g, const C* weights, const C* grads, const C* products) {
    double mean = 0, share = 0;
    for (int64_t i = 0; i < g; ++i) mean += static_cast<double>(weights[i]) * products[i];
    for (int64_t i = 0; i < g; ++i) share += grads[i] * (products[i] - mean);
    return share;
  }

  static double backward(const Problem& p, void* thread, int64_t begin, int64_t end) {
    Arena arena(thread);
    const Scratch s = scratch(p, arena);
    const C scale = Pass::scale(p);
    const bool wants_scores = p.wants[grad_query] || p.wants[grad_keys] || p.wants[grad_scale];
    const auto grads = [&](Gradient which, int64_t row) FA_FORCED { return static_cast<T*>(p.grads[which]) + row * p.d; };
    double grad_of_scale = 0;
    for (int64_t row = begin; row < end; ++row) {
      const C* weights = static_cast<const C*>(p.weights) + row * p.g;
      const T* grad_y = locate(p, p.grad_y, row, s.grad_y_copy);
      const T* query = p.wants[grad_keys] || p.wants[grad_scale] ? locate(p, p.query, row, s.query_copy) : nullptr;
      if (p.wants[grad_values]) multiples<false>(p, weights, grad_y, nullptr, nullptr, grads(grad_values, row));
      if (!wants_scores) continue;
      if (p.shared || p.wants[grad_query] || p.wants[grad_scale]) locate(p, p.keys, row, s.keys_copy, s.keys);
      if (!p.shared) locate(p, p.values, row, s.values_copy, s.values);
      products(p, grad_y, s.values, s.scores);
      softmax_gradient(p.g, weights, s.scores);
      if (p.wants[grad_scale]) {
        products(p, query, s.keys, s.products);
        grad_of_scale += share_of_scale(p.g, weights, s.scores, s.products);
      }
      for (int64_t i = 0; i < p.g; ++i) s.scores[i] *= scale;
      if (p.wants[grad_query]) weighted_sum(p, s.scores, s.keys, grads(grad_query, row));
      if (!p.wants[grad_keys]) continue;
      if (p.shared)
        multiples<true>(p, s.scores, query, weights, grad_y, grads(grad_keys, row));
      else
        multiples<false>(p, s.scores, query, nullptr, nullptr, grads(grad_keys, row));
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
