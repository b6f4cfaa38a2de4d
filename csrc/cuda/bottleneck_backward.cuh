// bottleneck backward by rows: recomputes the hidden tile and writes grad_x, and what the weight gradients need of a row.
#pragma once
#include "bottleneck.cuh"

namespace fastadapt {

struct Backward {
  Bottleneck p;  // p.other is grad_y, p.out is grad_x
  int needs_z, needs_grad_z;
  // Work rows in the order of positions, (m, work_row); nullptr where no weight gradient needs them.
  void *hidden, *grad_z;
  int64_t work_row;
  float* statistics;     // (m, 2): mean and rstd of a position, for the weight gradients
  float* norm_products;  // (g, 2, r): down @ norm_weight and down @ norm_bias
  float* hidden_sums;    // (tiles, 2, r): column sums of grad_z and of grad_hidden * z
};

// A warp for each adapter and rank.
template <class T>
__global__ void __launch_bounds__(kThreads) bottleneck_norm_products_kernel(const __grid_constant__ Backward q) {
  const Bottleneck& p = q.p;
  const int lane = threadIdx.x % 32;
  const int64_t index = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / 32;
  if (index >= static_cast<int64_t>(p.groups.g) * p.r) return;
  const int adapter = static_cast<int>(index / p.r), j = static_cast<int>(index % p.r);
  const T* w = p.down.of<T>(adapter) + j * p.down.row;
  float by_weight = 0.f, by_bias = 0.f;
  for (int c = lane; c < p.d; c += 32) {
    by_weight += to_float(w[c]) * p.norm_weight.at<T>(c);
    if (p.norm_bias.data) by_bias += to_float(w[c]) * p.norm_bias.at<T>(c);
  }
  for (int o = 16; o; o /= 2) {
    by_weight += __shfl_xor_sync(0xffffffffu, by_weight, o);
    by_bias += __shfl_xor_sync(0xffffffffu, by_bias, o);
  }
  if (lane == 0) {
    q.norm_products[(adapter * 2 + 0) * static_cast<int64_t>(p.r) + j] = by_weight;
    q.norm_products[(adapter * 2 + 1) * static_cast<int64_t>(p.r) + j] = by_bias;
  }
}

// A lane's two columns of rank: what backward needs of each, and its sums over the rows of the warp.
struct HiddenGradient {
  HiddenColumn at;
  float by_weight, by_bias, sum_grad_z, sum_grad_skip;
};

template <class T>
__device__ __forceinline__ HiddenGradient hidden_gradient(const Backward& q, int adapter, int column) {
  HiddenGradient h{hidden_column<T>(q.p, adapter, column), 0.f, 0.f, 0.f, 0.f};
  if (h.at.live && q.norm_products) {
    h.by_weight = q.norm_products[(adapter * 2 + 0) * static_cast<int64_t>(q.p.r) + column];
    h.by_bias = q.norm_products[(adapter * 2 + 1) * static_cast<int64_t>(q.p.r) + column];
  }
  return h;
}

struct HiddenElement {
  float hidden, grad_z, sum, sum_xhat;
};

// One element of the hidden tile from its products; adds to the sums of its column.
template <class T>
__device__ __forceinline__ HiddenElement backward_element(HiddenGradient& h, int activation, float product, float grad_hidden) {
  if (!h.at.live) return HiddenElement{0.f, 0.f, 0.f, 0.f};
  const float z = product + h.at.bias;
  float grad_z = grad_hidden * (activate_gradient(activation, z) + h.at.skip);
  // relu selects: where it is 0, NaN and infinity end, as in PyTorch.
  if (activation == 0 && !h.at.skips) grad_z = z <= 0.f ? 0.f : grad_hidden;
  h.sum_grad_z += grad_z;
  h.sum_grad_skip += grad_hidden * z;
  // The LayerNorm's means of grad_n, in rank space: grad_n = grad_z @ down, with grad_z as the product will see it.
  const float rounded = to_float(from_float<T>(grad_z));
  return HiddenElement{h.at.hidden(activation, z), grad_z, rounded * h.by_weight, rounded * (product - h.by_bias)};
}

// From the float32 tiles of products, 0 for z and 1 for grad_hidden, to grad_z in the hidden tile, the work rows and the sums.
template <class T, int BM>
__device__ __forceinline__ void backward_hidden(
    const Block<T, BM>& b, const Backward& q, const Tile& tile, int r0, float factor) {
  using B = Block<T, BM>;
  const Bottleneck& p = q.p;
  const int column = r0 + b.lane * 2, left = p.r - column;
  HiddenGradient first = hidden_gradient<T>(q, tile.adapter, column), second = hidden_gradient<T>(q, tile.adapter, column + 1);
  T *hidden = static_cast<T*>(q.hidden), *grad_z = static_cast<T*>(q.grad_z);
#pragma unroll 1
  for (int row = b.warp; row < BM; row += kWarps) {
    HiddenElement u{0.f, 0.f, 0.f, 0.f}, v = u;
    if (b.table->row[row] >= 0) {
      const float2 z = *reinterpret_cast<float2*>(b.tile_f(0) + row * B::kRowF + b.lane * 2);
      const float2 grad = *reinterpret_cast<float2*>(b.tile_f(1) + row * B::kRowF + b.lane * 2);
      u = backward_element<T>(first, p.activation, z.x, factor * grad.x);
      v = backward_element<T>(second, p.activation, z.y, factor * grad.y);
      const int64_t at = (tile.begin + row) * q.work_row + column;
      if (hidden) store_pair(hidden + at, u.hidden, v.hidden, true, left);
      if (grad_z) store_pair(grad_z + at, u.grad_z, v.grad_z, true, left);
    }
    if (column < round_up(p.r, 16)) store_pair(b.hidden + row * b.row_h + column, u.grad_z, v.grad_z, true, 2);
    if (!q.norm_products) continue;
    float sum = u.sum + v.sum, sum_xhat = u.sum_xhat + v.sum_xhat;
    for (int o = 16; o; o /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, o);
      sum_xhat += __shfl_xor_sync(0xffffffffu, sum_xhat, o);
    }
    if (b.lane == 0) {
      b.table->sum[row] += sum;
      b.table->sum_xhat[row] += sum_xhat;
    }
  }
  if (!q.hidden_sums) return;
  float* sums = b.tile_f(2);  // (warps, 2, 64)
  sums[b.warp * 2 * kN + b.lane * 2] = first.sum_grad_z;
  sums[b.warp * 2 * kN + b.lane * 2 + 1] = second.sum_grad_z;
  sums[(b.warp * 2 + 1) * kN + b.lane * 2] = first.sum_grad_skip;
  sums[(b.warp * 2 + 1) * kN + b.lane * 2 + 1] = second.sum_grad_skip;
  __syncthreads();
  for (int i = threadIdx.x; i < 2 * kN; i += kThreads) {
    if (r0 + i % kN >= p.r) continue;
    float sum = 0.f;
    for (int w = 0; w < kWarps; w++) sum += sums[w * 2 * kN + i];
    q.hidden_sums[(blockIdx.x * int64_t{2} + i / kN) * p.r + r0 + i % kN] = sum;
  }
}

// One block computes BM rows of grad_x, and the hidden activations and grad_z of those rows where they are wanted.
template <class T, int BM>
__global__ void __launch_bounds__(kThreads, Block<T, BM>::kPerMultiprocessor)
    bottleneck_bwd_rows_kernel(const __grid_constant__ Backward q) {
  FA_DYNAMIC_SHARED(shared);
  using B = Block<T, BM>;
  const Bottleneck& p = q.p;
  const B b(shared, p.r);
  const Tile tile = find_tile(p.groups, blockIdx.x, BM);
  if (tile.begin >= tile.end) return;
  fill_table(b, p, tile);
  if (tile.adapter >= p.groups.g) {
    if (p.out) pass_rows(b, p, tile.adapter > p.groups.g, p.add_x ? &p.other : nullptr, b.table->other);
    return;
  }
  if (p.norm_weight.data) {
    row_statistics(b, p);
    for (int i = threadIdx.x; q.statistics && i < BM && b.table->row[i] >= 0; i += kThreads) {
      q.statistics[(tile.begin + i) * 2] = b.table->mean[i];
      q.statistics[(tile.begin + i) * 2 + 1] = b.table->rstd[i];
    }
  }
  const bool varies = p.scale_varies();
  const float factor = varies ? 1.f : p.scale_at<T>(0);  // one scale for all columns waits until after the product

  for (int r0 = 0; r0 < p.r; r0 += kN) {
    float z[B::kBlocks][4] = {}, grad[B::kBlocks][4] = {};
    if (q.needs_z) project_down(z, b, p, tile.adapter, r0);
    if (q.needs_grad_z)
      project<true>(grad, b, p.other, b.table->other, p.up, tile.adapter, p.d, p.r, r0, varies,
          [&](float v, int, int column) { return v * p.scale_at<T>(column); });
    const int corner = b.warp_m * 16 * B::kRowF + b.warp_n * B::kBlocks * 8;
    write_blocks<0, B::kBlocks>(b.tile_f(0) + corner, B::kRowF, z);
    write_blocks<0, B::kBlocks>(b.tile_f(1) + corner, B::kRowF, grad);
    __syncthreads();
    backward_hidden(b, q, tile, r0, factor);
    __syncthreads();
  }
  if (!p.out) return;

  struct Column {
    float weight, direct;
  };
  const bool norm = p.norm_weight.data, direct = p.add_x || p.skip.data;
  expand<true>(
      b, p, p.down, tile.adapter, direct ? &p.other : nullptr, b.table->other,
      [&](int column) {
        return Column{
            norm ? p.norm_weight.at<T>(column) : 1.f, (p.add_x ? 1.f : 0.f) + (p.skip.data ? p.skip.at<T>(column) : 0.f)};
      },
      [&](float grad, const Column& at, int row, int column, float grad_y) {
        if (norm) {
          const float x = to_float(static_cast<const T*>(p.x.data)[b.table->x[row] + column * p.x.inner.stride]);
          const float xhat = (x - b.table->mean[row]) * b.table->rstd[row];
          grad = b.table->rstd[row] * (grad * at.weight - (b.table->sum[row] + xhat * b.table->sum_xhat[row]) / p.d);
        }
        return direct ? grad + at.direct * grad_y : grad;
      });
}

}  // namespace fastadapt
