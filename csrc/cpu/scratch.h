#pragma once
#include <cstdlib>
#include <new>

namespace fastadapt {

// Uninitialised memory for the duration of a call, aligned to a cache line. A thread keeps its last allocation of up to 8 MiB:
// fresh pages would cost a small call more than its arithmetic.
class ScratchMemory {
 public:
  explicit ScratchMemory(size_t bytes) {
    Kept& kept = mine();
    if (kept.size >= bytes) {
      data_ = kept.data;
      size_ = kept.size;
      kept = {};
      return;
    }
    size_ = (bytes + 4095) / 4096 * 4096;
    data_ = std::aligned_alloc(4096, size_);
    if (!data_) throw std::bad_alloc();
  }
  ~ScratchMemory() {
    Kept& kept = mine();
    if (size_ > limit || kept.size >= size_) {
      std::free(data_);
      return;
    }
    std::free(kept.data);
    kept.data = data_;
    kept.size = size_;
  }
  ScratchMemory(const ScratchMemory&) = delete;
  ScratchMemory& operator=(const ScratchMemory&) = delete;

  char* data() { return static_cast<char*>(data_); }

 private:
  static constexpr size_t limit = 8 << 20;
  struct Kept {
    void* data = nullptr;
    size_t size = 0;
  };
  struct Owner : Kept {
    ~Owner() { std::free(data); }
  };
  static Kept& mine() {
    static thread_local Owner owner;
    return owner;
  }

  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace fastadapt
