// prefix_attention backward: the gradients.
#pragma once
#include "prefix_attention_backward.cuh"

namespace fastadapt {

// The columns of a gradient that a block computes: as many steps of kDepth as its accumulators hold.
template <class T>
struct Slab {
  static constexpr int kDepth = PairShape<T>::kDepth, kBlocks = kDepth / 8, kColumns = 128, kSteps = kColumns / kDepth;
  using Sums = float[kSteps][kBlocks][4];
  int first, steps, e;

  __device__ __forceinline__ Slab(int slab, int width)
      : first(slab * kColumns), steps(least(kSteps, static_cast<int>(divide_up(width - first, kDepth)))), e(width) {}
  static constexpr __host__ __device__ int64_t count(int e) { return divide_up(e, kColumns); }

  // sums[to] += a @ b, or a.T @ b, for 16 rows of a tile of weights and the columns of a step of b.
  template <bool TRANSPOSED>
  __device__ __forceinline__ void add(Sums& sums, int to, int step, const T* a, const T* b, int depth) const {
    using P = PairShape<T>;
    const int live = least(round_up(e - first - step * kDepth, 16), kDepth) / 8;
    float unused[4];
#pragma unroll
    for (int i = 0; i < kSteps; i++)
      if (i == to) multiply<kBlocks, TRANSPOSED, true, false>(sums[i], unused, a, P::kWeightRow, b, P::kRow, depth, live);
  }
  // Calls f(row, column, first, second) for neighbours in a row of a tile, from sums[from] on.
  template <class F>
  __device__ __forceinline__ void pairs(const Sums& sums, int from, F f) const {
    const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
    for (int i = 0; i < kSteps; i++)
#pragma unroll
      for (int j = 0; j < kBlocks; j++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int step = i - from, column = first + step * kDepth + j * 8 + threadIdx.x % 4 * 2;
          if (step >= 0 && step < steps && column < e)
            f(row + half * 8, column, sums[i][j][half * 2], sums[i][j][half * 2 + 1]);
        }
  }
};

// One block: a slab of the gradient of a tile of rows.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    prefix_attention_queries_kernel(const __grid_constant__ AttentionBackward p, T* __restrict__ out) {
  FA_DYNAMIC_SHARED(shared);
  using P = PairShape<T>;
  const int64_t slabs = Slab<T>::count(p.a.e);
  const Slab<T> slab(static_cast<int>(blockIdx.x % slabs), p.a.e);
  const RowBlock block(p.a, blockIdx.x / slabs);
  const KeyWalk walk(p.a, block, true);
  T* gradients = reinterpret_cast<T*>(shared + P::kStageBytes);
  typename Slab<T>::Sums sums = {};
  over_pairs(
      p, reinterpret_cast<T*>(shared), walk.count(), walk, true, slab.first, slab.steps,
      [&](const TilePair& pair, Side&, Side& right) { right = keys_of(p.a, pair, false); },
      [&](const TilePair& pair, float(&s)[8][4], float(&d)[8][4]) {
        weigh_pair<false, T>(s, d, p, pair);
        store_weights(gradients, d, pair.key_extent());
      },
      [&](const TilePair& pair, int step, const T*, const T* right) {
        const T* rows = gradients + threadIdx.x / 32 * 16 * P::kWeightRow;
        if (pair.warp_has_rows()) slab.template add<false>(sums, step, step, rows, right, pair.key_extent());
      });
  slab.pairs(sums, 0, [&](int row, int column, float first, float second) {
    if (row >= block.rows) return;
    T* to = out + Query(p.a, block.key_head, block.row + row).by_token(p.a, block.sequence) + column;
    store_pair(to, p.a.scale * first, p.a.scale * second, true, 2);
  });
}

// The gradients of keys and values; nullptr where not wanted.
struct KeysGradients {
  AttentionBackward p;
  void *k, *v;    // (b, t_k, h_kv, e)
  Groups groups;  // the sequences of each prefix
  int each;       // prefix i belongs to sequence i
  int64_t prefixes, splits, prefix_blocks;  // the blocks of prefixes come first
  float *prefix_k, *prefix_v;               // planes (splits, prefixes, h_kv, p, e) that lack their scales
};

// The tiles of rows that meet a tile of keys: those of one sequence, or of one sequence of a prefix after another.
struct RowWalk {
  const int64_t* order;  // position -> sequence; nullptr: they are the same
  int position, prefix, key_head, key, keys, row;

  __device__ __forceinline__ TilePair pair(const PrefixAttention& a) const {
    const int sequence = order ? static_cast<int>(order[position]) : position;
    return TilePair{sequence, prefix, key_head, row, least(kSide, a.rows() - row), key, keys};
  }
  __device__ __forceinline__ void next(const PrefixAttention& a) {
    row += kSide;
    if (row >= a.rows()) row = 0, position++;
  }
};

// The gradients of keys and values that fit the accumulators side by side are computed together, others by a block each.
constexpr __host__ __device__ bool together(bool k, bool v, int e) { return k && v && e <= 64; }
constexpr __host__ __device__ int parts_of(bool k, bool v, int e) { return together(k, v, e) ? 1 : k + v; }

// One block: a slab of the gradients of a tile of keys; of a prefix, what a split of the rows that see it adds.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) prefix_attention_keys_kernel(const __grid_constant__ KeysGradients q) {
  FA_DYNAMIC_SHARED(shared);
  using P = PairShape<T>;
  using S = Slab<T>;
  const PrefixAttention& a = q.p.a;
  const bool prefixed = blockIdx.x < q.prefix_blocks;
  int64_t digits = blockIdx.x - (prefixed ? 0 : q.prefix_blocks);
  auto next = [&](int64_t count) {
    const int digit = static_cast<int>(digits % count);
    digits /= count;
    return digit;
  };
  const bool wants_k = prefixed ? q.prefix_k : q.k, wants_v = prefixed ? q.prefix_v : q.v;
  const int part = next(parts_of(wants_k, wants_v, a.e));
  const bool both = together(wants_k, wants_v, a.e), of_k = wants_k && part == 0, of_v = both || !of_k;
  const S slab(next(S::count(a.e)), a.e);
  const int split = prefixed ? next(q.splits) : 0, length = prefixed ? a.p : a.t_k;
  const int key = next(divide_up(length, kSide)) * kSide;
  const int key_head = next(a.h_kv), index = static_cast<int>(digits);
  const int tiles = static_cast<int>(divide_up(a.rows(), kSide));
  RowWalk walk{nullptr, index, -1, key_head, key, least(kSide, length - key), 0};
  int64_t count = 0;
  if (prefixed) {
    const int64_t begin = q.each ? index : q.groups.first(index), end = q.each ? index + 1 : q.groups.first(index + 1);
    const Span span = split_span(0, (end - begin) * tiles, split, q.splits, 1);
    walk.order = q.groups.order, walk.prefix = index, count = span.end - span.begin;
    if (count) {
      walk.position = static_cast<int>(begin + span.begin / tiles);
      walk.row = static_cast<int>(span.begin % tiles) * kSide;
    }
  } else {
    const int first = least(a.first_token(key), a.t) * a.group / kSide;  // rows stay below 2**30
    walk.keys = least(kSide, a.own_keys(index) - key), walk.row = first * kSide;
    if (walk.keys > 0) count = tiles - first;
  }

  T *weights = reinterpret_cast<T*>(shared + P::kStageBytes), *gradients = weights + P::kWeights;
  const int of_values = both ? S::kSteps / 2 : 0;
  typename S::Sums sums = {};
  over_pairs(
      q.p, reinterpret_cast<T*>(shared), count, walk, of_k, slab.first, slab.steps,
      [&](const TilePair& pair, Side& left, Side& right) {
        if (of_k) left = queries_of(a.q, pair);
        if (of_v) right = queries_of(q.p.grad_y, pair);
      },
      [&](const TilePair& pair, float(&s)[8][4], float(&d)[8][4]) {
        weigh_pair<false, T>(s, d, q.p, pair);
        if (of_v) store_weights(weights, s, pair.key_extent());
        if (of_k) store_weights(gradients, d, pair.key_extent());
      },
      [&](const TilePair& pair, int step, const T* left, const T* right) {
        const int warp_key = threadIdx.x / 32 * 16;
        if (warp_key >= pair.keys) return;
        if (of_k) slab.template add<true>(sums, step, step, gradients + warp_key, left, pair.row_extent());
        if (of_v) slab.template add<true>(sums, step + of_values, step, weights + warp_key, right, pair.row_extent());
      });

  const int64_t plane = ((split * q.prefixes + index) * a.h_kv + key_head) * a.p;
  auto store = [&](int from, void* out, float* planes, float scale) {
    slab.pairs(sums, from, [&](int row, int column, float first, float second) {
      if (key + row >= length) return;
      if (prefixed) {
        *reinterpret_cast<float2*>(planes + (plane + key + row) * a.e + column) = float2{first, second};
      } else {
        T* to = static_cast<T*>(out) + ((int64_t{index} * a.t_k + key + row) * a.h_kv + key_head) * a.e + column;
        store_pair(to, scale * first, scale * second, true, 2);
      }
    });
  };
  if (of_k) store(0, q.k, q.prefix_k, a.scale);
  if (of_v) store(of_values, q.v, q.prefix_v, a.dropout.threshold ? a.dropout.scale : 1.f);
}

// The gradients of the prefixes from their planes.
struct PrefixReduction {
  int64_t size, splits;  // of a plane, and how many
  const float *k, *v;
  float scale_k, scale_v;
  int is_float;
  void *out_k, *out_v;
};

// A row of blocks for keys and one for values, a thread for each element.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) prefix_attention_reduce_kernel(const __grid_constant__ PrefixReduction p) {
  const int64_t at = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  const float* planes = blockIdx.y ? p.v : p.k;
  if (at >= p.size || !planes) return;
  const float sum = add_planes(planes + at, p.splits, p.size);
  store_gradient<T>(blockIdx.y ? p.out_v : p.out_k, p.is_float, at, (blockIdx.y ? p.scale_v : p.scale_k) * sum);
}

// One block: the gradient of the gate of a head, the sum of what delta says of its prefix.
template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    prefix_attention_gate_kernel(const __grid_constant__ AttentionBackward p, void* out, int is_float) {
  FA_DYNAMIC_SHARED(shared);
  const PrefixAttention& a = p.a;
  const int64_t rows = a.b * a.t, head = blockIdx.x;
  const float* delta = p.delta + p.part(true);
  const Span span{0, rows > threadIdx.x ? divide_up(rows - threadIdx.x, kThreads) : 0};
  float sum = sum_rows(span, [&](int64_t i) {
    const int64_t row = i * kThreads + threadIdx.x;
    return float2{delta[(row / a.t * a.h + head) * a.t + row % a.t], 0.f};
  }).x;
  for (int other = 16; other; other /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
  float* sums = reinterpret_cast<float*>(shared);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) store_gradient<T>(out, is_float, head, (sums[0] + sums[1]) + (sums[2] + sums[3]));
}

}  // namespace fastadapt
