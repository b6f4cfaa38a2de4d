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

// An element of a tensor of integers of any dtype.
__device__ __forceinline__ int64_t integer_at(const void* data, int64_t offset, int bytes, int is_signed) {
  const char* p = static_cast<const char*>(data) + offset * bytes;
  if (bytes == 8) return *reinterpret_cast<const int64_t*>(p);
  if (bytes == 4) return *reinterpret_cast<const int32_t*>(p);
  if (bytes == 2) return *reinterpret_cast<const int16_t*>(p);
  if (is_signed) return *reinterpret_cast<const signed char*>(p);
  return *reinterpret_cast<const unsigned char*>(p);
}

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
