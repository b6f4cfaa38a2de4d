// How kernels see tensors: activations as rows of any strides, weights, and parameters as vectors of either dtype.
#pragma once
#include "tiles.cuh"

namespace fastadapt {

constexpr int kMaxDims = 8;

// A (..., columns) tensor as rows; leading dims that lie behind one another in memory are one dim here.
struct Rows {
  const void* data;
  Inner inner;
  int dims;
  int64_t size[kMaxDims], stride[kMaxDims];

  __device__ __forceinline__ int64_t offset(int64_t row) const {
    int64_t sum = 0;
    for (int i = dims - 1; i > 0; i--) {
      const int64_t next = row / size[i];
      sum += (row - next * size[i]) * stride[i];
      row = next;
    }
    return sum + row * stride[0];
  }
};

// A parameter per channel: of the activations' dtype or float32, any stride, one vector for each adapter of a bank.
struct Vector {
  const void* data;  // nullptr: absent
  int64_t stride, group;
  int is_float;

  template <class T>
  __device__ __forceinline__ float at(int64_t i) const {
    return is_float ? static_cast<const float*>(data)[i * stride] : to_float(static_cast<const T*>(data)[i * stride]);
  }
  template <class T>
  __device__ __forceinline__ float at(int adapter, int64_t i) const {
    const int64_t o = adapter * group + i * stride;
    return is_float ? static_cast<const float*>(data)[o] : to_float(static_cast<const T*>(data)[o]);
  }
};

// A weight matrix for each adapter, 16-byte aligned rows, in the dtype of the activations.
struct Weight {
  const void* data;
  int64_t row, group;

  template <class T>
  __device__ __forceinline__ const T* of(int adapter) const {
    return static_cast<const T*>(data) + adapter * group;
  }
};

}  // namespace fastadapt
