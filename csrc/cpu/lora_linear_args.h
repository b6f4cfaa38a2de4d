#pragma once
#include "views.h"

namespace fastadapt::lora_linear {

using namespace fastadapt::cpu;

enum Gradient { grad_x, grad_weight, grad_bias, grad_a, grad_b, grad_diagonal, grad_gain, gradients };

// The frozen product is the vendor library's; here is all that comes beside it.
struct Problem {
  int64_t m = 0, k = 0, n = 0, r = 0;
  Dtype dtype = Dtype::float32, weight_dtype = Dtype::float32;
  double scale = 1, kept_scale = 1;  // kept_scale: of what dropout leaves
  uint32_t dropped = 0;              // of 65536 elements
  uint64_t seed = 0;
  Rows x, grad_y, saved_y;
  Weight a, b;  // (r, k), (n, r)
  Parameter diagonal, gain, bias;
  void* y = nullptr;                // (m, n)
  void* u = nullptr;                // (m, r) of the compute type
  bool wants[gradients] = {};
  void* grads[gradients] = {};
  void* scaled_grad_y = nullptr;    // (m, n): gain * grad_y, where the vendor's products need it
};

struct Sizes {
  int64_t thread, partial;  // bytes; one `partial` a segment
};

// The entry points of one instruction set and one pair of dtypes. All memory comes from the caller, 64-byte aligned.
struct Kernel {
  Sizes (*sizes)(const Problem&);
  // u, and y = (u * scale * diagonal) @ b.T, plus bias where there is no gain: what the frozen product is added to.
  void (*forward)(const Problem&, void* thread, int64_t begin, int64_t end);
  // y = gain * y + bias, after the frozen product.
  void (*finish)(const Problem&, int64_t begin, int64_t end);
  // grad_x = dropout(grad_u @ a), what the frozen product is added to; and the sums over one segment of the rows.
  void (*backward)(const Problem&, void* thread, const Segment&, void* partial);
  // Adds what the segments left, in order, and writes the gradients of the parameters: the share `part` of `parts`.
  void (*reduce)(const Problem&, void* partials, int64_t segments, int64_t part, int64_t parts);
};

}  // namespace fastadapt::lora_linear
