// The calls of compacter and kron_linear: their kernels by instruction set, and their steps on threads.
#pragma once
#include "arguments.h"
#include "kron_args.h"
#include "pieces.h"
#include "scratch.h"
#include "target.h"

namespace fastadapt::kron {

// Rows below which a thread, or a sum of weight gradients, has too little to do.
constexpr int64_t chunk_rows = 32;

// Multiplications that take as long as an element of a row on its way from or to memory.
constexpr int64_t memory_work = 8;

// Partial sums below which waking a thread takes longer than adding them.
constexpr int64_t reduce_bytes = 128 << 10;

// Cuts the rows of a call, which cost `work` multiplications. The chunks of backward, each with sums of its own, must not
// depend on the number of threads: then neither do the bits.
inline int64_t divide(Call& call, int64_t work, const std::vector<int64_t>* adapters, Division& rows) {
  int64_t chunks = 1;
  while (call.backward && chunks < 16 && call.m >= chunks * 2 * chunk_rows) chunks *= 2;
  const int64_t parts = useful_parts(call.backward ? 3 * work : work, call.backward ? chunks : std::max<int64_t>(1, call.m));
  rows.divide(call.m, call.backward ? chunks : parts, call.g, adapters);
  if (adapters) call.order = rows.order.data();
  return parts;
}

template <class Problem>
void run(const Problem& p, const Kernel<Problem>& k, const Division& rows, int64_t parts) {
  const auto& segments = rows.segments;
  const int64_t thread = k.thread_bytes(p), partial = p.backward ? k.partial_bytes(p) : 0, count = segments.size();
  ScratchMemory memory(parts * thread + count * partial);
  char* const partials = memory.data() + parts * thread;
  rows.each_segment(parts, [&](int64_t part, int64_t i, const Segment& s) {
    if (p.backward)
      k.backward(p, memory.data() + part * thread, s, partials + i * partial);
    else
      k.forward(p, memory.data() + part * thread, s);
  });
  if (!p.backward) return;
  if (count > 1 && partial) {
    const int64_t adders = std::min(parts, 1 + count * partial / reduce_bytes);
    each_part(adders, [&](int64_t part) { k.reduce(p, segments.data(), count, partials, part, adders); });
  }
  k.finish(p, memory.data(), segments.data(), count, partials);
}

}  // namespace fastadapt::kron
