// compacter backward: grad_x, and the planes of the parameters' gradients.
#pragma once
#include "compacter.cuh"
#include "planes.cuh"

namespace fastadapt {

// Planes (splits, g, size) in the layout of the parameters' copies, nullptr where not wanted.
struct CompacterGradients {
  Compacter p;     // p.other is grad_y, p.out is grad_x
  int64_t splits;  // 0: no plane is wanted, and a block takes a tile instead of a split of an adapter's rows
  float *down_a, *down_s, *down_t, *up_a, *up_s, *up_t, *down_bias, *up_bias;
  float* scale;  // (splits, g)
};

inline int64_t compacter_backward_bytes(const Compacter& p) { return p.bytes(8, 2); }

// factor[j][k] = the sum of wide[line][j] * values[line][k] over the lines, for a factor of the bottleneck.
__device__ __forceinline__ void add_narrow(
    const Plane& plane, const Compacter& p, int rows, const float* wide, const float* values) {
  if (!plane.data) return;
  const int chunk = p.r / p.n, width = p.rank.width;
#pragma unroll 1
  for (int i = threadIdx.x; i < chunk * width; i += kThreads) {
    const float *element = wide + i / width, *column = values + i % width;
    float sum = 0.f;
    for (int line = 0; line < rows * p.n; line++) sum += element[line * chunk] * column[line * width];
    plane.add(i, sum);
  }
}

// One block takes a split of an adapter's rows, tile by tile: writes their grad_x, and the sums over them to its plane.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) compacter_bwd_kernel(const __grid_constant__ CompacterGradients q) {
  FA_DYNAMIC_SHARED(memory);
  const Compacter& p = q.p;
  Tile all = q.splits ? Tile{static_cast<int>(blockIdx.x / q.splits), 0, 0} : find_tile(p.groups, blockIdx.x, p.tile_rows);
  const int adapter = all.adapter, width = p.rank.width, numbers = p.numbers(), features = p.down_s.features;
  if (q.splits) {
    const Span span = split_rows(p.groups, adapter, blockIdx.x % q.splits, q.splits, 1);
    all.begin = span.begin, all.end = span.end;
  }
  T* grad_x = static_cast<T*>(p.out);
  if (adapter >= p.groups.g) {
    if (grad_x)
      pass_rows(grad_x, p.groups, all.begin, all.end, p.d(), adapter > p.groups.g, p.add_x ? &p.other : nullptr);
    return;
  }
  Shared shared{memory};
  const KronTable table(shared, p.tile_rows);
  const int part = p.tile_rows * numbers;
  float *z = shared.floats(8 * part), *h = z + part, *z_up = z + 2 * part, *h_up = z + 3 * part;
  float *grad_z = z + 4 * part, *grad_h = z + 5 * part, *grad_z_up = z + 6 * part, *grad_h_up = z + 7 * part;
  float *hidden = shared.floats(p.tile_rows * p.r), *grad_v = shared.floats(p.tile_rows * p.r);
  const float* bias = p.up_bias ? p.up_bias + static_cast<int64_t>(adapter) * p.d() : nullptr;
  const int64_t index = blockIdx.x % (q.splits ? q.splits : 1) * p.groups.g + adapter;
  auto plane = [&](float* data, int64_t size, bool first) {
    return Plane{data ? data + index * size : nullptr, first};
  };
  float grad_scale = 0.f;

  // A split without rows must still leave zeros.
#pragma unroll 1
  for (int64_t begin = all.begin; begin < all.end || (begin == all.begin && q.splits); begin += p.tile_rows) {
    const Tile tile{adapter, begin, least(begin + p.tile_rows, all.end)};
    const int rows = static_cast<int>(tile.end - tile.begin);
    const bool first = begin == all.begin;
    table.fill(p.groups, p.x, p.other, tile);
    const Lines<T> x(p.x, table.x, p.n, features), grad_y(p.other, table.other, p.n, features);
    project(z, x, rows, p.down_s, adapter);
    project(grad_h_up, grad_y, rows, p.up_t, adapter);  // without the factor scale, which may be zero
    __syncthreads();
    mix<false>(h, z, rows, p.down_a, adapter, p.rank);
    mix<true>(grad_z_up, grad_h_up, rows, p.up_a, adapter, p.rank, p.scale_at<T>());
    __syncthreads();
    for_bottleneck(p, rows, [&](int i, int row, int chunk, int j) {
      const int line = (row * p.n + chunk) * width;
      float v = widen(h + line, p.down_t.of(adapter) + j * width, width);
      if (p.down_bias) v += p.down_bias[static_cast<int64_t>(adapter) * p.r + i % p.r];
      const float grad = widen(grad_z_up + line, p.up_s.of(adapter) + j * width, width);
      hidden[i] = activate(p.activation, v);
      // relu selects: where it is 0, NaN and infinity end, as in PyTorch.
      grad_v[i] = p.activation == 0 ? (v <= 0.f ? 0.f : grad) : grad * activate_gradient(p.activation, v);
    });
    __syncthreads();
    narrow(z_up, hidden, p, rows, p.up_s, adapter);
    narrow(grad_h, grad_v, p, rows, p.down_t, adapter);
    __syncthreads();
    mix<false>(h_up, z_up, rows, p.up_a, adapter, p.rank);
    mix<true>(grad_z, grad_h, rows, p.down_a, adapter, p.rank);
    __syncthreads();

    if (grad_x)
      expand(grad_z, rows, p.n, p.down_s, adapter, [&](int row, int chunk, int j, float(&v)[4]) {
        const int left = features - j;
        float more[4];
        if (p.add_x) {
          load_quad(more, grad_y.of(row, chunk) + j * grad_y.inner.stride, grad_y.inner, left);
          for (int e = 0; e < 4; e++) v[e] += more[e];
        }
        store_quad(grad_x + table.row[row] * p.d() + chunk * features + j, v, features % 4 == 0, left);
      });
    const int64_t lines = divide_up(features, 4) * 4, bottleneck = static_cast<int64_t>(p.r / p.n) * width;
    const int64_t rule = static_cast<int64_t>(p.n) * p.n * p.n;
    if (q.down_s)
      add_outer<false>(plane(q.down_s, lines * width, first), x, rows, grad_z, width, [](int64_t, float) {});
    if (q.up_t || q.up_bias || (q.scale && bias)) {
      const Plane sums = plane(q.up_bias, p.d(), first);
      add_outer<true>(plane(q.up_t, lines * width, first), grad_y, rows, h_up, width, [&](int64_t i, float sum) {
        if (sums.data) sums.add(i, sum);
        if (bias) grad_scale += bias[i] * sum;
      });
    }
    add_narrow(plane(q.down_t, bottleneck, first), p, rows, grad_v, h);
    add_narrow(plane(q.up_s, bottleneck, first), p, rows, hidden, grad_z_up);
    add_rule(plane(q.down_a, rule, first), rows, z, grad_h, p.down_a, p.rank);
    add_rule(plane(q.up_a, rule, first), rows, z_up, grad_h_up, p.up_a, p.rank);
    const Plane down_bias = plane(q.down_bias, p.r, first);
    for (int i = threadIdx.x; down_bias.data && i < p.r; i += kThreads) {
      float sum = 0.f;
      for (int row = 0; row < rows; row++) sum += grad_v[row * p.r + i];
      down_bias.add(i, sum);
    }
    for (int i = threadIdx.x; q.scale && i < rows * numbers; i += kThreads)
      if (i % width < p.rank.columns) grad_scale += grad_h_up[i] * h_up[i];
    __syncthreads();
  }
  if (!q.scale) return;
  const float sum = sum_block(grad_scale, z);
  if (threadIdx.x == 0) q.scale[index] = sum;
}

}  // namespace fastadapt
