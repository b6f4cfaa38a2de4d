// What the kernels of sums of Kronecker products have in common, compacter and kron_linear.
#pragma once
#include "views.h"

namespace fastadapt::kron {

using namespace fastadapt::cpu;

// A row of an activation as `chunks` chunks of `width` elements.
struct Shape {
  int64_t chunks = 0, width = 0;
};

// Of every problem: rows, their order by adapter (null: as they come), dtypes, banks.
struct Call {
  int64_t m = 0, g = 1;
  bool bank = false, backward = false;
  Dtype dtype = Dtype::float32, weight_dtype = Dtype::float32;
  const int64_t* order = nullptr;
};

// The entry points of one instruction set and one compute type. All memory comes from the caller, 64-byte aligned.
template <class Problem>
struct Kernel {
  int64_t (*thread_bytes)(const Problem&);
  int64_t (*partial_bytes)(const Problem&);  // one partial a segment
  void (*forward)(const Problem&, void* thread, const Segment&);
  void (*backward)(const Problem&, void* thread, const Segment&, void* partial);
  // Adds the partials of each adapter in order, the share `part` of `parts` of their elements, into its first.
  void (*reduce)(const Problem&, const Segment*, int64_t segments, void* partials, int64_t part, int64_t parts);
  // Writes the gradients of the parameters.
  void (*finish)(const Problem&, void* thread, const Segment*, int64_t segments, void* partials);
};

}  // namespace fastadapt::kron
