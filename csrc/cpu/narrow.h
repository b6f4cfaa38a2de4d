// Products with few columns, such as a projection to rank 8, as dot products: vectors run along the inner dimension, where a
// tile of gemm.h would leave the lanes beyond the columns idle.
#pragma once
#include "gemm.h"

namespace fastadapt::FA_TARGET {

// A tile of sums, one vector each.
constexpr int narrow_rows = 3, narrow_columns = FA_LANES == 16 ? 8 : 4;

// Inner indices per pass: the right operand's part stays in the first-level cache.
constexpr int64_t narrow_inner = 1024;

FA_INLINE constexpr bool is_narrow(int64_t n) { return n <= narrow_columns; }
template <class C>
FA_INLINE constexpr int64_t narrow_size(int64_t k) { return narrow_columns * padded<C>(k); }

// packed[vector along k][column][lane]; columns past n and rows past k become zero.
template <class C, class S>
void pack_narrow(const Source<C, S>& b, C* packed) {
  constexpr int L = lanes<C>;
  for (int64_t i = 0; i < b.k; i += L)
    for (int64_t j = 0; j < narrow_columns; ++j, packed += L) {
      const int64_t count = least(L, b.k - i);
      Vec<C> v = {};
      if (j < b.n) {
        const S* from = b.data + i * b.k_stride + j * b.n_stride;
        v = b.k_stride == 1 && count == L ? load<C>(from) : load_some<C>(from, count, b.k_stride);
        if (b.k_factor) v *= load_some<C>(b.k_factor + i, count);
        if (b.n_factor) v *= b.n_factor[j];
      }
      store(packed, v);
    }
}

// Lane l of the result is the sum of the lanes of v[l % N].
template <class C, int N, int BIT = 1>
FA_INLINE Vec<C> sums(Vec<C> (&v)[N]) {
  constexpr std::make_integer_sequence<int, lanes<C>> indices;
#pragma GCC unroll 8
  for (int i = 0; i < N; i += 2 * BIT) {
    const Vec<C> a = v[i], b = v[(i + BIT) % N];
    v[i] = exchange<BIT, false>(a, b, indices) + exchange<BIT, true>(a, b, indices);
  }
  if constexpr (2 * BIT < lanes<C>) return sums<C, N, 2 * BIT>(v);
  return v[0];
}

// c = a * b + start, or with accumulate c += a * b, like gemm() of gemm.h, for a b of few columns that pack_narrow packed.
template <class C>
void gemm_narrow(int64_t rows, int64_t k, const C* a, int64_t lda, const C* packed, const C* start, C* c, int64_t ldc,
                 bool accumulate = false) {
  constexpr int L = lanes<C>, N = narrow_columns;
  auto tile = [&](auto mr, int64_t i, int64_t k0, int64_t k1) FA_FORCED {
    constexpr int MR = decltype(mr)::value;
    Vec<C> acc[MR][N] = {};
    const C *row = a + i * lda, *b = packed + k0 * N;
    auto step = [&](int64_t p, auto&& left) FA_FORCED {
      Vec<C> x[MR];
#pragma GCC unroll 4
      for (int t = 0; t < MR; ++t) x[t] = left(row + t * lda + p);
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j, b += L) {
        Vec<C> w = load<C>(b);
#if defined(FA_AVX512)
        asm("" : "+x"(w));  // keeps it in a register: as an operand in memory it would be loaded for every row
#endif
#pragma GCC unroll 4
        for (int t = 0; t < MR; ++t) acc[t][j] += x[t] * w;
      }
    };
    int64_t p = k0;
    for (; p + L <= k1; p += L) step(p, [](const C* x) FA_FORCED { return load<C>(x); });
    if (p < k1) step(p, [&](const C* x) FA_FORCED { return load_some<C>(x, k1 - p); });
#pragma GCC unroll 4
    for (int t = 0; t < MR; ++t) {
      C* out = c + (i + t) * ldc;
      Vec<C> before = {}, total = sums<C, N>(acc[t]);
      if (const C* from = k0 || accumulate ? out : start) memcpy(&before, from, N * sizeof(C));
      total += before;
      memcpy(out, &total, N * sizeof(C));
      for (int j = N; j < L; ++j) out[j] = 0;
    }
  };
  int64_t k0 = 0;
  do {
    const int64_t k1 = least(k, k0 + narrow_inner);
    int64_t i = 0;
    for (; i + narrow_rows <= rows; i += narrow_rows) tile(RowCount<narrow_rows>{}, i, k0, k1);
    for (; i < rows; ++i) tile(RowCount<1>{}, i, k0, k1);
    k0 = k1;
  } while (k0 < k);
}

// A projection of rows to n columns, few or many: size of its packed right operand, the share `part` of `parts` of packing it
// (nothing where `packed` is null), and the product with rows of c padded(n) apart.
template <class C>
FA_INLINE constexpr int64_t projection_size(int64_t k, int64_t n) {
  return is_narrow(n) ? narrow_size<C>(k) : packed_size<C>(k, n);
}
template <class C, class S>
FA_INLINE void pack_projection(const Source<C, S>& b, C* packed, int64_t part, int64_t parts) {
  if (!is_narrow(b.n)) return pack_part(b, packed, part, parts);
  if (packed && part == parts - 1) pack_narrow(b, packed);
}
template <class C>
FA_INLINE void project_rows(int64_t rows, int64_t k, int64_t n, const C* a, int64_t lda, const C* packed, const C* start,
                            C* c, bool accumulate = false) {
  if (n == 0) return;  // rows of c have no room for a tile
  if (is_narrow(n))
    gemm_narrow(rows, k, a, lda, packed, start, c, padded<C>(n), accumulate);
  else
    gemm(rows, k, n, a, lda, packed, start, accumulate, c, padded<C>(n));
}

}  // namespace fastadapt::FA_TARGET
