// In place of ../../cuda_emulator.h: launches are handed to Python instead of run, and what the host allocates lies in the
// memory of the simulator. The plan of an op then says what it launches, with pointers that mean something there.
#pragma once
#define launch run_on_the_host
#include_next "cuda_emulator.h"
#undef launch
#include <dlfcn.h>

#include <cstring>
#include <tuple>
#include <vector>

extern "C" {
// Set by Python. ``kernel`` is the offset of its symbol in this library; ``bytes`` holds the parameters one after another.
inline __attribute__((visibility("default"), used)) void (*simulator_launch)(uint64_t kernel, unsigned grid_x,
    unsigned grid_y, unsigned grid_z, unsigned threads, uint64_t shared, unsigned count, const uint64_t* sizes,
    const char* bytes) = nullptr;
inline __attribute__((visibility("default"), used)) void* (*simulator_allocate)(uint64_t bytes) = nullptr;
inline __attribute__((visibility("default"), used)) int (*simulator_owns)(void* p) = nullptr;

// The library is linked with --wrap for these two.
void __real_free(void*);
inline __attribute__((used)) void __wrap_free(void* p) {
  if (!simulator_owns || !simulator_owns(p)) __real_free(p);
}
inline __attribute__((used)) int __wrap_posix_memalign(void** out, size_t, size_t bytes) {
  *out = simulator_allocate(bytes);
  return *out ? 0 : 12;  // ENOMEM
}
}

namespace fastadapt {

template <class... Parameters, class... Arguments>
void launch(
    void (*kernel)(Parameters...), dim3 grid, unsigned threads, size_t shared, cudaStream_t, const Arguments&... arguments) {
  const std::tuple<Parameters...> parameters(arguments...);
  std::vector<uint64_t> sizes;
  std::vector<char> bytes;
  std::apply(
      [&](const auto&... each) {
        (sizes.push_back(sizeof(each)), ...);
        (bytes.insert(bytes.end(), reinterpret_cast<const char*>(&each), reinterpret_cast<const char*>(&each + 1)), ...);
      },
      parameters);
  Dl_info library;
  void* symbol = reinterpret_cast<void*>(kernel);
  dladdr(symbol, &library);
  simulator_launch(static_cast<char*>(symbol) - static_cast<char*>(library.dli_fbase), grid.x, grid.y, grid.z, threads, shared,
      sizes.size(), sizes.data(), bytes.data());
}

}  // namespace fastadapt
