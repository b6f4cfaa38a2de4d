// Dropout as a function of (seed, row, column), bit for bit as in fastadapt/ops/dropout.py: no mask is stored.
#pragma once
#include "tiles.cuh"

namespace fastadapt {

struct Dropout {
  const int64_t* seed;  // on the device
  uint32_t threshold;   // of 65536: how often an element is dropped; 0: never
  float scale;          // of the elements that stay
};

// Which of the columns 8 * block .. 8 * block + 7 of a row stay: bit i for column i.  Philox4x32 with seven rounds.
__device__ __forceinline__ unsigned kept(const Dropout& dropout, int64_t row, int64_t block) {
  const uint64_t seed = static_cast<uint64_t>(*dropout.seed), position = static_cast<uint64_t>(row);
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(position), c2 = static_cast<uint32_t>(position >> 32);
  uint32_t c3 = 0;
#pragma unroll
  for (int round = 0; round < 7; round++) {
    const uint64_t first = uint64_t{c0} * 0xD2511F53u, second = uint64_t{c2} * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ key0, c1 = static_cast<uint32_t>(second);
    c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ key1, c3 = static_cast<uint32_t>(first);
    key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
  }
  unsigned bits = 0;
  int i = 0;
  for (uint32_t word : {c0, c1, c2, c3}) {
    bits |= static_cast<unsigned>((word & 0xffffu) >= dropout.threshold) << i++;
    bits |= static_cast<unsigned>(word >> 16 >= dropout.threshold) << i++;
  }
  return bits;
}

// Drops elements of a tile that this thread loaded; row_of(i) numbers its rows, its first column is `column0`, a multiple of 8.
template <int COLUMNS, class T, class Row>
__device__ __forceinline__ void drop_tile(
    T* tile, int rows, int columns, Inner inner, const Dropout& dropout, Row row_of, int64_t column0) {
  constexpr int kVector = Shape<T>::kVector, kRow = Shape<T>::padded(COLUMNS);
  if (inner.vector) {
    own_vectors<COLUMNS, kVector>(rows, columns, [&](int row, int column) {
      unsigned bits = kept(dropout, row_of(row), (column0 + column) / 8) >> column % 8;
      uint4& four = *reinterpret_cast<uint4*>(tile + row * kRow + column);
      auto drop = [&](uint32_t& word) {
        if constexpr (sizeof(T) == 2) word &= (bits & 1 ? 0xffffu : 0u) | (bits & 2 ? 0xffff0000u : 0u);
        else word &= bits & 1 ? 0xffffffffu : 0u;
        bits >>= 4 / sizeof(T);
      };
      uint4 words = four;
      drop(words.x), drop(words.y), drop(words.z), drop(words.w);
      four = words;
    });
  } else {
    own_elements<COLUMNS>(rows, columns, inner.stride != 1, [&](int row, int column) {
      const int64_t at = column0 + column;
      if (!(kept(dropout, row_of(row), at / 8) >> at % 8 & 1)) tile[row * kRow + column] = from_float<T>(0.f);
    });
  }
}

// Drops elements of the accumulators of a warp, whose rows are `rows` and whose first column is `column0`, a multiple of 8, and
// scales the others.  The four lanes of a row draw the numbers of four blocks of 8 columns and tell one another.
template <int MI, int NI>
__device__ __forceinline__ void drop_accumulators(
    float (&acc)[MI][NI][4], const Dropout& dropout, const int64_t* rows, int64_t column0) {
  const int lane = threadIdx.x % 32, own = lane % 4;
#pragma unroll
  for (int i = 0; i < MI; i++)
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int j = 0; j < NI; j += 4) {
        const unsigned mine = kept(dropout, rows[i * 16 + lane / 4 + half * 8], column0 / 8 + j + own);
#pragma unroll
        for (int block = 0; block < least(4, NI - j); block++) {
          const unsigned bits = __shfl_sync(0xffffffffu, mine, lane - own + block) >> own * 2;
          float(&pair)[4] = acc[i][j + block];
          pair[half * 2] = bits & 1 ? pair[half * 2] * dropout.scale : 0.f;
          pair[half * 2 + 1] = bits & 2 ? pair[half * 2 + 1] * dropout.scale : 0.f;
        }
      }
}

}  // namespace fastadapt
