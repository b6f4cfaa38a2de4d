// prefix_attention forward on the GPU.  Free of torch.
#pragma once
#include "prefix_attention_tiles.cuh"

namespace fastadapt {

// Tiles of heads at most E wide.
template <class T, int E>
struct ForwardTile {
  // float32 has no room for four warps' rows at the largest width: then two warps share rows, and halve the columns of y.
  static constexpr int kParts = sizeof(T) == 4 && E > 128 ? 2 : 1;
  static constexpr int kRows = kWarps / kParts * 16;
  static constexpr int kKeys = sizeof(T) == 2 ? (E > 128 ? 32 : 64) : (E > 128 ? 16 : 32);
  static constexpr int kScores = kKeys / 8, kBlocks = E / kParts / 8;  // blocks of 8 columns that a warp holds
  static constexpr int kLine = Shape<T>::padded(E);
  static constexpr int kBytes = kRows * sizeof(int64_t) + (kRows + 2 * kKeys) * kLine * sizeof(T) +
                                weigh_scratch<T, kScores>() * sizeof(float);
};

// The softmax of a lane's two rows, so far; of the exponentials of scores less `top` each of a row's four lanes adds its own.
struct Softmax {
  float top[2] = {-INFINITY, -INFINITY}, sum[2] = {};

  // Takes in a tile: scores become weights, `decay` is what becomes of the weights before.
  template <int NI>
  __device__ __forceinline__ void add(float (&scores)[NI][4], int live, float (&decay)[2]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float high = -INFINITY, part = 0.f;
#pragma unroll
      for (int j = 0; j < NI; j++) {
        if (j >= live) break;
        high = fmaxf(high, fmaxf(scores[j][half * 2], scores[j][half * 2 + 1]));
      }
      high = fmaxf(top[half], row_max(high));
      const float shift = shift_of(high);
      decay[half] = exp_fast(top[half] - shift);
#pragma unroll
      for (int j = 0; j < NI; j++) {
        if (j >= live) break;
        for (int i = half * 2; i < half * 2 + 2; i++) part += scores[j][i] = exp_fast(scores[j][i] - shift);
      }
      sum[half] = sum[half] * decay[half] + part, top[half] = high;
    }
  }
  // The logarithm of the sum, for all lanes of a row.
  __device__ __forceinline__ float close(int half, float& total) const {
    total = row_sum(sum[half]);
    return total == 0.f ? -INFINITY : top[half] + logf(total);
  }
};

// One block: a tile of the rows that share a key head.  Without a gate the tiles of the prefix come first and those of the own
// keys follow under one softmax.  With one the own keys come first; their part is divided by its sum, so that the prefix, whose
// log-sum-exp a pass over its scores finds before, is added to the same accumulators.
template <class T, int E>
__global__ void __launch_bounds__(kThreads, 2)
    prefix_attention_fwd_kernel(const __grid_constant__ PrefixAttention p, T* __restrict__ y, float* __restrict__ lse) {
  FA_DYNAMIC_SHARED(shared);
  using Tile = ForwardTile<T, E>;
  constexpr int kScores = Tile::kScores, kBlocks = Tile::kBlocks;
  int64_t* numbers = reinterpret_cast<int64_t*>(shared);  // of the rows, for dropout
  T* q = reinterpret_cast<T*>(numbers + Tile::kRows);
  T *k = q + Tile::kRows * Tile::kLine, *v = k + Tile::kKeys * Tile::kLine;
  float* scratch = reinterpret_cast<float*>(v + Tile::kKeys * Tile::kLine);

  const int tiles = static_cast<int>(divide_up(p.rows(), Tile::kRows));
  // The last tiles see most keys, so they begin first.
  const int row0 = (tiles - 1 - static_cast<int>(blockIdx.x % tiles)) * Tile::kRows;
  const int key_head = static_cast<int>(blockIdx.x / tiles % p.h_kv);
  const int64_t sequence = blockIdx.x / tiles / p.h_kv;
  const int last_row = least(row0 + Tile::kRows, p.rows()) - 1;
  const Prefix prefix(p, sequence);
  const int own_keys = p.own_keys(sequence), own_end = p.bound(last_row / p.group, own_keys);
  const int least_bound = p.bound(row0 / p.group, own_keys);  // below it all rows see all keys but those of the mask
  const int own_tiles = static_cast<int>(divide_up(own_end, Tile::kKeys));
  const int prefix_tiles = static_cast<int>(divide_up(prefix.keys, Tile::kKeys));
  const bool gated = p.gate.data;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_row = warp % (kWarps / Tile::kParts) * 16, warp_column = warp / (kWarps / Tile::kParts) * kBlocks * 8;
  const int live = (p.depth() - warp_column) / 8;  // blocks of the warp's columns that exist
  int bound[2];
  int64_t mask_offset[2];
  float factor[2];  // of the weights of a prefix with a gate
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const Query query(p, key_head, least(row0 + warp_row + lane / 4 + half * 8, last_row));
    bound[half] = p.bound(query.token, own_keys);
    mask_offset[half] = p.mask.offset(sequence, query.head, query.token);
    factor[half] = gated ? p.gate.at<T>(query.head) : 1.f;
  }
  for (int i = threadIdx.x; i < Tile::kRows; i += kThreads)
    numbers[i] = Query(p, key_head, least(row0 + i, last_row)).number(p, sequence);

  // Steps over tiles of keys.
  const int first_own = gated ? 0 : prefix_tiles, first_pass = own_tiles, second_pass = own_tiles + prefix_tiles;
  const int steps = own_tiles + (gated ? 2 : 1) * prefix_tiles;
  auto is_own = [&](int step) { return gated ? step < own_tiles : step >= prefix_tiles; };
  auto begin_of = [&](int step) {
    const int first = is_own(step) ? first_own : !gated ? 0 : step < second_pass ? first_pass : second_pass;
    return (step - first) * Tile::kKeys;
  };
  auto width_of = [&](int step) {  // keys of a tile, in steps of tensor cores
    return least(round_up((is_own(step) ? own_end : prefix.keys) - begin_of(step), 16), Tile::kKeys);
  };
  auto load = [&](T* tile, int step, const Heads& own, const Heads& learned) {
    const bool is = is_own(step);
    load_tokens<E>(tile, width_of(step), is ? own : learned, is ? sequence : prefix.index, key_head, begin_of(step),
        is ? own_end : prefix.keys, p.e);
    cp_async_commit();
  };

  float acc[kBlocks][4] = {};
  Softmax softmax;
  auto scale_rows = [&](const float(&by)[2]) {
#pragma unroll
    for (auto& block : acc)
      for (int i = 0; i < 4; i++) block[i] *= by[i / 2];
  };
  // Ends a softmax: its log-sum-exp, and if `divide` the accumulators by its sum.
  auto close = [&](int part, bool divide) {
    float by[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float total;
      float sum = softmax.close(half, total);
      if (prefix.outside) sum = nanf("");
      by[half] = total == 0.f ? 0.f : 1.f / total;
      const int row = row0 + warp_row + lane / 4 + half * 8;
      if (lse && warp_column == 0 && lane % 4 == 0 && row <= last_row)
        lse[part * p.b * p.h * p.t + Query(p, key_head, row).number(p, sequence)] = sum;
      softmax.top[half] = divide ? -INFINITY : sum, softmax.sum[half] = 0.f;
    }
    if (divide) scale_rows(by);
  };

  if (steps) {
    load_queries<E>(q, Tile::kRows, p, p.q, sequence, key_head, row0);
    load(k, 0, p.k, p.prefix_k);
  }
#pragma unroll 1
  for (int step = 0; step < steps; step++) {
    const bool own = is_own(step), weighs = !gated || own || step >= second_pass;
    const int begin = begin_of(step), width = width_of(step);
    cp_async_wait<0>();
    __syncthreads();  // the keys are there, and all have left the values of the step before
    if (weighs) load(v, step, p.v, p.prefix_v);
    if (gated && step == first_pass) close(0, true);
    if (gated && step == second_pass) close(1, false);

    float scores[kScores][4];
    multiply_heads<E>(scores, q + warp_row * Tile::kLine, k, p.depth(), width / 8);
    const bool masked = own && p.mask.data, all_seen = !masked && begin + width <= (own ? least_bound : prefix.keys);
#pragma unroll
    for (auto& block : scores)
      for (float& score : block) score *= p.scale;
    if (!all_seen) {
#pragma unroll
      for (int j = 0; j < kScores; j++) {
        if (j * 8 >= width) break;
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int key = begin + j * 8 + lane % 4 * 2 + i % 2;
          if (key >= (own ? bound[i / 2] : prefix.keys)) scores[j][i] = -INFINITY;
          else if (masked) scores[j][i] = p.mask.add<T>(scores[j][i], mask_offset[i / 2], key);
        }
      }
    }
    if (gated && step >= second_pass) {
#pragma unroll
      for (int j = 0; j < kScores; j++) {
        if (j * 8 >= width) break;
        for (int i = 0; i < 4; i++)
          scores[j][i] = factor[i / 2] * exp_fast(scores[j][i] - shift_of(softmax.top[i / 2]));
      }
    } else {
      float decay[2];
      softmax.add(scores, width / 8, decay);
      if (weighs) scale_rows(decay);
    }
    if (weighs && p.dropout.threshold)
      drop_accumulators(reinterpret_cast<float(&)[1][kScores][4]>(scores), p.dropout, numbers + warp_row,
          (own ? p.own_column : 0) + begin);
    cp_async_wait<0>();
    __syncthreads();  // the values are there, and all have left the keys
    if (step + 1 < steps) load(k, step + 1, p.k, p.prefix_k);
    if (weighs) weigh<E>(acc, scores, scratch, v + warp_column, width, live);
  }
  if (!gated) {
    close(0, true);
  } else if (prefix_tiles == 0) {
    close(0, true);
    close(1, false);
  }

#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = row0 + warp_row + lane / 4 + half * 8;
    if (row > last_row) continue;
    T* line = y + Query(p, key_head, row).by_token(p, sequence) + warp_column;
#pragma unroll
    for (int j = 0; j < kBlocks; j++) {
      const int column = j * 8 + lane % 4 * 2;
      if (warp_column + column >= p.e) break;
      const float first = prefix.outside ? nanf("") : acc[j][half * 2];
      const float second = prefix.outside ? nanf("") : acc[j][half * 2 + 1];
      store_pair(line + column, first, second, true, 2);
    }
  }
}

}  // namespace fastadapt
