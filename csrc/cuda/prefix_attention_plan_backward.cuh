// The host side of prefix_attention's backward: which kernels run.
#pragma once
#include "prefix_attention_backward.cuh"
#include "prefix_attention_plan.cuh"

namespace fastadapt {

// The gradients of q, k and v are laid out as (b, t, h, e), the others are contiguous; data is nullptr where one isn't wanted.
struct PrefixGradients {
  Array q, k, v, prefix_k, prefix_v, gate;
};

// `y` and `lse`, (parts, b, h, t) and contiguous, are those of forward.
template <class T>
const char* prefix_attention_backward(const PrefixArguments& a, const Array& grad_y, const Array& y, const float* lse,
    const PrefixGradients& o, const Device& device) {
  return "backward isn't there yet";
}

}  // namespace fastadapt
