#pragma once
#include "views.h"

namespace fastadapt::lora_linear {

using namespace fastadapt::cpu;

enum Gradient { grad_x, grad_weight, grad_bias, grad_a, grad_b, grad_diagonal, grad_gain, gradients };

// The frozen product is the vendor library's, or `product`; here is all that comes beside it, too. Rows are worked on in the
// order of their adapters: position i is row order[i], or row i where there is no bank.
struct Problem {
  int64_t m = 0, k = 0, n = 0, r = 0;
  Dtype dtype = Dtype::float32, weight_dtype = Dtype::float32;
  bool backward = false, joined = false;  // joined: `product` makes the branch's part of z and grad_x, too
  double scale = 1, kept_scale = 1;       // kept_scale: of what dropout leaves
  uint32_t dropped = 0;                   // of 65536 elements
  uint64_t seed = 0;
  const int64_t* order = nullptr;
  Rows x, grad_y, saved_z;
  Weight weight, a, b;               // (n, k), (r, k), (n, r), or banks of the latter two
  Parameter diagonal, gain, bias;    // (r,) or a bank of it, (n,), (n,)
  void *y = nullptr, *z = nullptr;   // (m, n): y, and y before gain and bias; the same memory where z isn't kept
  void* u = nullptr;                 // (m, r) of the compute type, by rows
  void *t = nullptr, *v = nullptr;   // (m, r) of the compute type, by positions: (gain * grad_y) @ b, and u
  bool wants[gradients] = {};
  void* grads[gradients] = {};
  void* scaled_grad_y = nullptr;     // (m, n): gain * grad_y, where the vendor's products need it
};

// The entry points of one instruction set and one pair of dtypes. All memory comes from the caller, 64-byte aligned.
struct Kernel {
  int64_t (*thread_bytes)(const Problem&);
  // By rows, those of a segment: u in forward, t and v in backward.
  void (*project)(const Problem&, void* thread, const Segment&);
  // Columns [begin, end) of z = (u * scale * diagonal) @ b.T, plus bias where there is no gain. The frozen product is added.
  void (*expand)(const Problem&, void* thread, const Segment&, int64_t begin, int64_t end);
  // y = gain * z + bias, after the frozen product.
  void (*finish)(const Problem&, int64_t begin, int64_t end);
  // By columns, the share `part` of `parts` of them: the gradients of the parameters, and dropout((t * scale * diagonal) @ a),
  // what the frozen product of grad_x is added to, unless they are joined. A segment has all rows of its adapter.
  void (*gradients)(const Problem&, void* thread, const Segment*, int64_t segments, int64_t part, int64_t parts);
  // The share `part` of `parts` of the frozen product and all that follows it: z and y, or grad_x. It is added to what is there
  // unless it is joined. Null where it is the vendor's.
  void (*product)(const Problem&, void* thread, int64_t part, int64_t parts) = nullptr;
  // y = the norms of the rows [begin, end) of x + b @ a, for an x of (m, k), a b of (m, r) without gaps, and weights of the
  // compute type; null for others.
  int64_t (*norms_bytes)(const Problem&) = nullptr;
  void (*norms)(const Problem&, void* thread, int64_t begin, int64_t end) = nullptr;
};

}  // namespace fastadapt::lora_linear
