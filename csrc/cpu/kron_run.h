// The calls of compacter and kron_linear: their kernels by instruction set, and their steps on threads.
#pragma once
#include <array>
#include <tuple>

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

// The gradients of a call: empty where they aren't wanted, zero where no row would write them.
template <size_t N>
std::array<Tensor, N> gradients_of(const char* op, const Tensor& x, const Optional (&inputs)[N],
                                   const std::vector<bool>& output_mask, bool zero, bool* wants, void** data) {
  FA_CHECK(output_mask.size() == N, op, ": output_mask must have ", N, " entries, got ", output_mask.size());
  std::array<Tensor, N> grads;
  const int64_t none = 0;
  for (size_t i = 0; i < N; ++i) {
    wants[i] = output_mask[i];
    FA_CHECK(!wants[i] || inputs[i], op, ": output_mask[", i, "] asks for the gradient of an argument that is None");
    grads[i] = wants[i] ? empty(inputs[i]->sizes(), *inputs[i]) : empty({&none, 1}, x);
    data[i] = grads[i].mutable_data_ptr();
    if (!wants[i] || !zero || !grads[i].numel()) continue;
    const Dtype dtype = dtype_of(grads[i].scalar_type());
    memset(data[i], 0, grads[i].numel() * (dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2));
  }
  return grads;
}

}  // namespace fastadapt::kron
