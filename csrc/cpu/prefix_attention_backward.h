// Backward of prefix_attention.
#pragma once
#include "prefix_attention_tiles.h"

namespace fastadapt::FA_TARGET::prefix_attention {

template <class T, class W>
struct Backward {
  static int64_t shared_bytes(const Problem&) { return 0; }
  static int64_t thread_bytes(const Problem&) { return 0; }
  static int64_t units(const Problem&, int) { return 0; }
  static void run(const Problem&, int, void*, void*, int64_t) {}

  static BackwardKernel kernel() { return {shared_bytes, thread_bytes, units, run}; }
};

}  // namespace fastadapt::FA_TARGET::prefix_attention
