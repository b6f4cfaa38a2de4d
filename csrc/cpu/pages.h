#pragma once
#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastadapt {

// Asks for large pages under an output that malloc has mapped, or will map again, for this call: to be given it in pages of
// 4 KiB takes longer than to fill it. Memory that is there already stays as it is.
inline void prefer_large_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 2 << 20;
  if (bytes < (16 << 20)) return;
  const uintptr_t first = reinterpret_cast<uintptr_t>(data), begin = (first + page - 1) / page * page;
  madvise(reinterpret_cast<void*>(begin), (first + bytes) / page * page - begin, MADV_HUGEPAGE);  // a wish: it may fail
#endif
}

}  // namespace fastadapt
