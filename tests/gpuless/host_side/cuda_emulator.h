// In place of ../cuda_emulator.h: a launch isn't run but judged.  Tensors lie on device 1 while device 0 is the current one, and
// each device has a current stream of its own, so that a forgotten guard, the default stream or that of another device is seen.
#pragma once
#define launch run_on_the_host
#include_next "cuda_emulator.h"
#undef launch
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <stdexcept>
#include <string>

extern "C" {
inline int host_side_device = 0;
inline __attribute__((visibility("default"), used)) int host_side_launches = 0;

// The library is linked with --wrap for these.
inline __attribute__((used)) AOTITorchError __wrap_aoti_torch_get_device_index(AtenTensorHandle, int32_t* out) {
  *out = 1;
  return 0;
}
inline __attribute__((used)) AOTITorchError __wrap_aoti_torch_create_device_guard(int32_t index, DeviceGuardHandle* out) {
  *out = reinterpret_cast<DeviceGuardHandle>(static_cast<intptr_t>(host_side_device + 1));
  host_side_device = index;
  return 0;
}
inline __attribute__((used)) AOTITorchError __wrap_aoti_torch_delete_device_guard(DeviceGuardHandle guard) {
  host_side_device = static_cast<int>(reinterpret_cast<intptr_t>(guard)) - 1;
  return 0;
}
inline __attribute__((used)) AOTITorchError __wrap_aoti_torch_get_current_cuda_stream(int32_t device, void** out) {
  *out = reinterpret_cast<void*>(static_cast<intptr_t>(1000 + device));
  return 0;
}
}

namespace fastadapt {

template <class... Parameters, class... Arguments>
void launch(
    void (*)(Parameters...), dim3 grid, unsigned threads, size_t shared, cudaStream_t stream, const Arguments&...) {
  auto require = [](bool right, const std::string& what) {
    if (!right) throw std::runtime_error("launch: " + what);
  };
  const auto number = reinterpret_cast<intptr_t>(stream);
  require(host_side_device == 1, "device " + std::to_string(host_side_device) + " is current, the tensors are on device 1");
  require(number == 1001, "not on the current stream of device 1 but on " + std::to_string(number));
  require(grid.x >= 1 && grid.x < (1u << 31) && grid.y >= 1 && grid.y < 65536 && grid.z >= 1 && grid.z < 65536, "the grid");
  require(threads >= 1 && threads <= 1024 && shared <= 227 * 1024, "the block");
  host_side_launches++;
}

}  // namespace fastadapt
