// The entry points of an instruction set: those of lora_linear_args.h.
#pragma once
#include <type_traits>

#include "lora_linear_norms.h"
#include "lora_linear_product.h"

namespace fastadapt::FA_TARGET::lora_linear {

template <class T, class W>
struct Entries {
  static Kernel kernel() {
    using P = Pass<T, W>;
    Kernel k{P::thread_bytes, P::project, P::expand, P::finish, P::gradients};
    if constexpr (std::is_same_v<T, float> && FA_LANES == 16) {
      k.thread_bytes = Product<T, W>::thread_bytes;
      k.product = Product<T, W>::product;
    }
    if constexpr (std::is_same_v<W, Compute<T>>) {
      k.norms_bytes = Norms<T, W>::thread_bytes;
      k.norms = Norms<T, W>::norms;
    }
    return k;
  }
};

}  // namespace fastadapt::FA_TARGET::lora_linear

namespace fastadapt::lora_linear::FA_TARGET {

Kernel kernel(Dtype dtype, Dtype weight_dtype) {
  return fastadapt::FA_TARGET::kernel_of<fastadapt::FA_TARGET::lora_linear::Entries>(dtype, weight_dtype);
}

}  // namespace fastadapt::lora_linear::FA_TARGET
