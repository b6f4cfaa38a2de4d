// bfloat16 products of one row block on the tiles of Intel AMX, accumulated in float32.  Torch-free.
//
// Three products are enough for an adapter, forward and backward; m is the number of rows of the block:
//   down         z[m, n] = x[m, k] * B          x: bfloat16 rows anywhere in memory, B: packed weight, z: float32
//   up           y[m, n] = epilogue(a * B)      a: small bfloat16 matrix, y: bfloat16 rows anywhere in memory
//   accumulate   c[r, n] += at[r, m] * x[m, n]  at: small transposed bfloat16 matrix, c: float32, owned by the thread
// A call is legal within a TileScope of the same thread.  Any m, k, n, r: padding exists only in the packed weights and the
// scratch, and nothing is read or written outside of the rows of x and y.
#pragma once
#include "amx_pack.h"

namespace fastadapt::amx {

#if FASTADAPT_AMX

// What up does with a product p = (a * B)[i, c] before it rounds:
//   y[i][c] = p * col_mul[c] * row_mul[i] + col_add[c] + row_add[i] + residual[i][c] + col_skip[c] * skip[i][c]
//             + row_skip[i] * normed[i][c]
// A null pointer leaves its factor or term out; row_mul, row_add, row_skip and normed come together or not at all.
struct Epilogue {
  const float* col_mul = nullptr;
  const float* col_add = nullptr;
  const bf16* const* residual = nullptr;
  const float* col_skip = nullptr;
  const bf16* const* skip = nullptr;
  const float* row_mul = nullptr;
  const float* row_add = nullptr;
  const float* row_skip = nullptr;
  const bf16* const* normed = nullptr;
};

namespace detail {

// Sixteen rows of a left operand: k bfloat16 each, `stride` bytes apart; the last k % 32 are at `tail`, 64 bytes apart.
struct Strip {
  const char* p;
  int64_t stride;
  const char* tail;
};

template <int MT, int NT>
void down_tile(const Strip* a, int64_t k, const bf16* b, const float* start, float* z, int64_t ldz) {
  const int64_t full = k / 32, panel = round_up(k, 32) * 16;
  const char *a0 = a[0].p, *a1 = a[MT - 1].p;
  if (start)
    load_all<MT, NT>(start, 0);
  else
    clear<MT, NT>();
  for (int64_t t = 0; t < full; t++)
    step<MT, NT>(a0 + 64 * t, a[0].stride, a1 + 64 * t, a[MT - 1].stride, b + 512 * t, b + panel + 512 * t);
  if (k % 32) step<MT, NT>(a[0].tail, 64, a[MT - 1].tail, 64, b + 512 * full, b + panel + 512 * full);
  store_all<MT, NT>(z, ldz * 4);
}

// Describes rows [0, count <= 16) of x as a strip: in place where they are 16 and equidistant, else copied.
inline Strip strip(const bf16* const* x, int64_t count, int64_t k, bf16* copy, bf16* tail) {
  const int64_t step = count > 1 ? x[1] - x[0] : 0, full = k / 32 * 32;
  bool direct = count == 16;
  for (int64_t i = 1; i < count && direct; i++) direct = x[i] - x[i - 1] == step;
  for (int64_t i = 0; i < 16 && full < k; i++) {
    memset(tail + 32 * i, 0, 64);
    if (i < count) memcpy(tail + 32 * i, x[i] + full, 2 * (k - full));
  }
  if (direct) return {reinterpret_cast<const char*>(x[0]), step * 2, reinterpret_cast<const char*>(tail)};
  for (int64_t i = 0; i < 16; i++)
    if (i < count)
      memcpy(copy + i * full, x[i], 2 * full);
    else
      memset(copy + i * full, 0, 2 * full);
  return {reinterpret_cast<const char*>(copy), full * 2, reinterpret_cast<const char*>(tail)};
}

template <int MT>
void accumulate_tile(const bf16* at, int64_t lda, int64_t steps, const bf16* pairs, bool fresh, float* c, int64_t ldc) {
  const char *a0 = reinterpret_cast<const char*>(at), *a1 = a0 + 32 * lda;
  if (fresh)
    clear<MT, 2>();
  else
    load_all<MT, 2>(c, 4 * ldc);
  for (int64_t t = 0; t < steps; t++)
    step<MT, 2>(a0 + 64 * t, 2 * lda, a1 + 64 * t, 2 * lda, pairs + 1024 * t, pairs + 1024 * t + 512);
  store_all<MT, 2>(c, 4 * ldc);
}

// The column terms of an epilogue for 32 columns; `mask` has a bit for each that exists.
struct Columns {
  uint32_t mask;
  __m512 mul[2], add[2], skip[2];
};

FASTADAPT_AVX512 inline Columns columns(const Epilogue& e, int64_t c, int64_t n) {
  Columns col;
  col.mask = mask_of(n - c);
  for (int h = 0; h < 2; h++) {
    const __mmask16 half = static_cast<__mmask16>(col.mask >> 16 * h);
    const int64_t at = c + 16 * h;
    col.mul[h] = e.col_mul ? _mm512_maskz_loadu_ps(half, e.col_mul + at) : _mm512_set1_ps(1.0f);
    col.add[h] = e.col_add ? _mm512_maskz_loadu_ps(half, e.col_add + at) : _mm512_setzero_ps();
    col.skip[h] = e.col_skip ? _mm512_maskz_loadu_ps(half, e.col_skip + at) : _mm512_setzero_ps();
  }
  return col;
}

// The whole formula of Epilogue on 32 columns, from c on, of row i; p is their part of the product.
FASTADAPT_AVX512 inline void finish_row(const Epilogue& e, const Columns& col, const float* p, int64_t i, int64_t c, bf16* y) {
  __m512 v[2] = {_mm512_load_ps(p), _mm512_load_ps(p + 16)};
#pragma GCC unroll 2
  for (int h = 0; h < 2; h++) {
    const __mmask16 half = static_cast<__mmask16>(col.mask >> 16 * h);
    const int64_t at = c + 16 * h;
    if (e.row_mul) {
      const __m512 start = _mm512_fmadd_ps(_mm512_set1_ps(e.row_skip[i]), widen(half, e.normed[i] + at),
                                           _mm512_add_ps(col.add[h], _mm512_set1_ps(e.row_add[i])));
      v[h] = _mm512_fmadd_ps(_mm512_mul_ps(v[h], _mm512_set1_ps(e.row_mul[i])), col.mul[h], start);
    } else {
      v[h] = _mm512_fmadd_ps(v[h], col.mul[h], col.add[h]);
    }
    if (e.skip) v[h] = _mm512_fmadd_ps(col.skip[h], widen(half, e.skip[i] + at), v[h]);
    if (e.residual) v[h] = _mm512_add_ps(v[h], widen(half, e.residual[i] + at));
  }
  _mm512_mask_storeu_epi16(y + c, col.mask, narrow(v[0], v[1]));
}

template <int MT>
void up_tile(const bf16* a, int64_t lda, const bf16* b, int64_t steps, float* product) {
  const char *a0 = reinterpret_cast<const char*>(a), *a1 = a0 + 32 * lda;
  clear<MT, 2>();
  for (int64_t t = 0; t < steps; t++)
    step<MT, 2>(a0 + 64 * t, 2 * lda, a1 + 64 * t, 2 * lda, b + 512 * t, b + 512 * (steps + t));
  store_all<MT, 2>(product, 128);
}

}  // namespace detail

// z[m, n] = start + x * B; z has round_up(m, 16) rows of ldz >= round_up(n, 16) floats, of which the surplus is overwritten.
// start: round_up(n, 16) floats for every row, or null.
inline void down(const TileScope& scope, const bf16* const* x, int64_t m, int64_t k, const bf16* packed, int64_t n,
                 const float* start, float* z, int64_t ldz) {
  const int64_t k32 = round_up(k, 32), panels = round_up(n, 16) / 16;
  for (int64_t i = 0; i < m; i += 32) {
    const bool two = m - i > 16;
    detail::Strip strips[2];
    for (int64_t s = 0; s <= two; s++)
      strips[s] = detail::strip(x + i + 16 * s, least(16, m - i - 16 * s), k, scope.copy + 16 * k32 * s,
                                scope.tail + 512 * s);
    for (int64_t j = 0; j < panels; j += 2) {
      const bf16* b = packed + j * k32 * 16;
      const float* first = start ? start + 16 * j : nullptr;
      float* out = z + i * ldz + 16 * j;
      if (j + 1 < panels)
        (two ? detail::down_tile<2, 2> : detail::down_tile<1, 2>)(strips, k, b, first, out, ldz);
      else
        (two ? detail::down_tile<2, 1> : detail::down_tile<1, 1>)(strips, k, b, first, out, ldz);
    }
  }
}

// y[m, n] = epilogue(a * B); a as round_rows leaves it for k columns.
FASTADAPT_AVX512 inline void up(const TileScope& scope, const bf16* a, int64_t m, int64_t k, const bf16* packed, int64_t n,
                                const Epilogue& e, bf16* const* y) {
  const int64_t lda = round_up(k, 32);
  for (int64_t c = 0; c < n; c += 32) {
    const detail::Columns col = detail::columns(e, c, n);
    for (int64_t i = 0; i < m; i += 32) {
      (m - i > 16 ? detail::up_tile<2> : detail::up_tile<1>)(a + i * lda, lda, packed + c * lda, lda / 32, scope.product);
      for (int64_t j = i; j < least(m, i + 32); j++) detail::finish_row(e, col, scope.product + 32 * (j - i), j, c, y[j]);
    }
  }
}

// c[r, n] += at * x, or = if fresh; at as transpose_round leaves it for m rows, c has round_up(r, 16) rows of
// ldc >= accumulator_stride(n) floats.
FASTADAPT_AVX512 inline void accumulate(const TileScope& scope, const bf16* at, int64_t lda, int64_t r, const bf16* const* x,
                                        int64_t m, int64_t n, bool fresh, float* c, int64_t ldc) {
  const int64_t m32 = round_up(m, 32), r16 = round_up(r, 16);
  for (int64_t j = 0; j < n; j += 32) {
    const uint32_t mask = detail::mask_of(n - j);
    for (int64_t i = 0; i < m32; i += 2) {
      __m512i first, second;
      detail::interleave(detail::row32(x[least(i, m - 1)] + j, i < m ? mask : 0),
                         detail::row32(x[least(i + 1, m - 1)] + j, i + 1 < m ? mask : 0), &first, &second);
      bf16* out = scope.pairs + i / 32 * 1024 + i % 32 * 16;
      _mm512_store_si512(out, first);
      _mm512_store_si512(out + 512, second);
    }
    for (int64_t i = 0; i < r16; i += 32)
      (r16 - i > 16 ? detail::accumulate_tile<2> : detail::accumulate_tile<1>)(at + i * lda, lda, m32 / 32, scope.pairs,
                                                                               fresh, c + i * ldc + j, ldc);
  }
}

#endif  // FASTADAPT_AMX

}  // namespace fastadapt::amx
