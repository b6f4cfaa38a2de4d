#pragma once
#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastadapt {

// Asks for large pages under an output so large that malloc maps it for this call alone: to be given it in pages of 4 KiB takes
// longer than to fill it. A smaller one mostly lies in memory that is there already, which only loses by it.
inline void prefer_large_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 2 << 20;
  if (bytes < (32 << 20)) return;
  const uintptr_t first = reinterpret_cast<uintptr_t>(data), begin = (first + page - 1) / page * page;
  madvise(reinterpret_cast<void*>(begin), (first + bytes) / page * page - begin, MADV_HUGEPAGE);  // a wish: it may fail
#endif
}

}  // namespace fastadapt
