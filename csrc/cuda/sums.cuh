// Sums in a fixed order: of the rows of a span, of planes, of a block's threads.
#pragma once
#include "rows.cuh"

namespace fastadapt {

struct Span {
  int64_t begin, end;
};

// One split of [begin, end), in steps of `step`.
__device__ __forceinline__ Span split_span(int64_t begin, int64_t end, int64_t split, int64_t splits, int step) {
  const int64_t rows = divide_up(divide_up(end - begin, splits), step) * step;
  return Span{least(begin + split * rows, end), least(begin + (split + 1) * rows, end)};
}

// The two sums of f(position) over the span, as sums of sums like those in multiply.
template <class F>
__device__ __forceinline__ float2 sum_rows(Span span, F f) {
  float2 sum{0.f, 0.f};
  for (int64_t begin = span.begin; begin < span.end; begin += 32) {
    float2 part[4] = {};
    for (int step = 0; step < 32; step += 4)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        if (begin + step + i >= span.end) break;
        const float2 v = f(begin + step + i);
        part[i].x += v.x, part[i].y += v.y;
      }
    sum.x += (part[0].x + part[1].x) + (part[2].x + part[3].x);
    sum.y += (part[0].y + part[1].y) + (part[2].y + part[3].y);
  }
  return sum;
}

__device__ __forceinline__ float add_planes(const float* planes, int64_t splits, int64_t stride) {
  float sum = 0.f;
#pragma unroll 4
  for (int64_t s = 0; s < splits; s++) sum += planes[s * stride];
  return sum;
}

__device__ __forceinline__ float sum_warp(float v) {
  for (int o = 16; o; o /= 2) v += __shfl_xor_sync(0xffffffffu, v, o);
  return v;
}

// The sum of v over the threads of a block, for all of them; `shared` holds a number a warp.
__device__ __forceinline__ float sum_block(float v, float* shared) {
  v = sum_warp(v);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
  __syncthreads();
  float sum = 0.f;
  for (int i = 0; i < kWarps; i++) sum += shared[i];
  return sum;
}

template <class T>
__device__ __forceinline__ void store_gradient(void* out, int is_float, int64_t i, float v) {
  if (is_float) static_cast<float*>(out)[i] = v;
  else static_cast<T*>(out)[i] = from_float<T>(v);
}

}  // namespace fastadapt
