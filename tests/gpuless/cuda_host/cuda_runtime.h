// The part of the CUDA runtime that csrc/cuda calls, for a device that is emulated on the CPU.
#pragma once
#include "../cuda_emulator.h"
#include "../stable_runtime.h"

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaError_t { cudaSuccess };

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const host::Settings& s = host::settings();
  emulator::state().shared_limit = static_cast<size_t>(s.shared_limit);
  emulator::state().most_blocks = static_cast<uint64_t>(s.most_blocks);
  *value = static_cast<int>(attribute == cudaDevAttrMultiProcessorCount ? s.multiprocessors : s.shared_limit);
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }  // the emulator throws
