// A call of adapter_fusion as its kernels see it: plain memory and strides, in elements. Free of PyTorch, see types.h.
#pragma once
#include "views.h"

namespace fastadapt::adapter_fusion {

using namespace fastadapt::cpu;

enum Gradient { grad_query, grad_keys, grad_values, grad_scale, gradients };

// What g adapters give: activations of the same strides, `stride` elements apart.
struct Stack {
  Rows rows;
  int64_t stride = 0;
};

struct Problem {
  int64_t m = 0, g = 0, d = 0;
  Dtype dtype = Dtype::float32;
  double scale_value = 1;
  Parameter scale;  // in place of scale_value, unless its data is null
  Rows query, grad_y;
  Stack keys, values;  // values are those of the keys where they are the same tensor
  bool shared = false;
  void* y = nullptr;        // (m, d), contiguous
  void* weights = nullptr;  // (m, g), contiguous, of the compute type
  bool wants[gradients] = {};
  void* grads[gradients] = {};  // contiguous
};

// The entry points of one instruction set and one dtype, over rows [begin, end).
struct Kernel {
  int64_t (*thread_bytes)(const Problem&);
  void (*forward)(const Problem&, void* thread, int64_t begin, int64_t end);
  // Returns the rows' share of the gradient of the scale.
  double (*backward)(const Problem&, void* thread, int64_t begin, int64_t end);
  void (*write_grad_scale)(const Problem&, double value);
};

}  // namespace fastadapt::adapter_fusion
