// The tensors of a call as its kernels see them: plain memory and strides, in elements. Free of PyTorch, see types.h.
#pragma once
#include "types.h"

namespace fastadapt::cpu {

// Row i of an activation starts `offsets[i]`, or i * ld, elements behind data; its elements are `step` apart.
struct Rows {
  const void* data = nullptr;
  int64_t ld = 0, step = 1;
  const int64_t* offsets = nullptr;
};

// Element (adapter, i, j) is at data[adapter * stride_g + i * stride_0 + j * stride_1].
struct Weight {
  const void* data = nullptr;
  int64_t stride_g = 0, stride_0 = 0, stride_1 = 0;
};

// Element (adapter, i, j, k) is at data[adapter * stride_g + i * stride_0 + j * stride_1 + k * stride_2].
struct Factor {
  const void* data = nullptr;
  int64_t stride_g = 0, stride_0 = 0, stride_1 = 0, stride_2 = 0;
};

// A vector in the dtype of x, or in float32; a stride of 0 repeats a scalar.
struct Parameter {
  const void* data = nullptr;
  bool like_x = true;
  int64_t stride_g = 0, stride = 0;
};

// Consecutive rows, sorted by adapter, of one adapter, worked on by one thread; adapter -1 has no weights.
struct Segment {
  int64_t adapter, begin, end;
  bool packed = false;  // the thread's memory holds its weights already
};

}  // namespace fastadapt::cpu
