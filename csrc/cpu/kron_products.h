// The products of sums of Kronecker products: three that stream over the chunks of rows, and small ones between them.
#pragma once
#include "kron_memory.h"
#include "narrow.h"

namespace fastadapt::FA_TARGET::kron {

// Tokens that a projection takes at once: their sums with a tile of ranks make one vector.
template <class C>
constexpr int project_rows_at_once = lanes<C> / rank_tile;

// Rows of the other tiles.
constexpr int tile_tokens = 4;

// f(whole panel or single vector, column) over padded columns.
template <class C, class F>
FA_INLINE void for_vectors(int64_t width, F&& f) {
  int64_t j = 0;
  for (; j + panel_width<C> <= padded<C>(width); j += panel_width<C>) f(RowCount<max_vectors>{}, j);
  for (; j < width; j += lanes<C>) f(RowCount<1>{}, j);
}

// z[chunk][rank][token] = the sum over columns of x[token][chunk][column] * f[rank][column]. Meanwhile the cache fetches
// `output`, unless null: rows of that shape that a later product writes, a few columns of several at a time, and waits for.
template <class C>
void project(const Block<const C*>& x, int64_t n, const Shape& s, const Matrix<C>& f, int64_t ranks, C* z,
             const Block<C*>* output = nullptr) {
  constexpr int L = lanes<C>, N = project_rows_at_once<C>, K = rank_tile;
  // Lanes without a token are computed along: what memory holds by chance may be subnormal, which is slow.
  if (n < block_rows) memset(z, 0, s.chunks * ranks * block_rows * sizeof(C));
  for (int64_t t = 0; t < n; t += N)
    for (int64_t c = 0; c < s.chunks; ++c)
      for (int64_t u = 0; u < ranks; u += K) {
        const C *row[N], *factor = f.data + u * f.ld;
#pragma GCC unroll 4
        for (int i = 0; i < N; ++i) row[i] = x.rows[t + i] + c * x.chunk;
        const bool fetches = output && u == 0 && t + N <= n;
        Vec<C> acc[K * N] = {};
        for (int64_t j = 0; j < s.width; j += L) {
          Vec<C> v[N];
#pragma GCC unroll 4
          for (int i = 0; i < N; ++i) {
            v[i] = load<C>(row[i] + j);
            if (fetches) __builtin_prefetch(output->rows[t + i] + c * output->chunk + j, 1);
          }
#pragma GCC unroll 4
          for (int k = 0; k < K; ++k) {
            Vec<C> w = load<C>(factor + k * f.ld + j);
#if defined(FA_AVX512)
            asm("" : "+x"(w));  // keeps it in a register: as an operand in memory it would be loaded for every row
#endif
#pragma GCC unroll 4
            for (int i = 0; i < N; ++i) acc[k * N + i] += v[i] * w;
          }
        }
        const Vec<C> total = sums<C, K * N>(acc);
        C sum[L];
        store(sum, total);
        for (int64_t k = 0; k < least(K, ranks - u); ++k)
          memcpy(z + (c * ranks + u + k) * block_rows + t, sum + k * N, N * sizeof(C));
      }
}

// out[token][chunk][column] = added + bias[chunk][column] + the sum over ranks of h[chunk][rank][token] * f[rank][column];
// `added` and `bias` (padded) may be null.
template <class C>
void expand(int64_t n, const Shape& s, const C* h, int64_t ranks, const Matrix<C>& f, const C* bias,
            const Block<const C*>* added, const Block<C*>& out) {
  auto tile = [&](auto mr, auto nv, int64_t t, int64_t c, int64_t j) FA_FORCED {
    constexpr int MR = decltype(mr)::value, NV = decltype(nv)::value, L = lanes<C>;
    Vec<C> acc[MR][NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const Vec<C> first = bias ? load<C>(bias + c * padded<C>(s.width) + j + v * L) : Vec<C>{};
#pragma GCC unroll 4
      for (int i = 0; i < MR; ++i) acc[i][v] = first;
    }
    multiply<C, MR, NV, true>(ranks, h + c * ranks * block_rows + t, block_rows, f.data + j, f.ld, acc);
#pragma GCC unroll 4
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        if (added) acc[i][v] += load<C>(added->rows[t + i] + c * added->chunk + j + v * L);
        store(out.rows[t + i] + c * out.chunk + j + v * L, acc[i][v]);
      }
  };
  auto tokens = [&](int64_t t, auto&& f) FA_FORCED {
    if (t + tile_tokens <= n) return f(RowCount<tile_tokens>{}, t);
    for (; t < n; ++t) f(RowCount<1>{}, t);
  };
  if (ranks * f.ld * static_cast<int64_t>(sizeof(C)) <= resident_bytes) {
    for (int64_t t = 0; t < n; t += tile_tokens)
      tokens(t, [&](auto mr, int64_t t) FA_FORCED {
        for (int64_t c = 0; c < s.chunks; ++c)
          for_vectors<C>(s.width, [&](auto nv, int64_t j) FA_FORCED { tile(mr, nv, t, c, j); });
      });
  } else {
    for_vectors<C>(s.width, [&](auto nv, int64_t j) FA_FORCED {
      for (int64_t t = 0; t < n; t += tile_tokens)
        tokens(t, [&](auto mr, int64_t t) FA_FORCED {
          for (int64_t c = 0; c < s.chunks; ++c) tile(mr, nv, t, c, j);
        });
    });
  }
}

// out[rank][column] += the sum over tokens and chunks of g[chunk][rank][token] * x[token][chunk][column], and, unless null,
// columns[chunk][column] += the sum over tokens of x. `g` is readable a tile beyond its end; with a null `out` it isn't read.
template <class C>
void add_sums(const Block<const C*>& x, int64_t n, const Shape& s, const C* g, int64_t ranks, C* out, C* columns) {
  const int64_t ld = matrix_stride<C>(s.width);
  auto tile = [&](auto nk, auto nv, auto with_columns, int64_t u, int64_t j) FA_FORCED {
    constexpr int K = decltype(nk)::value, NV = decltype(nv)::value, L = lanes<C>;
    constexpr bool COLUMNS = decltype(with_columns)::value;
    for (int64_t c = 0; c < s.chunks; ++c) {
      const C* factors = g + (c * ranks + u) * block_rows;
      Vec<C> acc[K + 1][NV] = {}, total[NV] = {};
      for (int64_t t = 0; t < n; ++t) {
        const C* row = x.rows[t] + c * x.chunk + j;
        Vec<C> r[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
          r[v] = load<C>(row + v * L);
          if (COLUMNS) total[v] += r[v];
        }
#pragma GCC unroll 4
        for (int k = 0; k < K; ++k)
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) acc[k][v] += factors[k * block_rows + t] * r[v];
      }
      // A sum of sums rounds less than one in sequence.
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) put(out + (u + k) * ld + j + v * L, acc[k][v], true);
#pragma GCC unroll 4
      for (int v = 0; COLUMNS && v < NV; ++v) put(columns + c * padded<C>(s.width) + j + v * L, total[v], true);
    }
  };
  for_vectors<C>(s.width, [&](auto nv, int64_t j) FA_FORCED {
    if (!out) return tile(RowCount<0>{}, nv, RowCount<1>{}, 0, j);
    for (int64_t u = 0; u < ranks; u += rank_tile)
      if (columns && u == 0)
        tile(RowCount<rank_tile>{}, nv, RowCount<1>{}, u, j);
      else
        tile(RowCount<rank_tile>{}, nv, RowCount<0>{}, u, j);
  });
}

// Vectors that expand_and_sum takes at once: as many as the sums of both factors leave registers for.
constexpr int backward_vectors = FA_LANES == 16 ? 2 : 1;

// The last pass of a backward over a block of rows and of their gradients, for rank_tile ranks: what expand(grad_z, f, added)
// writes to `out`, and the sums that add_sums(x, grad_z, out_x) and add_sums(grad_y, h, out_y, columns) make, to the bit.
// Elements are loaded once, and the sums of a few columns of a chunk stay in registers. `out` may be in the place of x.
template <class C>
void expand_and_sum(const Block<const C*>& x, const Block<const C*>& grad_y, int64_t n, const Shape& s, const C* grad_z,
                    const C* h, const Matrix<C>& f, bool added, C* out_x, C* out_y, C* columns, const Block<C*>& out) {
  constexpr int K = rank_tile, L = lanes<C>;
  const int64_t ld = matrix_stride<C>(s.width);
  auto tile = [&](auto nv, int64_t j) FA_FORCED {
    constexpr int NV = decltype(nv)::value;
    Vec<C> w[K][NV];
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) w[k][v] = load<C>(f.data + k * f.ld + j + v * L);
    for (int64_t c = 0; c < s.chunks; ++c) {
      const C *from_z = grad_z + c * K * block_rows, *from_h = h + c * K * block_rows;
      const int64_t at_x = c * x.chunk + j, at_y = c * grad_y.chunk + j, at = c * out.chunk + j, count = n;
      Vec<C> total[NV] = {}, sum_x[K][NV] = {}, sum_y[K][NV] = {};
      for (int64_t t = 0; t < count; ++t) {
        const C *row_x = x.rows[t] + at_x, *row_y = grad_y.rows[t] + at_y;
        C* to = out.rows[t] + at;
        Vec<C> vx[NV], vy[NV], grad[NV] = {};
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
          vx[v] = load<C>(row_x + v * L);
          vy[v] = load<C>(row_y + v * L);
          total[v] += vy[v];
        }
#pragma GCC unroll 4
        for (int k = 0; k < K; ++k) {
          const C gz = from_z[k * block_rows + t], gh = from_h[k * block_rows + t];
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) {
            grad[v] += gz * w[k][v];
            sum_x[k][v] += gz * vx[v];
            sum_y[k][v] += gh * vy[v];
          }
        }
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) store(to + v * L, added ? grad[v] + vy[v] : grad[v]);
      }
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
          put(out_x + k * ld + j + v * L, sum_x[k][v], true);
          put(out_y + k * ld + j + v * L, sum_y[k][v], true);
        }
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v)
        if (columns) put(columns + c * padded<C>(s.width) + j + v * L, total[v], true);
    }
  };
  int64_t j = 0;
  for (; j + backward_vectors * L <= padded<C>(s.width); j += backward_vectors * L) tile(RowCount<backward_vectors>{}, j);
  for (; j < s.width; j += L) tile(RowCount<1>{}, j);
}

// c (rows x n) = a * b + start, or with ACCUMULATE c += a * b: a is rows x k or, TRANSPOSED, k x rows; b and c have whole
// vectors; start (or zero) is one number a row.
template <bool TRANSPOSED, bool ACCUMULATE, class C>
void product(int64_t rows, int64_t k, int64_t n, const C* a, int64_t lda, const C* b, int64_t ldb, const C* start, C* c,
             int64_t ldc) {
  auto tile = [&](auto mr, auto nv, int64_t i, int64_t j) FA_FORCED {
    constexpr int MR = decltype(mr)::value, NV = decltype(nv)::value, L = lanes<C>;
    for (int64_t k0 = 0; k0 == 0 || k0 < k; k0 += inner_block) {  // a long sum in blocks rounds less than one in sequence
      Vec<C> acc[MR][NV];
#pragma GCC unroll 8
      for (int t = 0; t < MR; ++t)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[t][v] = !ACCUMULATE && start && k0 == 0 ? broadcast<C>(start[i + t]) : Vec<C>{};
      multiply<C, MR, NV, TRANSPOSED>(least(inner_block, k - k0), a + (TRANSPOSED ? k0 * lda + i : i * lda + k0), lda,
                                      b + k0 * ldb + j, ldb, acc);
#pragma GCC unroll 8
      for (int t = 0; t < MR; ++t)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) put(c + (i + t) * ldc + j + v * L, acc[t][v], ACCUMULATE || k0);
    }
  };
  for_vectors<C>(n, [&](auto nv, int64_t j) FA_FORCED {
    constexpr int MR = decltype(nv)::value == 1 ? 8 : 4;
    int64_t i = 0;
    for (; i + MR <= rows; i += MR) tile(RowCount<MR>{}, nv, i, j);
    for (; i < rows; ++i) tile(RowCount<1>{}, nv, i, j);
  });
}

// out[token][j] = a[j][token] for j below `rows`; columns up to padded(rows) become zero.
template <class C>
void transpose_block(int64_t rows, const C* a, int64_t lda, C* out) {
  constexpr int L = lanes<C>;
  for (int64_t j = 0; j < rows; j += L)
    for (int64_t t = 0; t < block_rows; t += L) {
      Vec<C> v[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) v[i] = j + i < rows ? load<C>(a + (j + i) * lda + t) : Vec<C>{};
      transpose<C>(v);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) store(out + (t + i) * padded<C>(rows) + j, v[i]);
    }
}

}  // namespace fastadapt::FA_TARGET::kron
