// A libtorch of a few functions.  The compiled sources of the ops reach PyTorch through its stable C interface alone, so that
// with these functions in its place they run, unmodified, on plain memory: bound to numpy (stable_module.cpp) or in a program
// of their own under a sanitizer (stable_program.cpp).  A function that is missing here fails at link time.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <memory>
#include <string>
#include <vector>

// Sizes and strides in elements; `memory` keeps what `data` points into, if it is ours.
struct AtenTensorOpaque {
  void* data;
  int32_t dtype;
  std::vector<int64_t> sizes, strides;
  std::shared_ptr<void> memory;
};

struct StableListOpaque {
  std::vector<StableIValue> items;
};

namespace host {

struct Settings {
  int64_t cuda = 0;                                       // whether tensors are on a CUDA device, an emulated one
  int64_t multiprocessors = 1, shared_limit = 99 * 1024;  // of that device
  int64_t most_blocks = INT64_MAX;                        // an emulated launch of more runs those at its two ends
  int64_t threads = 1;                                    // that CPU kernels may use
  int64_t schedule = 0;                                   // order of an emulated launch; which end of memory is guarded
  int64_t alignment = 16;  // of tensors; 1, where kernels rely on none, guards the last byte of an odd size too

  void set(const std::string& name, int64_t value);
};
Settings& settings();
// Regions of torch::stable::parallel_for that really ran on several threads.
int64_t& parallel_regions();

int64_t item_size(int32_t dtype);
// Bytes from the first element to the end of the last.
int64_t span(const AtenTensorOpaque&);

// Memory of exactly this size that begins `offset` behind a multiple of `alignment`: under AddressSanitizer between its
// redzones, with FA_GUARD_PAGES right before a page that nobody may touch (right behind one if the schedule is odd).
// Filled with NaN.
std::shared_ptr<void> allocate(int64_t bytes, int64_t offset, int64_t alignment);

// Arguments as the stable interface passes them.  The call that gets them frees them.
StableIValue pass(bool);
StableIValue pass(int64_t);
StableIValue pass(double);
StableIValue pass(const std::vector<bool>&);
StableIValue pass(const AtenTensorOpaque&);
StableIValue pass_optional(const StableIValue* value);

// Runs a leaf op by its name.
std::vector<AtenTensorOpaque> call(const std::string& leaf, std::vector<StableIValue> arguments, size_t outputs);

}  // namespace host
