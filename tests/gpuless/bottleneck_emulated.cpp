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

// FA_ONLY_BFLOAT16 leaves the other dtypes out, where one is enough and the compiler's time counts.
#ifdef FA_ONLY_BFLOAT16
#define FA_DISPATCH(kind, f, ...) (kind) == Kind::bfloat16 ? f<bf16>(__VA_ARGS__) : "built for bfloat16 only"
#else
#define FA_DISPATCH(kind, f, ...) \
  (kind) == Kind::float32 ? f<float>(__VA_ARGS__) : (kind) == Kind::float16 ? f<f16>(__VA_ARGS__) : f<bf16>(__VA_ARGS__)
#endif

extern "C" const char* emulated_bottleneck_fwd(
    const Arguments* a, void* y, int multiprocessors, int shared_limit, uint64_t schedule) {
  return guarded(multiprocessors, shared_limit, schedule,
      [&](const Device& device) { return FA_DISPATCH(a->x.kind, bottleneck_forward, *a, y, device); });
}

extern "C" const char* emulated_bottleneck_bwd(
    const Arguments* a, const Outputs* outputs, int multiprocessors, int shared_limit, uint64_t schedule) {
  return guarded(multiprocessors, shared_limit, schedule,
      [&](const Device& device) { return FA_DISPATCH(a->x.kind, bottleneck_backward, *a, *outputs, device); });
}
