// prefix_attention backward, by pairs of a tile of queries and a tile of keys: the scores are computed again, and the weights
// from them and the saved log-sum-exp.
#pragma once
#include "planes.cuh"
#include "prefix_attention_tiles.cuh"

namespace fastadapt {

constexpr int kSide = 64;  // rows of queries in a pair, and keys

// The width of a head is taken in steps, so that tiles of any width fit.
template <class T>
struct PairShape {
  static constexpr int kDepth = Shape<T>::kDepth, kRow = Shape<T>::padded(kDepth), kTile = kSide * kRow;
  static constexpr int kStages = Shape<T>::kStages, kStageBytes = kStages * 2 * kTile * sizeof(T);
  static constexpr int kWeightRow = Shape<T>::padded(kSide), kWeights = kSide * kWeightRow;
  static constexpr int kDeltaBytes = kStageBytes + kSide * sizeof(float);
  static constexpr int kQueriesBytes = kStageBytes + kWeights * sizeof(T), kKeysBytes = kStageBytes + 2 * kWeights * sizeof(T);
};

struct AttentionBackward {
  PrefixAttention a;
  Heads y, grad_y;
  const float* lse;  // (parts, b, h, t), as delta
  float* delta;      // of a query: the sum of its weights times their gradients
  int inverse;       // 65536 / group + 1

  // Where those of the softmax begin that a key takes part in: with a gate the prefix has one of its own.
  __device__ __forceinline__ int64_t part(bool prefix) const { return prefix && a.gate.data ? a.b * a.h * a.t : 0; }
};

// A tile of rows of the queries that share a key head, and a tile of its keys; of both, that many exist.
struct TilePair {
  int sequence, prefix;  // the prefix of the sequence, if its keys are meant: else -1
  int key_head, row, rows, key, keys;

  __device__ __forceinline__ int row_extent() const { return round_up(rows, 16); }
  __device__ __forceinline__ int key_extent() const { return round_up(keys, 16); }
  __device__ __forceinline__ bool warp_has_rows() const { return static_cast<int>(threadIdx.x) / 32 * 16 < rows; }
};

// The rows of a tile of queries, with one division for all of them.
struct TileRows {
  const AttentionBackward& p;
  int head, token, rest;  // the first head of the group; of the first row the token, and the head in the group

  __device__ __forceinline__ TileRows(const AttentionBackward& p, int key_head, int row)
      : p(p), head(key_head * p.a.group), token(row / p.a.group), rest(row - token * p.a.group) {}
  __device__ __forceinline__ Query at(int i) const {
    const int group = p.a.group, row = rest + i, tokens = group < kSide ? row * p.inverse >> 16 : row >= group;
    return Query{head + row - tokens * group, token + tokens};
  }
};

// What a step loads: rows of queries, or tokens, of one key head.
struct Side {
  const Heads* heads;  // nullptr: nothing
  int sequence, first, count;
  bool by_query;
};
__device__ __forceinline__ Side queries_of(const Heads& heads, const TilePair& pair) {
  return Side{&heads, pair.sequence, pair.row, pair.rows, true};
}
__device__ __forceinline__ Side keys_of(const PrefixAttention& a, const TilePair& pair, bool values) {
  if (pair.prefix >= 0) return Side{values ? &a.prefix_v : &a.prefix_k, pair.prefix, pair.key, pair.keys, false};
  return Side{values ? &a.v : &a.k, pair.sequence, pair.key, pair.keys, false};
}

// Starts to fill a tile with kDepth columns of its rows, from `column` on.
template <class T>
__device__ __forceinline__ void load_side(T* tile, const AttentionBackward& p, const Side& side, int key_head, int column) {
  using P = PairShape<T>;
  if (!side.heads) return;
  const Heads& heads = *side.heads;
  const int rows = round_up(side.count, 16), valid = p.a.e - column, columns = least(round_up(valid, 16), P::kDepth);
  const int64_t stride = heads.inner.stride;
  if constexpr (sizeof(T) == 2)
    if (heads.is_float) {  // a prefix, rounded here
      const float* from = heads.at<float>(side.sequence, key_head, side.first) + column * stride;
      own_elements<P::kDepth>(rows, columns, stride != 1, [&](int i, int c) {
        tile[i * P::kRow + c] = from_float<T>(i < side.count && c < valid ? from[i * heads.token + c * stride] : 0.f);
      });
      return;
    }
  const TileRows queries(p, key_head, side.first);
  load_tile<P::kDepth>(tile, rows, columns, valid, heads.inner, [&](int i) -> const T* {
    if (i >= side.count) return nullptr;
    const Query query = side.by_query ? queries.at(i) : Query{key_head, side.first + i};
    return heads.at<T>(side.sequence, query.head, query.token) + column * stride;
  });
}

// Goes over `count` pairs.  Of each the scores are computed, with `values` also the products of grad_y with the values:
// weigh(pair, scores, products) sees them, in the layout of accumulators, in the warps that have rows.  Then come `chunks`
// steps of kDepth columns from `first` on: use(pair, chunk, left, right) sees what sides(pair, left, right) asked for.
template <class T, class Walk, class Sides, class Weigh, class Use>
__device__ __forceinline__ void over_pairs(const AttentionBackward& p, T* stages, int64_t count, Walk walk, bool values,
    int first, int chunks, Sides sides, Weigh weigh, Use use) {
  using P = PairShape<T>;
  const PrefixAttention& a = p.a;
  const int depth = static_cast<int>(divide_up(a.e, P::kDepth)), scored = values ? 2 * depth : depth;
  const int steps = scored + chunks;
  Walk ahead = walk;
  int step_ahead = 0, step = 0;
  float s[8][4] = {}, d[8][4] = {}, unused[4];
  pipeline<P::kStages>(
      count * steps,
      [&](int64_t, int stage) {
        T* tile = stages + stage * 2 * P::kTile;
        const TilePair pair = ahead.pair(a);
        const bool second = step_ahead >= depth;
        Side left{}, right{};
        int column = (second ? step_ahead - depth : step_ahead) * P::kDepth;
        if (step_ahead < scored) {
          left = queries_of(second ? p.grad_y : a.q, pair), right = keys_of(a, pair, second);
        } else {
          sides(pair, left, right);
          column = first + (step_ahead - scored) * P::kDepth;
        }
        load_side(tile, p, left, pair.key_head, column);
        load_side(tile + P::kTile, p, right, pair.key_head, column);
        if (++step_ahead == steps) step_ahead = 0, ahead.next(a);
      },
      [](int64_t, int) {},
      [&](int64_t, int stage) {
        const T *left = stages + stage * 2 * P::kTile, *right = left + P::kTile;
        const TilePair pair = walk.pair(a);
        if (step >= scored) {
          use(pair, step - scored, left, right);
        } else if (pair.warp_has_rows()) {
          const int column = (step < depth ? step : step - depth) * P::kDepth;
          const int width = least(round_up(a.e - column, 16), P::kDepth), live = pair.key_extent() / 8;
          const T* rows = left + threadIdx.x / 32 * 16 * P::kRow;
          if (step < depth) multiply<8, false, false, false>(s, unused, rows, P::kRow, right, P::kRow, width, live);
          else multiply<8, false, false, false>(d, unused, rows, P::kRow, right, P::kRow, width, live);
          if (step + 1 == scored) {
            weigh(pair, s, d);
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
              for (int i = 0; i < 4; i++) s[j][i] = d[j][i] = 0.f;
          }
        }
        if (++step == steps) step = 0, walk.next(a);
      });
}

// Which weights of a row stay: bit 2 * j + i for column 8 * j + 2 * (lane % 4) + i.
__device__ __forceinline__ uint32_t kept_weights(const Dropout& dropout, int64_t row, int64_t column0) {
  const int lane = threadIdx.x % 32, own = lane % 4;
  uint32_t bits = 0;
#pragma unroll
  for (int j = 0; j < 8; j += 4) {
    const unsigned mine = kept(dropout, row, column0 / 8 + j + own);
#pragma unroll
    for (int block = 0; block < 4; block++)
      bits |= (__shfl_sync(0xffffffffu, mine, lane - own + block) >> own * 2 & 3) << (j + block) * 2;
  }
  return bits;
}

// Scores become weights, of which dropped ones are 0 and the others lack the scale of dropout.  Products become gradients of
// scores, or the terms of `delta`, which know no gate.
template <bool FOR_DELTA, class T>
__device__ __forceinline__ void weigh_pair(
    float (&s)[8][4], float (&d)[8][4], const AttentionBackward& p, const TilePair& pair) {
  const PrefixAttention& a = p.a;
  const int lane = threadIdx.x % 32;
  const TileRows queries(p, pair.key_head, pair.row);
  const bool prefix = pair.prefix >= 0, masked = !prefix && a.mask.data;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = threadIdx.x / 32 * 16 + lane / 4 + half * 8;
    const Query query = queries.at(row);
    const int64_t number = query.number(a, pair.sequence), at = p.part(prefix) + number;
    uint32_t stay = ~0u;
    if (a.dropout.threshold) stay = kept_weights(a.dropout, number, (prefix ? 0 : a.own_column) + pair.key);
    const float lse = row < pair.rows ? p.lse[at] : -INFINITY;
    int seen = 0;  // keys of the tile, but for a mask
    if (lse != -INFINITY) seen = prefix ? pair.keys : a.bound(query.token, pair.key + pair.keys) - pair.key;
    const float less = !FOR_DELTA && seen > 0 && p.delta ? p.delta[at] : 0.f;
    const float factor = !FOR_DELTA && prefix && a.gate.data ? a.gate.at<T>(query.head) : 1.f;
    const int64_t mask = masked ? a.mask.offset(pair.sequence, query.head, query.token) : 0;
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int key = j * 8 + lane % 4 * 2 + i;
        float &w = s[j][half * 2 + i], &product = d[j][half * 2 + i], score = -INFINITY;
        if (key < seen) score = masked ? a.mask.add<T>(a.scale * w, mask, pair.key + key) : a.scale * w;
        const bool sees = score != -INFINITY, stays = stay >> (j * 2 + i) & 1;
        const float weight = sees ? factor * exp_fast(score - lse) : 0.f;
        if (a.dropout.threshold) product = stays ? a.dropout.scale * product : 0.f;
        product = sees ? weight * (product - less) : 0.f;
        w = stays ? weight : 0.f;
      }
  }
}

// Accumulators of a warp to its rows of a tile of weights.
template <class T>
__device__ __forceinline__ void store_weights(T* tile, const float (&v)[8][4], int columns) {
  constexpr int kRow = PairShape<T>::kWeightRow;
  const int lane = threadIdx.x % 32;
  T* to = tile + (threadIdx.x / 32 * 16 + lane / 4) * kRow + lane % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int j = 0; j < 8; j++)
      if (j * 8 < columns) store_pair(to + half * 8 * kRow + j * 8, v[j][half * 2], v[j][half * 2 + 1], true, 2);
}

// A tile of rows of the queries that share a key head.
struct RowBlock {
  int sequence, key_head, row, rows;

  __device__ __forceinline__ RowBlock(const PrefixAttention& a, int64_t index) {
    const int64_t tiles = divide_up(a.rows(), kSide), line = index / tiles;
    row = static_cast<int>(tiles - 1 - index % tiles) * kSide;  // the last see the most keys, and begin first
    rows = least(kSide, a.rows() - row);
    key_head = static_cast<int>(line % a.h_kv), sequence = static_cast<int>(line / a.h_kv);
  }
};

// The tiles of keys that meet a tile of rows: those of the prefix, then the own ones that a row sees.
struct KeyWalk {
  RowBlock block;
  int prefix, key, prefix_keys, own_keys;

  __device__ __forceinline__ KeyWalk(const PrefixAttention& a, const RowBlock& rows, bool with_own)
      : block(rows), key(0) {
    const Prefix of(a, rows.sequence);
    prefix_keys = of.keys, prefix = of.keys ? static_cast<int>(of.index) : -1;
    own_keys = with_own ? a.bound((rows.row + rows.rows - 1) / a.group, a.own_keys(rows.sequence)) : 0;
  }
  __device__ __forceinline__ int64_t count() const { return divide_up(prefix_keys, kSide) + divide_up(own_keys, kSide); }
  __device__ __forceinline__ TilePair pair(const PrefixAttention&) const {
    const int end = prefix >= 0 ? prefix_keys : own_keys;
    return TilePair{block.sequence, prefix, block.key_head, block.row, block.rows, key, least(kSide, end - key)};
  }
  __device__ __forceinline__ void next(const PrefixAttention&) {
    key += kSide;
    if (prefix >= 0 && key >= prefix_keys) key = 0, prefix = -1;
  }
};

// Eight neighbours of a row.
template <class T>
struct alignas(16) Eight {
  T at[8];
};
template <class T>
__device__ __forceinline__ Eight<T> load_eight(const T* from, Inner inner) {
  if (inner.vector) return *reinterpret_cast<const Eight<T>*>(from);
  Eight<T> v;
#pragma unroll
  for (int i = 0; i < 8; i++) v.at[i] = from[i * inner.stride];
  return v;
}

// The products of the rows of y with those of grad_y; threads side by side share a row.  done(row, query, sum) is called once.
template <class T, class F>
__device__ __forceinline__ void dot_rows(const AttentionBackward& p, const RowBlock& block, F done) {
  int lanes = 1;
  while (lanes * 8 < p.a.e) lanes *= 2;
  const int column = threadIdx.x % lanes * 8;
  for (int first = 0; first < block.rows; first += kThreads / lanes) {
    const int row = first + threadIdx.x / lanes;
    const Query query(p.a, block.key_head, block.row + row);
    float sum = 0.f;
    if (row < block.rows && column < p.a.e) {
      const Heads &y = p.y, &grad_y = p.grad_y;
      const Eight<T> left = load_eight(y.at<T>(block.sequence, query.head, query.token) + column * y.inner.stride, y.inner);
      const Eight<T> right = load_eight(
          grad_y.at<T>(block.sequence, query.head, query.token) + column * grad_y.inner.stride, grad_y.inner);
      float four[4];
#pragma unroll
      for (int i = 0; i < 4; i++)
        four[i] = to_float(left.at[i]) * to_float(right.at[i]) + to_float(left.at[i + 4]) * to_float(right.at[i + 4]);
      sum = (four[0] + four[1]) + (four[2] + four[3]);
    }
    for (int other = 1; other < lanes; other *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
    if (row < block.rows && column == 0) done(row, query, sum);
  }
}

// One block: delta of a tile of rows.  With a gate, that of the prefix is computed, and taken from that of the own keys.
template <class T>
__global__ void __launch_bounds__(kThreads, 3) prefix_attention_delta_kernel(const __grid_constant__ AttentionBackward p) {
  FA_DYNAMIC_SHARED(shared);
  const RowBlock block(p.a, blockIdx.x);
  if (!p.a.gate.data) {
    dot_rows<T>(p, block, [&](int, const Query& query, float sum) { p.delta[query.number(p.a, block.sequence)] = sum; });
    return;
  }
  float *dots = reinterpret_cast<float*>(shared + PairShape<T>::kStageBytes), sum[2] = {};
  dot_rows<T>(p, block, [&](int row, const Query&, float v) { dots[row] = v; });
  const KeyWalk walk(p.a, block, false);
  over_pairs(
      p, reinterpret_cast<T*>(shared), walk.count(), walk, true, 0, 0, [](const TilePair&, Side&, Side&) {},
      [&](const TilePair& pair, float(&s)[8][4], float(&d)[8][4]) {
        weigh_pair<true, T>(s, d, p, pair);
#pragma unroll
        for (int half = 0; half < 2; half++) {
          float four[4] = {};
#pragma unroll
          for (int j = 0; j < 8; j++) four[j % 4] += d[j][half * 2] + d[j][half * 2 + 1];
          sum[half] += (four[0] + four[1]) + (four[2] + four[3]);
        }
      },
      [](const TilePair&, int, const T*, const T*) {});
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4 + half * 8;
    const float of_prefix = row_sum(sum[half]);
    if (lane % 4 || row >= block.rows) continue;
    const Query query(p.a, block.key_head, block.row + row);
    const int64_t number = query.number(p.a, block.sequence);
    p.delta[p.part(true) + number] = of_prefix;
    p.delta[number] = dots[row] - p.a.gate.at<T>(query.head) * of_prefix;
  }
}

}  // namespace fastadapt
