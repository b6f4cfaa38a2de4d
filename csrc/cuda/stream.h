// The device a call runs on, as torch and CUDA see it.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "../common.h"

namespace fastadapt {

inline cudaStream_t current_stream(int32_t device) {
#if TORCH_FEATURE_VERSION >= TORCH_VERSION_2_13_0
  return static_cast<cudaStream_t>(torch::stable::accelerator::getCurrentStream(device).nativeHandle());
#else
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
#endif
}

inline int device_attribute(cudaDeviceAttr attribute, int32_t device) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

}  // namespace fastadapt
