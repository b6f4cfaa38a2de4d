// What both directions of prefix_attention share: the arguments as kernels see them, tiles of scores, who sees whom.
//
// The queries of all heads that share a key head are the rows of one matrix, heads fastest: a tile of rows then reads its keys
// once, and has neighbouring tokens under a causal mask.  Row r is token r / group of query head key_head * group + r % group.
#pragma once
#include "dropout.cuh"
#include "rows.cuh"

namespace fastadapt {

// A (sequences, heads, tokens, e) tensor of any strides.
struct Heads {
  const void* data;
  int64_t sequence, head, token;  // strides; sequence is 0 where all sequences share one
  Inner inner;
  int is_float;  // float32 instead of T

  template <class T>
  __device__ __forceinline__ const T* at(int64_t i, int64_t of_head, int64_t of_token) const {
    return static_cast<const T*>(data) + i * sequence + of_head * head + of_token * token;
  }
};

enum class MaskKind { boolean, same, float32 };  // same: the dtype of q

// Which own keys a query sees, or what is added to their scores.
struct Mask {
  const void* data;  // nullptr: absent
  MaskKind kind;
  int64_t sequence, head, token, key;  // strides

  __device__ __forceinline__ int64_t offset(int64_t i, int64_t of_head, int64_t of_token) const {
    return i * sequence + of_head * head + of_token * token;
  }
  // A score with the mask: -inf where the key is hidden, whatever the score.
  template <class T>
  __device__ __forceinline__ float add(float score, int64_t offset, int64_t of_key) const {
    const int64_t at = offset + of_key * key;
    if (kind == MaskKind::boolean) return static_cast<const unsigned char*>(data)[at] ? score : -INFINITY;
    const float added =
        kind == MaskKind::same ? to_float(static_cast<const T*>(data)[at]) : static_cast<const float*>(data)[at];
    return added == -INFINITY ? added : score + added;
  }
};

// A number for each sequence.
struct Integers {
  const void* data;  // nullptr: absent
  int64_t stride;
  int bytes, is_signed;

  __device__ __forceinline__ int64_t at(int64_t i) const { return integer_at(data, i * stride, bytes, is_signed); }
};

struct PrefixAttention {
  int64_t b;
  int h, h_kv, group, t, t_k, p, e;  // group: query heads of a key head
  Heads q, k, v, prefix_k, prefix_v;
  Vector gate;  // (h,); data is nullptr where one softmax is over all keys
  Mask mask;
  Integers lengths, ids;
  int64_t g;  // prefixes in the bank
  Dropout dropout;
  int own_column;  // of the dropout matrix, that of the first own key
  float scale;
  int causal;

  __device__ __forceinline__ int rows() const { return group * t; }  // of a key head
  __device__ __forceinline__ int depth() const { return round_up(e, 16); }  // of tiles: zeros beyond e

  // Own keys of a sequence that aren't padding.
  __device__ __forceinline__ int own_keys(int64_t i) const {
    if (!lengths.data) return t_k;
    const int64_t length = lengths.at(i);
    return static_cast<int>(length < 0 ? 0 : least<int64_t>(length, t_k));
  }
  // A token sees own keys below this, as far as the mask lets it.
  __device__ __forceinline__ int bound(int token, int own_keys) const {
    const int end = token + t_k - t + 1;
    return !causal || end > own_keys ? own_keys : end > 0 ? end : 0;
  }
  // Tokens from this one on see an own key, as far as lengths and the mask let them.
  __device__ __forceinline__ int first_token(int key) const { return causal && key + t > t_k ? key + t - t_k : 0; }
};

// A row of the queries that share a key head.
struct Query {
  int head, token;

  __device__ __forceinline__ Query(int head, int token) : head(head), token(token) {}
  __device__ __forceinline__ Query(const PrefixAttention& p, int key_head, int row)
      : head(key_head * p.group + row % p.group), token(row / p.group) {}
  // Among all b * h * t rows: of lse and of the dropout matrix.
  __device__ __forceinline__ int64_t number(const PrefixAttention& p, int64_t i) const {
    return (i * p.h + head) * p.t + token;
  }
  // The first element of the row in a tensor laid out as (b, t, h, e).
  __device__ __forceinline__ int64_t by_token(const PrefixAttention& p, int64_t i) const {
    return ((i * p.t + token) * p.h + head) * p.e;
  }
};

// The prefix of a sequence.
struct Prefix {
  int64_t index;  // in the tensor
  int keys;       // 0 if the sequence has none
  bool outside;   // the id lies outside the bank

  __device__ __forceinline__ Prefix(const PrefixAttention& p, int64_t i) : index(i), keys(p.p), outside(false) {
    if (!p.ids.data) return;
    index = p.ids.at(i);
    outside = index < -1 || index >= p.g;
    if (index < 0 || outside) keys = 0;
  }
};

// Starts to fill a tile with rows of a head: tokens begin.. of which those below `end` exist, on `rows` lines.  What doesn't
// exist becomes zero.
template <int E, class T>
__device__ __forceinline__ void load_tokens(
    T* tile, int rows, const Heads& heads, int64_t i, int head, int begin, int end, int e) {
  const int columns = round_up(e, 16);
  if constexpr (sizeof(T) == 2)
    if (heads.is_float) {  // a prefix, rounded here
      const float* from = heads.at<float>(i, head, begin);
      own_elements<E>(rows, columns, heads.inner.stride != 1, [&](int row, int column) {
        const bool valid = begin + row < end && column < e;
        tile[row * Shape<T>::padded(E) + column] =
            from_float<T>(valid ? from[row * heads.token + column * heads.inner.stride] : 0.f);
      });
      return;
    }
  const T* from = heads.at<T>(i, head, begin);
  load_tile<E>(tile, rows, columns, e, heads.inner,
      [&](int row) { return begin + row < end ? from + row * heads.token : nullptr; });
}

// The same for rows of the queries that share a key head.
template <int E, class T>
__device__ __forceinline__ void load_queries(
    T* tile, int rows, const PrefixAttention& p, const Heads& heads, int64_t i, int key_head, int begin) {
  load_tile<E>(tile, rows, p.depth(), p.e, heads.inner, [&](int row) -> const T* {
    if (begin + row >= p.rows()) return nullptr;
    const Query query(p, key_head, begin + row);
    return heads.at<T>(i, query.head, query.token);
  });
}

// products = a @ b.T over the width of a head, for 16 rows of a and `live` blocks of 8 rows of b, all in tiles E wide.
template <int E, int NI, class T>
__device__ __forceinline__ void multiply_heads(float (&products)[NI][4], const T* a, const T* b, int depth, int live) {
  constexpr int kRow = Shape<T>::padded(E);
  float unused[4];
#pragma unroll
  for (auto& block : products)
    for (float& v : block) v = 0.f;
  // In the steps of backward: its scores then have the bits of those that the log-sum-exp is of, and its weights sum to one.
  constexpr int kDepth = Shape<T>::kDepth;
#pragma unroll 1
  for (int k = 0; k < depth; k += kDepth)
    multiply<NI, false, false, false>(products, unused, a + k, kRow, b + k, kRow, least(depth - k, kDepth), live);
}

// Two neighbours of a row as an operand of the tensor cores.
template <class T>
__device__ __forceinline__ uint32_t packed(float first, float second) {
  const Pair<T> pair{from_float<T>(first), from_float<T>(second)};
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}

// Floats of shared memory that `weigh` needs: tensor cores take the weights from registers, other products from memory.
template <class T, int NI>
constexpr int weigh_scratch() {
  return sizeof(T) == 2 ? 0 : kWarps * 16 * (NI * 8 + 4);
}

// acc += weights @ b for the weights in a warp's accumulators, rounded to T: 16 rows, `depth` columns.  b is (depth, columns)
// in a tile E wide, of whose columns `live` blocks of 8 are wanted.
template <int E, int NI, int NJ, class T>
__device__ __forceinline__ void weigh(
    float (&acc)[NJ][4], const float (&weights)[NI][4], float* scratch, const T* b, int depth, int live) {
  constexpr int kRow = Shape<T>::padded(E);
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int k = 0; k < NI; k += 2) {
      if (k * 8 >= depth) break;
      const uint32_t fa[4] = {packed<T>(weights[k][0], weights[k][1]), packed<T>(weights[k][2], weights[k][3]),
          packed<T>(weights[k + 1][0], weights[k + 1][1]), packed<T>(weights[k + 1][2], weights[k + 1][3])};
#pragma unroll
      for (int j = 0; j < NJ; j += 2) {
        if (j >= live) break;
        uint32_t fb[4];
        ldmatrix_x4<true>(fb, b + (k * 8 + lane % 16) * kRow + j * 8 + lane / 16 * 8);
        mma_m16n8k16<T>(acc[j], fa, fb[0], fb[1]);
        mma_m16n8k16<T>(acc[j + 1], fa, fb[2], fb[3]);
      }
    }
  } else {
    constexpr int kLine = NI * 8 + 4;
    float *mine = scratch + threadIdx.x / 32 * 16 * kLine, unused[4];
    __syncwarp();  // all lanes have left the weights of the tile before
#pragma unroll
    for (int k = 0; k < NI; k++) {
      if (k * 8 >= depth) break;
      float* to = mine + lane / 4 * kLine + k * 8 + lane % 4 * 2;
      *reinterpret_cast<float2*>(to) = float2{weights[k][0], weights[k][1]};
      *reinterpret_cast<float2*>(to + 8 * kLine) = float2{weights[k][2], weights[k][3]};
    }
    __syncwarp();
    static_assert(NJ % 8 == 0);
#pragma unroll
    for (int j = 0; j < NJ; j += 8) {
      if (j >= live) break;
      multiply<8, false, true, false>(
          reinterpret_cast<float(&)[8][4]>(acc[j]), unused, mine, kLine, b + j * 8, kRow, depth, live - j);
    }
  }
}

// e ** v, for v <= 0.
__device__ __forceinline__ float exp_fast(float v) { return exp2_approx(v * 1.44269504f); }

// What is subtracted from scores whose largest, or whose log-sum-exp, is `top`: where nothing is seen it must not be -inf.
__device__ __forceinline__ float shift_of(float top) { return top == -INFINITY ? 0.f : top; }

// The largest, and the sum, over the four lanes that hold a row.
__device__ __forceinline__ float row_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 1));
  return fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 2));
}
__device__ __forceinline__ float row_sum(float v) {
  v += __shfl_xor_sync(0xffffffffu, v, 1);
  return v + __shfl_xor_sync(0xffffffffu, v, 2);
}

// The score of an own key, of the product of query and key; at or beyond the query's bound it is -inf.
template <class T>
__device__ __forceinline__ float own_score(const PrefixAttention& p, float product, int64_t mask_offset, int key, int bound) {
  if (key >= bound) return -INFINITY;
  return p.mask.data ? p.mask.add<T>(p.scale * product, mask_offset, key) : p.scale * product;
}

}  // namespace fastadapt
