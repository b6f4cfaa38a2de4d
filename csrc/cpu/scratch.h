#pragma once
#include <cstdlib>
#include <new>

namespace fastadapt {

// Uninitialised memory for the duration of a call, aligned to a cache line; small amounts come from the stack.
class ScratchMemory {
 public:
  explicit ScratchMemory(size_t bytes) {
    if (bytes <= sizeof local_) return;
    heap_ = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!heap_) throw std::bad_alloc();
  }
  ~ScratchMemory() { std::free(heap_); }
  ScratchMemory(const ScratchMemory&) = delete;
  ScratchMemory& operator=(const ScratchMemory&) = delete;

  char* data() { return heap_ ? static_cast<char*>(heap_) : local_; }

 private:
  void* heap_ = nullptr;
  alignas(64) char local_[32768];
};

}  // namespace fastadapt
