// adapter_fusion on the GPU: each row weighs what g adapters give for it by a softmax of their products with its query.  Free of
// torch.
//
// A warp takes a row, a block one that is wide: which of the two depends on d alone, and no row's bits on the other rows.  A
// thread has the same columns throughout.  What it loads of keys that are the values too it keeps in shared memory, if that
// leaves room for another block, and reads back for the sum; else the sum finds it in a cache.
#pragma once
#include <cstring>

#include "sums.cuh"

namespace fastadapt {

constexpr int kMostAdapters = 3000;  // whose numbers fit into the shared memory of any GPU
constexpr int kTogether = 4;         // adapters whose loads are under way at once

// A (..., d) tensor for each adapter.
struct Adapters {
  Rows rows;
  int64_t stride;  // from one to the next
};

struct AdapterFusion {
  int64_t m, d;
  int g, row_threads;  // a warp or a block
  int staged;          // whether keys stay in shared memory
  Rows query;
  Adapters keys, values;  // values: the keys, where there are no others
  Vector scale;
  float scale_value;

  template <class T>
  __device__ __forceinline__ float scale_at() const {
    return scale.data ? scale.at<T>(0) : scale_value;
  }
};

// Neighbours in a row that are loaded and stored at once, packed: 16-bit numbers apart would take a register each.
template <class T>
struct Chunk {
  static constexpr int kSize = Shape<T>::kVector;
  uint4 words;

  __device__ __forceinline__ void pack(const T (&elements)[kSize]) { memcpy(&words, elements, sizeof(words)); }
  __device__ __forceinline__ void unpack(float (&v)[kSize]) const {
    T elements[kSize];
    memcpy(elements, &words, sizeof(words));
#pragma unroll
    for (int e = 0; e < kSize; e++) v[e] = to_float(elements[e]);
  }
};

// Columns column.. of a row of d; those that don't exist are zero.
template <class T>
__device__ __forceinline__ Chunk<T> load_chunk(const T* row, Inner inner, int64_t column, int64_t d) {
  constexpr int kSize = Chunk<T>::kSize;
  const int valid = static_cast<int>(least<int64_t>(d - column, kSize));
  row += column * inner.stride;
  if (inner.vector && valid == kSize) return Chunk<T>{*reinterpret_cast<const uint4*>(row)};
  T elements[kSize];
#pragma unroll
  for (int e = 0; e < kSize; e++) elements[e] = e < valid ? row[e * inner.stride] : from_float<T>(0.f);
  Chunk<T> chunk;
  chunk.pack(elements);
  return chunk;
}

// Stores columns column.. of a row of d that lie side by side.
template <class T, int SIZE>
__device__ __forceinline__ void store_chunk(T* row, const float (&v)[SIZE], int64_t column, int64_t d) {
  T elements[SIZE];
#pragma unroll
  for (int e = 0; e < SIZE; e++) elements[e] = from_float<T>(v[e]);
  if (d % SIZE == 0) {
    Chunk<T> chunk;
    chunk.pack(elements);
    *reinterpret_cast<uint4*>(row + column) = chunk.words;
  } else {
#pragma unroll
    for (int e = 0; e < SIZE; e++)
      if (column + e < d) row[column + e] = elements[e];
  }
}

// A thread among those of its row.
template <class T>
struct FusionRow {
  static constexpr int kSize = Chunk<T>::kSize;
  const AdapterFusion& p;
  const int warp, lane, thread;  // the warp in its block, the thread in its row
  const int64_t index;
  float* block_sums;       // a number a warp
  float *dots, *factors;   // (warps, g): what each warp finds of its row's products; its own copy of what they become
  Chunk<T>* const staged;  // (steps, g, threads)

  __device__ __forceinline__ FusionRow(const AdapterFusion& p, unsigned char* shared)
      : p(p), warp(threadIdx.x / 32), lane(threadIdx.x % 32), thread(threadIdx.x % p.row_threads),
        index(blockIdx.x * static_cast<int64_t>(kThreads / p.row_threads) + threadIdx.x / p.row_threads),
        block_sums(reinterpret_cast<float*>(shared)), dots(block_sums + kWarps), factors(dots + kWarps * p.g),
        staged(reinterpret_cast<Chunk<T>*>(factors + kWarps * p.g)) {}

  __device__ __forceinline__ const T* of(const Rows& rows) const {
    return static_cast<const T*>(rows.data) + rows.offset(index);
  }

  // Calls f(column, step) for the first columns of this thread's chunks.
  template <class F>
  __device__ __forceinline__ void for_columns(F f) const {
    int step = 0;
#pragma unroll 1
    for (int64_t column = thread * kSize; column < p.d; column += p.row_threads * kSize) f(column, step++);
  }
  __device__ __forceinline__ Chunk<T>& stage(int step, int i) const {
    return staged[(step * p.g + i) * kThreads + threadIdx.x];
  }

  // The products of a row of x with those of the adapters, for `dot`.
  __device__ __forceinline__ void multiply(const Rows& x, const Adapters& adapters, bool keep) const {
    const T *row = of(x), *rows = of(adapters.rows);
#pragma unroll 1
    for (int first = 0; first < p.g; first += kTogether) {
      float sum[kTogether] = {};
      for_columns([&](int64_t column, int step) {
        Chunk<T> others[kTogether];
#pragma unroll
        for (int i = 0; i < kTogether; i++)
          if (first + i < p.g)
            others[i] = load_chunk(rows + (first + i) * adapters.stride, adapters.rows.inner, column, p.d);
        float own[kSize], other[kSize];
        load_chunk(row, x.inner, column, p.d).unpack(own);
#pragma unroll
        for (int i = 0; i < kTogether; i++) {
          if (first + i >= p.g) break;
          others[i].unpack(other);
          float part = 0.f;
#pragma unroll
          for (int e = 0; e < kSize; e++) part += own[e] * other[e];
          sum[i] += part;
          if (keep) stage(step, first + i) = others[i];
        }
      });
#pragma unroll
      for (int i = 0; i < kTogether; i++) {
        if (first + i >= p.g) break;
        sum[i] = sum_warp(sum[i]);
        if (lane == 0) dots[warp * p.g + first + i] = sum[i];
      }
    }
    if (p.row_threads == 32) __syncwarp();
    else __syncthreads();
  }
  __device__ __forceinline__ float dot(int i) const {
    if (p.row_threads == 32) return dots[warp * p.g + i];
    float sum = dots[i];
#pragma unroll
    for (int w = 1; w < kWarps; w++) sum += dots[w * p.g + i];
    return sum;
  }

  // Calls f(i, factor) for the adapters of this lane; f changes the factors, which `weigh` of any lane may then read.
  template <class F>
  __device__ __forceinline__ void for_factors(F f) const {
    for (int i = lane; i < p.g; i += 32) f(i, factors[warp * p.g + i]);
  }

  // Calls f(column, sum) for this thread's columns of the sum of factors[i] * adapters[i].
  template <class F>
  __device__ __forceinline__ void weigh(const Adapters& adapters, bool kept, F f) const {
    const T* rows = of(adapters.rows);
    const float* factor = factors + warp * p.g;
    for_columns([&](int64_t column, int step) {
      float sum[kSize] = {}, v[kSize];
#pragma unroll 1
      for (int first = 0; first < p.g; first += kTogether) {
        Chunk<T> chunks[kTogether];
#pragma unroll
        for (int i = 0; i < kTogether; i++)
          if (first + i < p.g)
            chunks[i] = kept ? stage(step, first + i)
                             : load_chunk(rows + (first + i) * adapters.stride, adapters.rows.inner, column, p.d);
#pragma unroll
        for (int i = 0; i < kTogether; i++) {
          if (first + i >= p.g) break;
          chunks[i].unpack(v);
#pragma unroll
          for (int e = 0; e < kSize; e++) sum[e] += factor[first + i] * v[e];
        }
      }
      f(column, sum);
    });
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, 8)
    adapter_fusion_fwd_kernel(const __grid_constant__ AdapterFusion p, T* y, float* weights) {
  FA_DYNAMIC_SHARED(shared);
  const FusionRow<T> row(p, shared);
  if (row.index >= p.m) return;
  row.multiply(p.query, p.keys, p.staged);

  const float scale = p.scale_at<T>();
  float top = -INFINITY, sum = 0.f;
  row.for_factors([&](int i, float& factor) { top = fmaxf(top, factor = scale * row.dot(i)); });
  for (int o = 16; o; o /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, o));
  // A NaN among the scores reaches all weights here, whatever fmaxf made of it.
  row.for_factors([&](int, float& factor) { sum += factor = expf(factor - top); });
  sum = sum_warp(sum);
  row.for_factors([&](int i, float& factor) {
    factor /= sum;
    if (row.thread < 32) weights[row.index * p.g + i] = factor;
  });
  __syncwarp();
  row.weigh(p.values, p.staged, [&](int64_t column, const float(&v)[Chunk<T>::kSize]) {
    store_chunk(y + row.index * p.d, v, column, p.d);
  });
}

// Gradients are contiguous, nullptr where not wanted.
template <class T>
struct FusionGradients {
  AdapterFusion p;
  Rows grad_y;
  const float* weights;  // (m, g)
  T *query, *keys, *values;
  float* scale;     // a part for each block
  int shares_keys;  // values are the keys
};

// With u the gradient of the scores, scale * u[i] * query is that of keys[i], and scale * s that of the query, where s is the sum
// of u[i] * keys[i].  The gradient of the scale, the sum of u[i] * <query, keys[i]>, is then <query, s>: no second product.
template <class T>
__global__ void __launch_bounds__(kThreads, 6) adapter_fusion_bwd_kernel(const __grid_constant__ FusionGradients<T> q) {
  FA_DYNAMIC_SHARED(shared);
  const AdapterFusion& p = q.p;
  const FusionRow<T> row(p, shared);
  constexpr int kSize = Chunk<T>::kSize;
  float grad_scale = 0.f;
  if (row.index < p.m) {
    const float scale = p.scale_at<T>();
    const float *weights = q.weights + row.index * p.g, *factors = row.factors + row.warp * p.g;
    const T *query_row = row.of(p.query), *grad_row = row.of(q.grad_y);
    if (q.query || q.keys || q.scale) {
      row.multiply(q.grad_y, p.values, p.staged);
      float mean = 0.f;
      row.for_factors([&](int i, float& factor) { mean += weights[i] * (factor = row.dot(i)); });
      mean = sum_warp(mean);
      row.for_factors([&](int i, float& factor) { factor = weights[i] * (factor - mean); });
      __syncwarp();
    }
    if (q.query || q.scale)
      row.weigh(p.keys, p.staged, [&](int64_t column, float(&v)[kSize]) {
        if (q.scale) {
          float query[kSize];
          load_chunk(query_row, p.query.inner, column, p.d).unpack(query);
#pragma unroll
          for (int e = 0; e < kSize; e++) grad_scale += query[e] * v[e];
        }
        if (!q.query) return;
#pragma unroll
        for (int e = 0; e < kSize; e++) v[e] *= scale;
        store_chunk(q.query + row.index * p.d, v, column, p.d);
      });
    if (q.keys || q.values)
      row.for_columns([&](int64_t column, int) {
        float query[kSize] = {}, grad_y[kSize] = {};
        if (q.keys) load_chunk(query_row, p.query.inner, column, p.d).unpack(query);
        if (q.values || q.shares_keys) load_chunk(grad_row, q.grad_y.inner, column, p.d).unpack(grad_y);
#pragma unroll 1
        for (int i = 0; i < p.g; i++) {
          const int64_t at = (i * p.m + row.index) * p.d;
          float key[kSize], value[kSize];
#pragma unroll
          for (int e = 0; e < kSize; e++) value[e] = weights[i] * grad_y[e];
          if (q.values) store_chunk(q.values + at, value, column, p.d);
          if (!q.keys) continue;
#pragma unroll
          for (int e = 0; e < kSize; e++) {
            key[e] = scale * factors[i] * query[e];
            if (q.shares_keys) key[e] += value[e];
          }
          store_chunk(q.keys + at, key, column, p.d);
        }
      });
  }
  if (!q.scale) return;
  const float sum = sum_block(grad_scale, row.block_sums);
  if (threadIdx.x == 0) q.scale[blockIdx.x] = sum;
}

// One block adds the parts of the gradient of the scale.
template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    adapter_fusion_bwd_scale_kernel(const float* parts, int64_t count, void* out, int is_float) {
  FA_DYNAMIC_SHARED(shared);
  const Span span{0, count > threadIdx.x ? divide_up(count - threadIdx.x, kThreads) : 0};
  const float2 own = sum_rows(span, [&](int64_t i) { return float2{parts[i * kThreads + threadIdx.x], 0.f}; });
  const float sum = sum_block(own.x, reinterpret_cast<float*>(shared));
  if (threadIdx.x == 0) store_gradient<T>(out, is_float, 0, sum);
}

}  // namespace fastadapt
