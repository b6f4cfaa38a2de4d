// The kernels of csrc/cuda/bottleneck*.cuh and their plan, compiled for the CPU, behind a C interface for ctypes.
// A call returns nullptr or an error message; `schedule` is the order in which the emulator runs the threads.
#define FA_EMULATE
#include "bottleneck_plan_backward.cuh"

#include <memory>

using namespace fastadapt;

namespace {

template <class Call>
const char* guarded(int multiprocessors, int shared_limit, uint64_t schedule, Call call) {
  static thread_local std::string message;
  std::vector<std::unique_ptr<void, void (*)(void*)>> workspace;
  Device device{multiprocessors, shared_limit, schedule, [&](int64_t bytes) {
    const size_t size = (bytes + 31) / 16 * 16;
    void* p = std::aligned_alloc(16, size);
    std::memset(p, 0xff, size);  // NaN, so that nothing relies on fresh memory
    workspace.emplace_back(p, std::free);
    return p;
  }};
  try {
    return call(device);
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace

extern "C" const char* emulated_bottleneck_fwd(const Arguments* a, void* y, int multiprocessors, int shared_limit, uint64_t schedule) {
  return guarded(multiprocessors, shared_limit, schedule, [&](const Device& device) {
    switch (a->x.kind) {
      case Kind::float32: return bottleneck_forward<float>(*a, y, device);
      case Kind::float16: return bottleneck_forward<f16>(*a, y, device);
      default: return bottleneck_forward<bf16>(*a, y, device);
    }
  });
}

extern "C" const char* emulated_bottleneck_bwd(const Arguments* a, const Outputs* o, int multiprocessors, int shared_limit, uint64_t schedule) {
  return guarded(multiprocessors, shared_limit, schedule, [&](const Device& device) {
    switch (a->x.kind) {
      case Kind::float32: return bottleneck_backward<float>(*a, *o, device);
      case Kind::float16: return bottleneck_backward<f16>(*a, *o, device);
      default: return bottleneck_backward<bf16>(*a, *o, device);
    }
  });
}
