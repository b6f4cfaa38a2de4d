// Packing and the register-tiled micro-kernel that every CPU kernel multiplies with. See simd.h for FA_TARGET and FA_LANES.
//
// The right operand, a small weight, is packed into panels a few vectors wide: packed[panel][k][lane]. The left operand, a
// block of rows of an activation, is read where it lies, one broadcast element at a time, so it needs no copy. A tile of the
// product stays in registers: rows x vectors accumulators, chosen so that they and one row of the panel fill the register file.
#pragma once
#include "simd.h"

namespace fastadapt::FA_TARGET {

// 32 vector registers hold 24 accumulators, 16 (or 32 of half the width) hold 12. Of one vector no more than 8 rows: where rows
// lie a whole number of pages apart, as with 1024 floats, the first-level cache has 8 places for what is in one column.
constexpr int max_vectors = FA_LANES == 16 ? 4 : 2;
template <int NV>
constexpr int tile_rows = NV == 1 ? 8 : FA_LANES == 16 ? 24 / NV : 6;

// Inner indices per pass over the rows: the panel's part stays in the first-level cache.
constexpr int64_t inner_block = 128;

template <class C>
constexpr int64_t panel_width = max_vectors * lanes<C>;

// Columns of n after padding to whole vectors, and the elements of a packed k x n matrix.
template <class C>
FA_INLINE constexpr int64_t padded(int64_t n) { return round_up(n, lanes<C>); }
template <class C>
FA_INLINE constexpr int64_t packed_size(int64_t k, int64_t n) { return k * padded<C>(n); }

// --- packing ---------------------------------------------------------------------------------------------------------

// Of two vectors, the elements whose index has BIT clear (or, with HIGH, set), pairwise interleaved.
template <int BIT, bool HIGH, class V, int... J>
FA_INLINE V exchange(V a, V b, std::integer_sequence<int, J...>) {
  constexpr int n = sizeof...(J);
  return __builtin_shufflevector(a, b, (J & BIT ? n + J - (HIGH ? 0 : BIT) : J + (HIGH ? BIT : 0))...);
}

// In place: one butterfly a bit of the index.
template <class C, int BIT = 1>
FA_INLINE void transpose(Vec<C> (&v)[lanes<C>]) {
  constexpr std::make_integer_sequence<int, lanes<C>> indices;
#pragma GCC unroll 16
  for (int i = 0; i < lanes<C>; ++i) {
    if (i & BIT) continue;
    const Vec<C> a = v[i], b = v[i + BIT];
    v[i] = exchange<BIT, false>(a, b, indices);
    v[i + BIT] = exchange<BIT, true>(a, b, indices);
  }
  if constexpr (2 * BIT < lanes<C>) transpose<C, 2 * BIT>(v);
}

// A k x n matrix in memory: element (i, j) at data[i * k_stride + j * n_stride], times k_factor[i] and n_factor[j] if given.
template <class C, class S>
struct Source {
  const S* data;
  int64_t k_stride, n_stride, k, n;
  const C* k_factor;
  const C* n_factor;
};

// Packs columns [j, j + lanes) of rows [k0, k1) into a panel whose rows are `width` apart; columns past n become zero.
template <class C, class S>
FA_INLINE void pack_vector(const Source<C, S>& b, int64_t j, int64_t k0, int64_t k1, C* out, int64_t width) {
  constexpr int L = lanes<C>;
  const int64_t count = least(L, b.n - j);
  const S* column = b.data + j * b.n_stride;
  const Vec<C> factor = b.n_factor ? load_some<C>(b.n_factor + j, count) : broadcast<C>(1);
  auto finish = [&](int64_t i, Vec<C> v) { store(out + i * width, b.k_factor ? v * factor * b.k_factor[i] : v * factor); };
  int64_t i = k0;
  if (b.k_stride == 1) {
    const S* const end = b.data + (b.n - 1) * b.n_stride + b.k;
    for (; i < k1; i += L) {
      Vec<C> v[L];
#pragma GCC unroll 16
      for (int t = 0; t < L; ++t) {
        const S* from = column + t * b.n_stride + i;  // beyond k1 lie elements of the next column, which are not stored
        v[t] = t >= count ? Vec<C>{} : end - from >= L ? load<C>(from) : load_some<C>(from, end - from);
      }
      transpose<C>(v);
#pragma GCC unroll 16
      for (int t = 0; t < L; ++t)
        if (i + t < k1) finish(i + t, v[t]);
    }
  } else if (b.n_stride == 1 && count == L) {
    for (; i < k1; ++i) finish(i, load<C>(column + i * b.k_stride));
  }
  for (; i < k1; ++i) finish(i, load_some<C>(column + i * b.k_stride, count, b.n_stride));
}

// The work of packing as independent units, so that threads can share it.
template <class C>
FA_INLINE int64_t pack_units(int64_t k, int64_t n) { return ceil_div(n, lanes<C>) * ceil_div(k, inner_block); }

template <class C, class S>
void pack(const Source<C, S>& b, C* packed, int64_t unit_begin, int64_t unit_end) {
  constexpr int L = lanes<C>;
  const int64_t vectors = ceil_div(b.n, L), chunks = ceil_div(b.k, inner_block);
  for (int64_t unit = unit_begin; unit < unit_end; ++unit) {
    const int64_t vector = unit / chunks, k0 = unit % chunks * inner_block, panel = vector / max_vectors;
    const int64_t width = L * least(max_vectors, vectors - panel * max_vectors);
    C* out = packed + panel * panel_width<C> * b.k + vector % max_vectors * L;
    pack_vector(b, vector * L, k0, least(b.k, k0 + inner_block), out, width);
  }
}

// The share `part` of `parts` of it; nothing where `packed` is null.
template <class C, class S>
FA_INLINE void pack_part(const Source<C, S>& b, C* packed, int64_t part, int64_t parts) {
  const int64_t units = packed ? pack_units<C>(b.k, b.n) : 0;
  pack(b, packed, units * part / parts, units * (part + 1) / parts);
}

// --- micro-kernel ----------------------------------------------------------------------------------------------------

// acc[i][v] += sum over p < k of a(i, p) * b[p * b_stride + v], where a(i, p) is a[i * a_stride + p], or with TRANSPOSED
// a[p * a_stride + i].
template <class C, int MR, int NV, bool TRANSPOSED>
FA_INLINE void multiply(int64_t k, const C* a, int64_t a_stride, const C* b, int64_t b_stride, Vec<C> (&acc)[MR][NV]) {
#pragma GCC unroll 4
  for (int64_t p = 0; p < k; ++p) {
    Vec<C> row[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) row[v] = load<C>(b + v * lanes<C>);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const C s = TRANSPOSED ? a[i] : a[i * a_stride];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[i][v] += s * row[v];
    }
    a += TRANSPOSED ? a_stride : 1;
    b += b_stride;
  }
}

// Calls f(integral_constant<MR>, first row) for tiles that cover the rows.
template <int MR>
struct RowCount {
  static constexpr int value = MR;
};

template <int NV, class F>
FA_INLINE void for_row_tiles(int64_t rows, F&& f) {
  constexpr int MR = tile_rows<NV>;
  int64_t i = 0;
  for (; i + MR <= rows; i += MR) f(RowCount<MR>{}, i);
  if constexpr (MR > 8)
    if (i + 8 <= rows) f(RowCount<8>{}, i), i += 8;
  if (i + 4 <= rows) f(RowCount<4>{}, i), i += 4;
  if (i + 2 <= rows) f(RowCount<2>{}, i), i += 2;
  if (i < rows) f(RowCount<1>{}, i);
}

// Calls f(integral_constant<NV>, first column) for the panels of n columns.
template <class C, class F>
FA_INLINE void for_panels(int64_t n, F&& f) {
  int64_t j = 0;
  for (; j + panel_width<C> <= padded<C>(n); j += panel_width<C>) f(RowCount<max_vectors>{}, j);
  const int64_t rest = (padded<C>(n) - j) / lanes<C>;
  if constexpr (max_vectors > 2) {
    if (rest == 3) f(RowCount<3>{}, j);
    if (rest == 2) f(RowCount<2>{}, j);
  }
  if (rest == 1) f(RowCount<1>{}, j);
}

// Sums start from zero in each block and are added to c at its end: a long sum in blocks rounds less than one in sequence.
template <class C>
FA_INLINE void put(C* c, Vec<C> v, bool accumulate) {
  store(c, accumulate ? load<C>(c) + v : v);
}

// c = a * b + start for a block in scratch memory: c has padded(n) columns and `start` (or zero) is added to every row.
// With accumulate, c += a * b.
template <class C>
void gemm(int64_t rows, int64_t k, int64_t n, const C* a, int64_t lda, const C* packed, const C* start, bool accumulate, C* c,
          int64_t ldc) {
  constexpr int L = lanes<C>;
  int64_t k0 = 0;
  do {
    const int64_t kb = least(inner_block, k - k0);
    for_panels<C>(n, [&](auto nv, int64_t j) FA_FORCED {
      constexpr int NV = decltype(nv)::value;
      const C* b = packed + j * k + k0 * NV * L;
      for_row_tiles<NV>(rows, [&](auto mr, int64_t i) FA_FORCED {
        constexpr int MR = decltype(mr)::value;
        Vec<C> acc[MR][NV];
        C* out = c + i * ldc + j;
#pragma GCC unroll 16
        for (int t = 0; t < MR; ++t)
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v)
            acc[t][v] = !accumulate && start ? load<C>(start + j + v * L) : Vec<C>{};
        multiply<C, MR, NV, false>(kb, a + i * lda + k0, lda, b, NV * L, acc);
#pragma GCC unroll 16
        for (int t = 0; t < MR; ++t)
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) put(out + t * ldc + v * L, acc[t][v], accumulate);
      });
    });
    accumulate = true;
    k0 += kb;
  } while (k0 < k);
}

// c (columns x n, padded rows) += a^T * b, where a is rows x columns and b is rows x padded(n): the shape of a weight gradient.
// Without accumulate c is overwritten.
template <class C>
void gemm_transposed(int64_t columns, int64_t rows, int64_t n, const C* a, int64_t lda, const C* b, int64_t ldb,
                     bool accumulate, C* c, int64_t ldc) {
  constexpr int L = lanes<C>;
  for_panels<C>(n, [&](auto nv, int64_t j) FA_FORCED {
    constexpr int NV = decltype(nv)::value;
    for_row_tiles<NV>(columns, [&](auto mr, int64_t i) FA_FORCED {
      constexpr int MR = decltype(mr)::value;
      Vec<C> acc[MR][NV] = {};
      C* out = c + i * ldc + j;
      multiply<C, MR, NV, true>(rows, a + i, lda, b + j, ldb, acc);
#pragma GCC unroll 16
      for (int t = 0; t < MR; ++t)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) put(out + t * ldc + v * L, acc[t][v], accumulate);
    });
  });
}

// out = start + a * b for one tile, summed in blocks of the inner dimension. Out of line: beside the rare long sum the usual
// one has its accumulators in registers.
template <class C, int MR, int NV>
FA_NOINLINE void multiply_long(int64_t k, const C* a, int64_t lda, const C* b, const C* start, C* out) {
  constexpr int L = lanes<C>;
  for (int64_t k0 = 0; k0 < k; k0 += inner_block) {
    Vec<C> acc[MR][NV] = {};
    multiply<C, MR, NV, false>(least(inner_block, k - k0), a + k0, lda, b + k0 * NV * L, NV * L, acc);
#pragma GCC unroll 16
    for (int t = 0; t < MR; ++t)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        C* to = out + (t * NV + v) * L;
        store(to, acc[t][v] + (k0 ? load<C>(to) : start ? load<C>(start + v * L) : Vec<C>{}));
      }
  }
}

// Packed right operands up to this size stay in the first-level cache beside the rows, and up to the other one in the second.
constexpr int64_t resident_bytes = 32 << 10, streamed_bytes = 256 << 10;

// a * b + start, handed tile by tile to the epilogue, which adds what it likes and stores: epilogue(row, column, acc[MR][NV]).
// `start` has panel_width more elements than n. A small b passes for every few rows, which reads and writes them in sequence:
// its panels come from the second-level cache faster than scattered parts of rows; of a large b one panel at a time stays.
template <class C, class Epilogue>
void gemm_epilogue(int64_t rows, int64_t k, int64_t n, const C* a, int64_t lda, const C* packed, const C* start,
                   const Epilogue& epilogue) {
  // Out of line: two loops with a copy of every tile each would double what there is to compile, and be no faster.
  auto tile = [&](auto nv, int64_t j, auto mr, int64_t i) FA_NOINLINE {
    constexpr int MR = decltype(mr)::value, NV = decltype(nv)::value;
    constexpr int L = lanes<C>;
    const C *row = a + i * lda, *b = packed + j * k;
    C sums[MR * NV * L];
    const bool is_long = k > inner_block;
    if (is_long) multiply_long<C, MR, NV>(k, row, lda, b, start ? start + j : nullptr, sums);
    Vec<C> acc[MR][NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const Vec<C> first = start ? load<C>(start + j + v * L) : Vec<C>{};
#pragma GCC unroll 16
      for (int t = 0; t < MR; ++t) acc[t][v] = is_long ? load<C>(sums + (t * NV + v) * L) : first;
    }
    if (!is_long) multiply<C, MR, NV, false>(k, row, lda, b, NV * L, acc);
    epilogue(i, j, acc);
  };
  if (packed_size<C>(k, n) * static_cast<int64_t>(sizeof(C)) <= streamed_bytes) {
    constexpr int64_t step = tile_rows<max_vectors>;
    for (int64_t i = 0; i < rows; i += step)
      for_panels<C>(n, [&](auto nv, int64_t j) FA_FORCED {
        for_row_tiles<decltype(nv)::value>(least(step, rows - i),
                                           [&](auto mr, int64_t t) FA_FORCED { tile(nv, j, mr, i + t); });
      });
  } else {
    for_panels<C>(n, [&](auto nv, int64_t j) FA_FORCED {
      for_row_tiles<decltype(nv)::value>(rows, [&](auto mr, int64_t i) FA_FORCED { tile(nv, j, mr, i); });
    });
  }
}

}  // namespace fastadapt::FA_TARGET
