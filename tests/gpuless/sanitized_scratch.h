// Forced in front of the CPU sources: ScratchMemory of csrc/cpu/scratch.h with exactly the bytes asked for, fresh, full of NaN
// and between redzones or guard pages.  The original rounds up to pages and keeps the memory of the last call.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>

#define ScratchMemory UnusedScratchMemory
#include "../../csrc/cpu/scratch.h"
#undef ScratchMemory

namespace host {
std::shared_ptr<void> allocate(int64_t bytes, int64_t offset, int64_t alignment);
}

namespace fastadapt {

class ScratchMemory {
 public:
  explicit ScratchMemory(size_t bytes) : memory_(host::allocate(static_cast<int64_t>(bytes), 0, 64)) {}
  char* data() { return static_cast<char*>(memory_.get()); }

 private:
  std::shared_ptr<void> memory_;
};

}  // namespace fastadapt
