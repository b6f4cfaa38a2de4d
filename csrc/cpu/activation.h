// The activations of an adapter: value and derivative at z, one vector at a time.
#pragma once
#include "simd.h"

namespace fastadapt::FA_TARGET {

// Positions as in the Python table of activations.
enum Activation { relu, gelu, gelu_tanh, silu, tanh_, identity };

// Writes act(z), and act'(z) if GRAD.
template <int CODE, bool GRAD, class V, class C>
FA_INLINE void activate_vector(V z, V& value, V& slope, C) {
  const V one = broadcast<C>(1);
  if constexpr (CODE == relu) {
    value = z < 0 ? V{} : z;  // a NaN passes
    if constexpr (GRAD) slope = z <= 0 ? V{} : one;
  } else if constexpr (CODE == gelu) {
    const V cdf = C(0.5) * (one + erf(z * C(0.70710678118654752440)));
    value = z * cdf;
    if constexpr (GRAD) slope = cdf + z * exp(C(-0.5) * z * z) * C(0.39894228040143267794);
  } else if constexpr (CODE == gelu_tanh) {
    const C root = C(0.79788456080286535588), cubic = C(0.044715);
    const V t = tanh(root * (z + cubic * z * z * z));
    value = C(0.5) * z * (one + t);
    if constexpr (GRAD) slope = C(0.5) * (one + t) + C(0.5) * z * (one - t * t) * (root * (one + 3 * cubic * z * z));
  } else if constexpr (CODE == silu) {
    const V s = one / (one + exp(-z));
    value = z / (one + exp(-z));
    if constexpr (GRAD) slope = s * (one + z * (one - s));
  } else if constexpr (CODE == tanh_) {
    value = tanh(z);
    if constexpr (GRAD) slope = one - value * value;
  } else {
    value = z;
    if constexpr (GRAD) slope = one;
  }
}

// f(code) with the activation as a compile-time constant.
template <int N>
struct Code {
  static constexpr int value = N;
};

template <class F>
FA_INLINE void with_activation(int64_t code, F&& f) {
  switch (code) {
    case relu: return f(Code<relu>{});
    case gelu: return f(Code<gelu>{});
    case gelu_tanh: return f(Code<gelu_tanh>{});
    case silu: return f(Code<silu>{});
    case tanh_: return f(Code<tanh_>{});
    default: return f(Code<identity>{});
  }
}

}  // namespace fastadapt::FA_TARGET
