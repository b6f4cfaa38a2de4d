// bottleneck backward by columns: the gradients of the parameters, as partial sums over splits of the rows ("planes") that a
// second kernel adds in a fixed order.  No atomics.
#pragma once
#include "bottleneck_backward.cuh"
#include "planes.cuh"

namespace fastadapt {

struct Gradients {
  Backward q;
  int64_t splits, sum_splits;
  // Planes (splits, g, d, r) of float32, nullptr where not wanted:
  float* up;    // grad_y.T @ hidden
  float* down;  // x.T @ grad_z, with xhat for x behind a LayerNorm
  // Planes (splits, g, d): the sums of grad_y if `up` is there; else (sum_splits, g, d), like those of grad_y * x.
  float *grad_y, *grad_skip;
  const float* hidden_sums;  // (2, g, r)
  // (g, d): dot(grad_y.T @ hidden, up) + up_bias * sum(grad_y), the LayerNorm's two
  float *grad_scale, *grad_norm_weight, *grad_norm_bias;
  void *grad_up, *grad_down;
  int weight_is_float;
};

// One block: 64 channels by 64 ranks of one plane of grad_y.T @ hidden, or of x.T @ grad_z.
template <class T>
__global__ void __launch_bounds__(kThreads, 3) bottleneck_bwd_weights_kernel(const __grid_constant__ Gradients w) {
  FA_DYNAMIC_SHARED(shared);
  using O = Outer<T>;
  const Bottleneck& p = w.q.p;
  const int64_t tiles_d = divide_up(p.d, kN), tiles_r = p.r > 0 ? divide_up(p.r, kN) : 1;
  int64_t index = blockIdx.x;
  const int c0 = static_cast<int>(index % tiles_d) * kN;
  index /= tiles_d;
  const int r0 = static_cast<int>(index % tiles_r) * kN;
  index /= tiles_r;
  const int64_t split = index % w.splits;
  index /= w.splits;
  const int adapter = static_cast<int>(index % p.groups.g);
  const bool is_up = w.up && index < p.groups.g;

  const Span span = split_rows(p.groups, adapter, split, w.splits, O::kDepth);
  const Rows& rows = is_up ? p.other : p.x;
  const T* data = static_cast<const T*>(rows.data);
  const T* work = static_cast<const T*>(is_up ? w.q.hidden : w.q.grad_z);
  const bool sums = is_up && w.grad_y && r0 == 0, normed = !is_up && p.norm_weight.data;
  float acc[8][4] = {}, sum[4] = {};
  outer_product<true>(
      acc, sum, reinterpret_cast<T*>(shared), span,
      columns(rows.inner, p.d - c0,
          [&](int64_t position) { return data + rows.offset(p.groups.row(position)) + c0 * rows.inner.stride; }),
      columns(Inner{1, 1}, p.r - r0, [&](int64_t position) { return work + position * w.q.work_row + r0; }), sums,
      [&](T* tile, int64_t begin, int depth) {
        if (!normed) return;
        const float* statistics = w.q.statistics + begin * 2;
        change_tile<kN>(tile, depth, least(round_up(p.d - c0, 16), kN), p.d - c0, rows.inner, [&](float v, int row, int) {
          return begin + row < span.end ? (v - statistics[row * 2]) * statistics[row * 2 + 1] : 0.f;
        });
      });

  const int64_t plane = (split * p.groups.g + adapter) * p.d + c0;
  float* out = is_up ? w.up : w.down;
  outer_elements(acc, [&](int c, int j, float v) {
    if (c0 + c < p.d && r0 + j < p.r) out[(plane + c) * p.r + r0 + j] = v;
  });
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int c = warp * 16 + lane / 4 + half * 8;
    if (sums && lane % 4 == 0 && c0 + c < p.d) w.grad_y[plane + c] = sum[half * 2];
  }
}

// A thread a channel: sums of grad_y and of grad_y * x over a split of an adapter's rows.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) bottleneck_bwd_sums_kernel(const __grid_constant__ Gradients w) {
  const Bottleneck& p = w.q.p;
  const int64_t tiles = divide_up(p.d, kThreads), c = blockIdx.x % tiles * kThreads + threadIdx.x;
  const int64_t split = blockIdx.x / tiles % w.sum_splits;
  const int adapter = static_cast<int>(blockIdx.x / tiles / w.sum_splits);
  if (c >= p.d) return;
  const Span span = split_rows(p.groups, adapter, split, w.sum_splits, 1);
  const float2 sum = sum_rows(span, [&](int64_t position) {
    const int64_t row = p.groups.row(position);
    const float grad = to_float(static_cast<const T*>(p.other.data)[p.other.offset(row) + c * p.other.inner.stride]);
    if (!w.grad_skip) return float2{grad, 0.f};
    return float2{grad, grad * to_float(static_cast<const T*>(p.x.data)[p.x.offset(row) + c * p.x.inner.stride])};
  });
  const int64_t at = (split * p.groups.g + adapter) * p.d + c;
  if (!w.up && w.grad_y) w.grad_y[at] = sum.x;
  if (w.grad_skip) w.grad_skip[at] = sum.y;
}

// A block for 32 ranks of an adapter: adds the column sums of its tiles of rows; hidden_sums becomes (2, g, r).
static __global__ void __launch_bounds__(kThreads, 4)
    bottleneck_bwd_hidden_sums_kernel(const __grid_constant__ Backward q, int64_t tiles, float* out) {
  FA_DYNAMIC_SHARED(shared);
  float* partial = reinterpret_cast<float*>(shared);  // (warps, 32)
  const Bottleneck& p = q.p;
  const int chunks = static_cast<int>(divide_up(p.r, 32)), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int column = static_cast<int>(blockIdx.x % chunks) * 32 + lane, adapter = static_cast<int>(blockIdx.x / chunks);
  const int64_t begin = p.groups.order ? p.groups.tile[adapter] : 0, end = p.groups.order ? p.groups.tile[adapter + 1] : tiles;
  for (int which = 0; which < 2; which++) {
    float sum = 0.f;
    if (column < p.r)
      for (int64_t t = begin + warp; t < end; t += kWarps) sum += q.hidden_sums[(t * 2 + which) * p.r + column];
    partial[threadIdx.x] = sum;
    __syncthreads();
    if (warp == 0 && column < p.r) {
      for (int i = 1; i < kWarps; i++) sum += partial[i * 32 + lane];
      out[(static_cast<int64_t>(which) * p.groups.g + adapter) * p.r + column] = sum;
    }
    __syncthreads();
  }
}

constexpr int kReduceTile = 32;

// A block for 32 channels of an adapter: grad_up and the channel's part of grad_scale.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) bottleneck_bwd_reduce_up_kernel(const __grid_constant__ Gradients w) {
  const Bottleneck& p = w.q.p;
  const int64_t chunks = divide_up(p.d, kReduceTile), plane = static_cast<int64_t>(p.groups.g) * p.d;
  const int adapter = static_cast<int>(blockIdx.x / chunks), lane = threadIdx.x % 32;
#pragma unroll 1
  for (int i = threadIdx.x / 32; i < kReduceTile; i += kWarps) {
    const int64_t c = blockIdx.x % chunks * kReduceTile + i, line = adapter * static_cast<int64_t>(p.d) + c;
    if (c >= p.d) break;
    const float scale = p.scale_at<T>(c);
    float dot = 0.f;
    for (int j = lane; j < p.r; j += 32) {
      const float v = add_planes(w.up + line * p.r + j, w.splits, plane * p.r);
      if (w.grad_up) store_gradient<T>(w.grad_up, w.weight_is_float, line * p.r + j, scale * v);
      if (w.grad_scale) dot += v * to_float(p.up.of<T>(adapter)[c * p.up.row + j]);
    }
    if (!w.grad_scale) continue;
    for (int o = 16; o; o /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, o);
    if (p.up_bias.data) dot += p.up_bias.at<T>(adapter, c) * add_planes(w.grad_y + line, w.splits, plane);
    if (lane == 0) w.grad_scale[line] = dot;
  }
}

// A block for 32 channels of an adapter: grad_down, transposed through shared memory, and the channel's part of the
// gradients of the LayerNorm.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) bottleneck_bwd_reduce_down_kernel(const __grid_constant__ Gradients w) {
  FA_DYNAMIC_SHARED(shared);
  constexpr int kRow = kReduceTile + 1;
  float* tile = reinterpret_cast<float*>(shared);  // (32 ranks, 32 channels), later (warps, 2, 32)
  const Bottleneck& p = w.q.p;
  const int64_t chunks = divide_up(p.d, kReduceTile), plane = static_cast<int64_t>(p.groups.g) * p.d;
  const int adapter = static_cast<int>(blockIdx.x / chunks), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t c0 = blockIdx.x % chunks * kReduceTile, c = c0 + lane;
  const float* grad_bias = w.hidden_sums + static_cast<int64_t>(adapter) * p.r;  // read only behind a LayerNorm
  const float weight = p.norm_weight.data && c < p.d ? p.norm_weight.at<T>(c) : 1.f;
  const float bias = p.norm_bias.data && c < p.d ? p.norm_bias.at<T>(c) : 0.f;
  float grad_weight = 0.f, grad_norm_bias = 0.f;
  for (int j0 = 0; j0 < p.r; j0 += kReduceTile) {
#pragma unroll 1
    for (int i = warp; w.down && i < kReduceTile; i += kWarps)
      if (c0 + i < p.d && j0 + lane < p.r)
        tile[lane * kRow + i] =
            add_planes(w.down + (adapter * static_cast<int64_t>(p.d) + c0 + i) * p.r + j0 + lane, w.splits, plane * p.r);
    __syncthreads();
#pragma unroll 1
    for (int i = warp; i < kReduceTile && c < p.d && j0 + i < p.r; i += kWarps) {
      const int64_t j = j0 + i;
      const float v = w.down ? tile[i * kRow + lane] : 0.f, element = to_float(p.down.of<T>(adapter)[j * p.down.row + c]);
      if (w.grad_down)
        store_gradient<T>(w.grad_down, w.weight_is_float, (adapter * static_cast<int64_t>(p.r) + j) * p.d + c,
            p.norm_bias.data ? v * weight + grad_bias[j] * bias : v * weight);
      grad_weight += element * v;
      if (w.grad_norm_bias) grad_norm_bias += element * grad_bias[j];
    }
    __syncthreads();
  }
  tile[(warp * 2) * 32 + lane] = grad_weight;
  tile[(warp * 2 + 1) * 32 + lane] = grad_norm_bias;
  __syncthreads();
  if (warp > 0 || c >= p.d) return;
  for (int i = 1; i < kWarps; i++) {
    grad_weight += tile[(i * 2) * 32 + lane];
    grad_norm_bias += tile[(i * 2 + 1) * 32 + lane];
  }
  if (w.grad_norm_weight) w.grad_norm_weight[adapter * static_cast<int64_t>(p.d) + c] = grad_weight;
  if (w.grad_norm_bias) w.grad_norm_bias[adapter * static_cast<int64_t>(p.d) + c] = grad_norm_bias;
}

// A gradient of a vector from its parts (splits, g, n): for each adapter, over all adapters, or over everything.
enum class Extent { adapter, all, total };
struct VectorGradient {
  const float* parts;
  int64_t splits, n;
  Extent extent;
  int scaled, is_float;
  void* out;
};
constexpr int kVectorGradients = 7;
struct VectorGradients {
  Bottleneck p;
  int count;
  VectorGradient of[kVectorGradients];
};

// A row of blocks for each gradient, a thread for each element; one block for a total.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) bottleneck_bwd_vectors_kernel(const __grid_constant__ VectorGradients v) {
  FA_DYNAMIC_SHARED(shared);
  const VectorGradient& job = v.of[blockIdx.y];
  const int64_t g = v.p.groups.g, i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (job.extent == Extent::total) {
    if (blockIdx.x > 0) return;
    float* partial = reinterpret_cast<float*>(shared);
    const int thread = threadIdx.x;
    const int64_t n = job.splits * g * job.n;
    partial[thread] = add_planes(job.parts + thread, thread < n ? divide_up(n - thread, kThreads) : 0, kThreads);
    __syncthreads();
    for (int half = kThreads / 2; half; half /= 2) {
      if (thread < half) partial[thread] += partial[thread + half];
      __syncthreads();
    }
    if (threadIdx.x == 0) store_gradient<T>(job.out, job.is_float, 0, partial[0]);
    return;
  }
  const bool each = job.extent == Extent::adapter;
  if (i >= (each ? g * job.n : job.n)) return;
  float sum = each ? add_planes(job.parts + i, job.splits, g * job.n) : add_planes(job.parts + i, job.splits * g, job.n);
  if (job.scaled) sum *= v.p.scale_at<T>(i % job.n);
  store_gradient<T>(job.out, job.is_float, i, sum);
}

}  // namespace fastadapt
