// The operands of the products of amx.h: rounded to bfloat16, in the order in which tiles are read.
#pragma once
#include "amx_tiles.h"

namespace fastadapt::amx {

#if FASTADAPT_AMX

namespace detail {

inline uint32_t mask_of(int64_t count) { return count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1; }

FASTADAPT_AVX512 inline __m512 widen(__mmask16 mask, const bf16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16));
}
// Rounds to nearest even.
FASTADAPT_AVX512 inline __m512i narrow(__m512 first, __m512 second) { return (__m512i)_mm512_cvtne2ps_pbh(second, first); }

// The transpose of a 16 by 16 matrix of 32-bit words.
FASTADAPT_AVX512 inline void transpose(__m512i (&v)[16]) {
  __m512i w[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    w[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    w[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(w[i], w[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(w[i], w[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(w[i + 1], w[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(w[i + 1], w[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    w[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
    w[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
    w[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
    w[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    v[i] = _mm512_shuffle_i32x4(w[i], w[i + 8], 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(w[i], w[i + 8], 0xdd);
  }
}

// 32 neighbours as bfloat16.
FASTADAPT_AVX512 inline __m512i row32(const bf16* p, uint32_t mask) { return _mm512_maskz_loadu_epi16(mask, p); }
FASTADAPT_AVX512 inline __m512i row32(const float* p, uint32_t mask) {
  return narrow(_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p),
                _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), p + 16));
}
// Word i of the results holds a[i] and b[i]: right operands consist of such pairs of rows.
FASTADAPT_AVX512 inline void interleave(__m512i a, __m512i b, __m512i* first, __m512i* second) {
  // Quadwords 0..3 of both go to the even places, so that unpacking within 128-bit lanes yields the natural order.
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  a = _mm512_permutexvar_epi64(order, a);
  b = _mm512_permutexvar_epi64(order, b);
  *first = _mm512_unpacklo_epi16(a, b);
  *second = _mm512_unpackhi_epi16(a, b);
}

inline float value(float v) { return v; }
inline float value(bf16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

// The same, times the 32 factors of two vectors.
FASTADAPT_AVX512 inline __m512i row32(const bf16* p, uint32_t mask, __m512 first, __m512 second) {
  const __m512 a = widen(static_cast<__mmask16>(mask), p), b = widen(static_cast<__mmask16>(mask >> 16), p + 16);
  return narrow(_mm512_mul_ps(a, first), _mm512_mul_ps(b, second));
}
FASTADAPT_AVX512 inline __m512i row32(const float* p, uint32_t mask, __m512 first, __m512 second) {
  return narrow(_mm512_mul_ps(_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p), first),
                _mm512_mul_ps(_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), p + 16), second));
}

// One step (32 by 16) of two panels, `next` apart, of which height rows and width columns exist, where columns are contiguous.
template <class W>
FASTADAPT_AVX512 void pack_rows(bf16* out, int64_t next, const W* src, int64_t stride_k, const float* scale_k, int64_t width,
                                int64_t height) {
  const uint32_t mask = mask_of(width);
  for (int64_t i = 0; i < 32; i += 2) {
    __m512i pair[2];
    for (int h = 0; h < 2; h++) {
      const W* row = src + least(i + h, height - 1) * stride_k;
      const uint32_t present = i + h < height ? mask : 0;
      const __m512 factor = _mm512_set1_ps(scale_k && present ? scale_k[i + h] : 1.0f);
      pair[h] = scale_k ? row32(row, present, factor, factor) : row32(row, present);
    }
    interleave(pair[0], pair[1], &pair[0], &pair[1]);
    _mm512_store_si512(out + 16 * i, pair[0]);
    _mm512_store_si512(out + next + 16 * i, pair[1]);
  }
}
// One step of one panel, where the rows are contiguous or nothing is.
template <class W>
FASTADAPT_AVX512 void pack_columns(bf16* out, const W* src, int64_t stride_n, int64_t stride_k, const float* scale_k,
                                   int64_t width, int64_t height) {
  alignas(64) float copy[16 * 32] = {};
  if (stride_k != 1)
    for (int64_t i = 0; i < height; i++)
      for (int64_t c = 0; c < width; c++) copy[32 * c + i] = value(src[i * stride_k + c * stride_n]);
  const uint32_t mask = mask_of(height);
  __m512 factor[2];
  for (int h = 0; h < 2; h++) {
    const __mmask16 half = static_cast<__mmask16>(mask >> 16 * h);
    factor[h] = scale_k ? _mm512_maskz_loadu_ps(half, scale_k + 16 * h) : _mm512_set1_ps(1.0f);
  }
  __m512i v[16];
#pragma GCC unroll 16
  for (int64_t c = 0; c < 16; c++) {
    const uint32_t present = c < width ? mask : 0;
    const W* column = src + least(c, width - 1) * stride_n;
    if (stride_k != 1)
      v[c] = row32(copy + 32 * c, present, factor[0], factor[1]);
    else
      v[c] = scale_k ? row32(column, present, factor[0], factor[1]) : row32(column, present);
  }
  transpose(v);
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) _mm512_store_si512(out + 32 * i, v[i]);
}

}  // namespace detail

// Packs one of the packed_size(n, k) / 1024 units, 32 by 32, of a right operand B[k, n]; entry (i, c) of B is
// src[i * stride_k + c * stride_n], times scale_k[i] if given. W is float or bf16.
template <class W>
FASTADAPT_AVX512 void pack(bf16* packed, const W* src, int64_t stride_n, int64_t stride_k, const float* scale_k, int64_t n,
                           int64_t k, int64_t unit) {
  const int64_t steps = round_up(k, 32) / 32, next = 512 * steps, c = unit / steps * 32, i = unit % steps * 32;
  const int64_t width = least(32, n - c), height = least(32, k - i);
  const W* from = src + i * stride_k + c * stride_n;
  const float* scale = scale_k ? scale_k + i : nullptr;
  bf16* out = packed + c * steps * 32 + i * 16;
  if (stride_n == 1 && stride_k != 1) return detail::pack_rows(out, next, from, stride_k, scale, width, height);
  detail::pack_columns(out, from, stride_n, stride_k, scale, least(16, width), height);
  if (width > 16)
    detail::pack_columns(out + next, from + 16 * stride_n, stride_n, stride_k, scale, width - 16, height);
  else
    memset(out + next, 0, 1024);
}

// Packs the share `part` of `parts` of all units; nothing where `packed` is null.
template <class W>
void pack_part(bf16* packed, const W* src, int64_t stride_n, int64_t stride_k, const float* scale_k, int64_t n, int64_t k,
               int64_t part, int64_t parts) {
  const int64_t units = packed ? packed_size(n, k) / 1024 : 0;
  for (int64_t unit = units * part / parts; unit < units * (part + 1) / parts; ++unit)
    pack(packed, src, stride_n, stride_k, scale_k, n, k, unit);
}

// The left operand of up: out[i][c] = h[i][c] for i < m, c < r; zero to round_up(m, 16) rows of round_up(r, 32).
FASTADAPT_AVX512 inline void round_rows(const float* h, int64_t ldh, int64_t m, int64_t r, bf16* out) {
  const int64_t lda = round_up(r, 32), rows = round_up(m, 16);
  for (int64_t i = 0; i < rows; i++)
    for (int64_t c = 0; c < lda; c += 32)
      _mm512_store_si512(out + i * lda + c,
                         detail::row32(h + least(i, m - 1) * ldh + c, i < m ? detail::mask_of(r - c) : 0));
}

// The left operand of accumulate: out[c][i] = h[i][c] for i < m, c < r; zero to round_up(r + ones, 16) rows of round_up(m, 32),
// which begin lda apart. `ones` adds a row of ones below, with which the product holds the column sums of its right operand.
FASTADAPT_AVX512 inline void transpose_round(const float* h, int64_t ldh, int64_t m, int64_t r, bool ones, bf16* out,
                                             int64_t lda) {
  const int64_t rows = round_up(r + ones, 16);
  for (int64_t c = 0; c < rows; c += 16)
    for (int64_t i = 0; i < round_up(m, 32); i += 16) {
      const __mmask16 mask = static_cast<__mmask16>(detail::mask_of(least(16, r - c)));
      __m512i v[16];
#pragma GCC unroll 16
      for (int64_t j = 0; j < 16; j++)
        v[j] = _mm512_maskz_loadu_epi32(i + j < m ? mask : 0, h + least(i + j, m - 1) * ldh + c);
      detail::transpose(v);
#pragma GCC unroll 16
      for (int64_t j = 0; j < 16; j++)
        _mm256_store_si256(reinterpret_cast<__m256i*>(out + (c + j) * lda + i),
                           (__m256i)_mm512_cvtneps_pbh(_mm512_castsi512_ps(v[j])));
    }
  if (ones)
    for (int64_t i = 0; i < m; i++) out[r * lda + i] = {0x3f80};
}

#endif  // FASTADAPT_AMX

}  // namespace fastadapt::amx
