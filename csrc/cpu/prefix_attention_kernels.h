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

#if FA_LANES == 16 && FASTADAPT_AMX
// For a q in bfloat16.
Kernel amx_kernel(Dtype, bool wide_parameters) {
  using namespace fastadapt::FA_TARGET::prefix_attention;
  return wide_parameters ? AmxForward<float>::kernel() : AmxForward<BFloat16>::kernel();
}

BackwardKernel amx_backward_kernel(Dtype, bool wide_parameters) {
  using namespace fastadapt::FA_TARGET::prefix_attention;
  return wide_parameters ? AmxBackward<float>::kernel() : AmxBackward<BFloat16>::kernel();
}
#endif

}  // namespace fastadapt::prefix_attention::FA_TARGET
