// Dropout as a function of (seed, row, column), bit for bit as fastadapt/ops/dropout.py defines it.
#pragma once
#include "simd.h"

namespace fastadapt::FA_TARGET {

struct Dropout {
  uint64_t seed;
  uint32_t threshold;  // of 65536; 0: nothing is dropped
  double scale;        // of what stays
};

// Columns that one vector of counters serves: a counter gives eight.
constexpr int64_t drawn_columns = 8 * FA_LANES;

// The next seven rounds of Philox4x32, in every lane.
FA_INLINE void philox(uint64_t seed, uint32_t (&c)[4][FA_LANES]) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 7; ++round) {
    for (int l = 0; l < FA_LANES; ++l) {
      const uint64_t p0 = static_cast<uint64_t>(c[0][l]) * 0xD2511F53u, p1 = static_cast<uint64_t>(c[2][l]) * 0xCD9E8D57u;
      c[0][l] = static_cast<uint32_t>(p1 >> 32) ^ c[1][l] ^ key0;
      c[1][l] = static_cast<uint32_t>(p1);
      c[2][l] = static_cast<uint32_t>(p0 >> 32) ^ c[3][l] ^ key1;
      c[3][l] = static_cast<uint32_t>(p0);
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// Factors of columns [first, first + count) of a row: 0, or drop.scale. `first` is a multiple of 8; `out` has room for
// round_up(count, drawn_columns).
template <class C>
void dropout_factors(const Dropout& drop, int64_t row, int64_t first, int64_t count, C* out) {
  const C scale = static_cast<C>(drop.scale);
  for (int64_t j = 0; j < count; j += drawn_columns) {
    uint32_t c[4][FA_LANES];
    for (int l = 0; l < FA_LANES; ++l) {
      c[0][l] = static_cast<uint32_t>((first + j) / 8 + l);
      c[1][l] = static_cast<uint32_t>(row);
      c[2][l] = static_cast<uint32_t>(row >> 32);
      c[3][l] = 0;
    }
    philox(drop.seed, c);
    for (int l = 0; l < FA_LANES; ++l)
      for (int w = 0; w < 4; ++w) {
        out[j + 8 * l + 2 * w] = (c[w][l] & 0xFFFF) >= drop.threshold ? scale : 0;
        out[j + 8 * l + 2 * w + 1] = (c[w][l] >> 16) >= drop.threshold ? scale : 0;
      }
  }
}

}  // namespace fastadapt::FA_TARGET
