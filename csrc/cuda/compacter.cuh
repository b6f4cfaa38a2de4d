// compacter on the GPU.  Free of torch.
#pragma once
#include "activation.cuh"
#include "kron.cuh"

namespace fastadapt {

struct Compacter {
  int64_t m;
  int n, r, tile_rows;
  Rows x, other;  // other: the residual in forward, grad_y in backward; data is nullptr where there is none
  Factor down_s, down_t, up_s, up_t;  // down_t and up_s with their lines in order
  Rule down_a, up_a;
  const float *down_bias, *up_bias;  // (g, r) and (g, d), or nullptr
  Vector scale;
  float scale_value;
  int activation, add_x;
  Rank rank;
  Groups groups;
  void* out;  // y or grad_x, contiguous rows; nullptr if grad_x isn't wanted

  __device__ __forceinline__ int d() const { return n * down_s.features; }
  template <class T>
  __device__ __forceinline__ float scale_at() const {
    return scale.data ? scale.at<T>(0) : scale_value;
  }
  // Numbers of a row in rank space: of all its chunks, `width` each.
  __device__ __forceinline__ int numbers() const { return n * rank.width; }
  // What a block keeps of a row in shared memory: `parts` times those, and elements of the bottleneck.
  int64_t bytes(int parts, int hidden) const {
    const int64_t numbers = int64_t{n} * rank.width * parts + int64_t{r} * hidden;
    return KronTable::kBytes + numbers * static_cast<int64_t>(sizeof(float));
  }
};

// Element j of a chunk of the bottleneck: the sum of in[k] * factor[j][k] over the rank.
__device__ __forceinline__ float widen(const float* in, const float* line, int width) {
  float sum[4] = {};
  for (int k = 0; k < width; k += 4) {
    const float4 v = four(in + k), w = four(line + k);
    sum[0] += v.x * w.x, sum[1] += v.y * w.y, sum[2] += v.z * w.z, sum[3] += v.w * w.w;
  }
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// Calls f(i, row, chunk, j) for the elements of the bottleneck of `rows` rows.
template <class F>
__device__ __forceinline__ void for_bottleneck(const Compacter& p, int rows, F f) {
  const int chunk = p.r / p.n;
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * p.r; i += kThreads) f(i, i / p.r, i % p.r / chunk, i % chunk);
}

// out[line][k] = the sum of in[line][j] * factor[j][k] over the elements of a chunk of the bottleneck.
__device__ __forceinline__ void narrow(
    float* out, const float* in, const Compacter& p, int rows, const Factor& factor, int adapter) {
  const int chunk = p.r / p.n, width = p.rank.width;
  const float* weights = factor.of(adapter);
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * p.numbers(); i += kThreads) {
    const float *values = in + i / width * chunk, *column = weights + i % width;
    float sum = 0.f;
    for (int j = 0; j < chunk; j++) sum += values[j] * column[j * width];
    out[i] = sum;
  }
}

inline int64_t compacter_forward_bytes(const Compacter& p) { return p.bytes(2, 1); }

// One block computes the rows of a tile of y.  Only rank space stays in shared memory; x is read again as the residual, from
// the cache.
template <class T>
__global__ void __launch_bounds__(kThreads, 3) compacter_fwd_kernel(const __grid_constant__ Compacter p) {
  FA_DYNAMIC_SHARED(memory);
  const Tile tile = find_tile(p.groups, blockIdx.x, p.tile_rows);
  if (tile.begin >= tile.end) return;
  Shared shared{memory};
  const KronTable table(shared, p.tile_rows);
  float *z = shared.floats(p.tile_rows * p.numbers()), *h = shared.floats(p.tile_rows * p.numbers());
  float* hidden = shared.floats(p.tile_rows * p.r);
  const int rows = static_cast<int>(tile.end - tile.begin), adapter = tile.adapter;
  const Rows* residual = p.other.data ? &p.other : p.add_x ? &p.x : nullptr;
  const int64_t* offset = p.other.data ? table.other : table.x;
  T* y = static_cast<T*>(p.out);
  if (adapter >= p.groups.g)
    return pass_rows(y, p.groups, tile.begin, tile.end, p.d(), adapter > p.groups.g, residual);

  table.fill(p.groups, p.x, p.other, tile);
  project(z, Lines<T>(p.x, table.x, p.n, p.down_s.features), rows, p.down_s, adapter);
  __syncthreads();
  mix<false>(h, z, rows, p.down_a, adapter, p.rank);
  __syncthreads();
  for_bottleneck(p, rows, [&](int i, int row, int chunk, int j) {
    float v = widen(h + (row * p.n + chunk) * p.rank.width, p.down_t.of(adapter) + j * p.rank.width, p.rank.width);
    if (p.down_bias) v += p.down_bias[static_cast<int64_t>(adapter) * p.r + i % p.r];
    hidden[i] = activate(p.activation, v);
  });
  __syncthreads();
  narrow(z, hidden, p, rows, p.up_s, adapter);
  __syncthreads();
  mix<false>(h, z, rows, p.up_a, adapter, p.rank);
  __syncthreads();

  const float scale = p.scale_at<T>();
  const int features = p.up_t.features;
  const bool together = features % 4 == 0;
  const Lines<T> extra(residual ? *residual : p.x, offset, p.n, features);
  const float* bias = p.up_bias ? p.up_bias + static_cast<int64_t>(adapter) * p.d() : nullptr;
  expand(h, rows, p.n, p.up_t, adapter, [&](int row, int chunk, int j, float(&v)[4]) {
    const int left = features - j, column = chunk * features + j;
    float more[4] = {};
    if (bias) {
      load_quad(more, bias + column, Inner{1, together}, left);
      for (int e = 0; e < 4; e++) v[e] += more[e];
    }
    if (residual) load_quad(more, extra.of(row, chunk) + j * extra.inner.stride, extra.inner, left);
    for (int e = 0; e < 4; e++) v[e] = residual ? scale * v[e] + more[e] : scale * v[e];
    store_quad(y + table.row[row] * p.d() + column, v, together, left);
  });
}

}  // namespace fastadapt
