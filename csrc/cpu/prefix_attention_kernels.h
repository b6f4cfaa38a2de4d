// The kernels of both directions for one instruction set, in one translation unit, since they share their tiles.
#pragma once
#include "prefix_attention_backward.h"
#include "prefix_attention_forward.h"

namespace fastadapt::prefix_attention::FA_TARGET {

Kernel kernel(Dtype dtype, bool wide_parameters) {
  return fastadapt::FA_TARGET::kernel_of<fastadapt::FA_TARGET::prefix_attention::Forward>(
      dtype, wide_parameters ? Dtype::float32 : dtype);
}

BackwardKernel backward_kernel(Dtype dtype, bool wide_parameters) {
  return fastadapt::FA_TARGET::kernel_of<fastadapt::FA_TARGET::prefix_attention::Backward>(
      dtype, wide_parameters ? Dtype::float32 : dtype);
}

}  // namespace fastadapt::prefix_attention::FA_TARGET
