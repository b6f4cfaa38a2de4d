// Dropout as a function of (seed, row, column), bit for bit as fastadapt/ops/dropout.py defines it.
#pragma once
#include "simd.h"

namespace fastadapt::FA_TARGET {

struct Dropout {
  uint64_t seed;
  uint32_t threshold;  // of 65536; 0: nothing is dropped
  double scale;        // of what stays
};

// One 32-bit word of a counter in each lane of 64 bits; what the upper halves hold means nothing.
typedef uint64_t Words __attribute__((vector_size(4 * FA_LANES)));

// Columns that one vector of counters serves: a counter gives eight.
constexpr int64_t drawn_columns = 4 * FA_LANES;

// The product of the lower halves.
FA_INLINE Words product(Words a, uint32_t b) {
#if defined(FA_AVX512)
  return bit_cast<Words>(_mm512_mul_epu32(bit_cast<__m512i>(a), _mm512_set1_epi64(b)));
#elif defined(FA_AVX2)
  return bit_cast<Words>(_mm256_mul_epu32(bit_cast<__m256i>(a), _mm256_set1_epi64x(b)));
#else
  return (a & 0xFFFFFFFFu) * b;
#endif
}

// Seven rounds of Philox4x32.
FA_INLINE void philox(uint64_t seed, Words (&c)[4]) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 7
  for (int round = 0; round < 7; ++round) {
    const Words p0 = product(c[0], 0xD2511F53u), p1 = product(c[2], 0xCD9E8D57u);
    c[0] = p1 >> 32 ^ c[1] ^ key0;
    c[1] = p1;
    c[2] = p0 >> 32 ^ c[3] ^ key1;
    c[3] = p0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// Factors of columns [first, first + count) of a row: 0, or drop.scale. `first` is a multiple of 8; `out` has room for
// round_up(count, drawn_columns).
template <class C>
void dropout_factors(const Dropout& drop, int64_t row, int64_t first, int64_t count, C* out) {
  constexpr int counters = FA_LANES / 2;
  const C scale = static_cast<C>(drop.scale);
  for (int64_t j = 0; j < count; j += drawn_columns) {
    Words block = {};
    for (int l = 0; l < counters; ++l) block[l] = (first + j) / 8 + l;
    Words c[4] = {block, Words{} + (row & 0xFFFFFFFF), Words{} + (row >> 32), Words{}};
    philox(drop.seed, c);
    Words pair[2];
    for (int w = 0; w < 2; ++w) pair[w] = (c[2 * w] & 0xFFFFFFFFu) | c[2 * w + 1] << 32;
    uint64_t words[2 * counters];  // the columns of a counter one behind the other, 16 bits each
    for (int l = 0; l < counters; ++l)
      for (int w = 0; w < 2; ++w) words[2 * l + w] = pair[w][l];
    uint16_t numbers[drawn_columns];
    memcpy(numbers, words, sizeof numbers);
    for (int64_t i = 0; i < drawn_columns; ++i) out[j + i] = numbers[i] >= drop.threshold ? scale : 0;
  }
}

}  // namespace fastadapt::FA_TARGET
