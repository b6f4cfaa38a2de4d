// kron_linear on the GPU, forward and backward.  Free of torch.
#pragma once
#include "kron.cuh"
#include "planes.cuh"

namespace fastadapt {

struct KronLinear {
  int64_t m;
  int tile_rows;
  Rows x, other;  // other: the residual in forward, grad_y in backward; data is nullptr where there is none
  Factor s, t;
  Rule a;
  const float* bias;  // or nullptr
  float scale;
  Rank rank;
  void* out;  // y or grad_x, contiguous rows; nullptr if grad_x isn't wanted

  __device__ __forceinline__ int width_in() const { return a.from * s.features; }
  __device__ __forceinline__ int width_out() const { return a.to * t.features; }
  // Numbers of a row in rank space, before and behind the rule.
  __device__ __forceinline__ int numbers_in() const { return a.from * rank.width; }
  __device__ __forceinline__ int numbers_out() const { return a.to * rank.width; }
  // What a block keeps of a row in shared memory: `parts` times those.
  int64_t bytes(int parts) const {
    return KronTable::kBytes + (int64_t{a.from} + a.to) * rank.width * parts * static_cast<int64_t>(sizeof(float));
  }
};

inline int64_t kron_linear_forward_bytes(const KronLinear& p) { return p.bytes(1); }
inline int64_t kron_linear_backward_bytes(const KronLinear& p) { return p.bytes(2); }

// One block computes the rows of a tile of y.
template <class T>
__global__ void __launch_bounds__(kThreads, 3) kron_linear_fwd_kernel(const __grid_constant__ KronLinear p) {
  FA_DYNAMIC_SHARED(memory);
  const Groups all{1, p.m, nullptr, nullptr, nullptr};
  const Tile tile = find_tile(all, blockIdx.x, p.tile_rows);
  Shared shared{memory};
  const KronTable table(shared, p.tile_rows);
  float *z = shared.floats(p.tile_rows * p.numbers_in()), *h = shared.floats(p.tile_rows * p.numbers_out());
  const int rows = static_cast<int>(tile.end - tile.begin), features = p.t.features;
  table.fill(all, p.x, p.other, tile);

  project(z, Lines<T>(p.x, table.x, p.a.from, p.s.features), rows, p.s, 0);
  __syncthreads();
  mix<false>(h, z, rows, p.a, 0, p.rank);
  __syncthreads();

  const bool together = features % 4 == 0;
  const Lines<T> residual(p.other, table.other, p.a.to, features);
  T* y = static_cast<T*>(p.out);
  expand(h, rows, p.a.to, p.t, 0, [&](int row, int chunk, int j, float(&v)[4]) {
    const int left = features - j, column = chunk * features + j;
    float bias[4] = {}, more[4] = {};
    if (p.bias) load_quad(bias, p.bias + column, Inner{1, together}, left);
    if (p.other.data) load_quad(more, residual.of(row, chunk) + j * residual.inner.stride, residual.inner, left);
    for (int e = 0; e < 4; e++) {
      v[e] *= p.scale;
      if (p.bias) v[e] += bias[e];
      if (p.other.data) v[e] += more[e];
    }
    store_quad(y + table.row[row] * p.width_out() + column, v, together, left);
  });
}

// Planes (splits, size) in the layout of the parameters' copies, nullptr where not wanted.
struct KronLinearGradients {
  KronLinear p;    // p.other is grad_y, p.out is grad_x
  int64_t splits;  // 0: no plane is wanted, and a block takes a tile instead of a split of the rows
  float *a, *s, *t, *bias;
};

// One block takes a split of the rows, tile by tile: writes their grad_x, and the sums over them to its plane.
template <class T>
__global__ void __launch_bounds__(kThreads, 3) kron_linear_bwd_kernel(const __grid_constant__ KronLinearGradients q) {
  FA_DYNAMIC_SHARED(memory);
  const KronLinear& p = q.p;
  const Groups all{1, p.m, nullptr, nullptr, nullptr};
  Span span{static_cast<int64_t>(blockIdx.x) * p.tile_rows, least<int64_t>((blockIdx.x + int64_t{1}) * p.tile_rows, p.m)};
  if (q.splits) span = split_span(0, p.m, blockIdx.x, q.splits, 1);
  Shared shared{memory};
  const KronTable table(shared, p.tile_rows);
  float *z = shared.floats(p.tile_rows * p.numbers_in()), *h = shared.floats(p.tile_rows * p.numbers_out());
  float *grad_z = shared.floats(p.tile_rows * p.numbers_in()), *grad_h = shared.floats(p.tile_rows * p.numbers_out());
  T* grad_x = static_cast<T*>(p.out);
  const int width = p.rank.width, features = p.s.features;

  // A split without rows must still leave zeros.
#pragma unroll 1
  for (int64_t begin = span.begin; begin < span.end || (begin == span.begin && q.splits); begin += p.tile_rows) {
    const Tile tile{0, begin, least(begin + p.tile_rows, span.end)};
    const int rows = static_cast<int>(tile.end - tile.begin);
    auto plane = [&](float* data, int64_t size) {
      return Plane{data ? data + blockIdx.x * size : nullptr, begin == span.begin};
    };
    table.fill(all, p.x, p.other, tile);
    const Lines<T> x(p.x, table.x, p.a.from, features), grad_y(p.other, table.other, p.a.to, p.t.features);
    if (q.a || q.t) project(z, x, rows, p.s, 0);
    if (q.a || q.s || grad_x) project(grad_h, grad_y, rows, p.t, 0);
    __syncthreads();
    if (q.t) mix<false>(h, z, rows, p.a, 0, p.rank);
    if (q.s || grad_x) mix<true>(grad_z, grad_h, rows, p.a, 0, p.rank, p.scale);
    __syncthreads();
    if (grad_x)
      expand(grad_z, rows, p.a.from, p.s, 0, [&](int row, int chunk, int j, float(&v)[4]) {
        store_quad(grad_x + table.row[row] * p.width_in() + chunk * features + j, v, features % 4 == 0, features - j);
      });
    if (q.s)
      add_outer<false>(
          plane(q.s, divide_up(features, 4) * 4 * width), x, rows, grad_z, width, [](int64_t, float) {});
    if (q.t || q.bias) {
      const Plane bias = plane(q.bias, p.width_out());
      add_outer<true>(plane(q.t, divide_up(p.t.features, 4) * 4 * width), grad_y, rows, h, width, [&](int64_t i, float sum) {
        if (bias.data) bias.add(i, sum);
      });
    }
    add_rule(plane(q.a, static_cast<int64_t>(p.a.terms) * p.a.from * p.a.to), rows, z, grad_h, p.a, p.rank);
    __syncthreads();
  }
}

}  // namespace fastadapt
