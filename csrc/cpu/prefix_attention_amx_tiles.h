// What both directions of prefix_attention share where they multiply on AMX: operands as tiles read them, products, weights.
#pragma once
#include "amx.h"
#include "prefix_attention_tiles.h"

#if FASTADAPT_AMX
namespace fastadapt::FA_TARGET::prefix_attention {

struct AmxOperands {
  using T = BFloat16;
  using C = float;

  static constexpr int64_t block = 32;   // rows and columns of a product, and of e at a step
  static constexpr int64_t panel = 512;  // elements of a tile register

  static FA_INLINE int64_t width(const Problem& p) { return round_up(p.e, block); }

  // n rows and zeros up to `all` rows, `ld` apart, a multiple of 32 that is at least e.
  template <class S>
  static FASTADAPT_AVX512 void copy(const S* from, int64_t stride, int64_t step, int64_t n, int64_t e, T* out, int64_t all,
                                    int64_t ld) {
    for (int64_t l = 0; l < all; ++l, from += stride, out += ld)
      for (int64_t c = 0; c < ld; c += block) {
        const uint32_t mask = l < n ? amx::detail::mask_of(e - c) : 0;
        S gathered[block];
        for (int64_t k = 0; step != 1 && mask && k < least(block, e - c); ++k) gathered[k] = from[(c + k) * step];
        const S* row = step == 1 ? (mask ? from + c : nullptr) : gathered;
        _mm512_store_si512(out + c, mask ? amx::detail::row32(row, mask) : _mm512_setzero_si512());
      }
  }

  // Rows as the columns of a right operand: panels [16 rows][32 of e], one behind the other.
  static FASTADAPT_AVX512 void pack_columns(const T* rows, int64_t n, int64_t ld, T* out) {
    for (int64_t l = 0; l < n; l += 16)
      for (int64_t c = 0; c < ld; c += block, out += panel) {
        __m512i v[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) v[i] = _mm512_load_si512(rows + (l + i) * ld + c);
        amx::detail::transpose(v);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) _mm512_store_si512(out + 32 * i, v[i]);
      }
  }

  // Rows as those of a right operand: panels [16 of e][32 rows].
  static FASTADAPT_AVX512 void pack_rows(const T* rows, int64_t n, int64_t ld, T* out) {
    for (int64_t c = 0; c < ld; c += block)
      for (int64_t l = 0; l < n; l += 2) {
        __m512i pair[2];
        amx::detail::interleave(_mm512_load_si512(rows + l * ld + c), _mm512_load_si512(rows + (l + 1) * ld + c), &pair[0],
                                &pair[1]);
        T* to = out + c * n + l / block * panel + l % block * 16;
        _mm512_store_si512(to, pair[0]);
        _mm512_store_si512(to + 16 * n, pair[1]);
      }
  }

  // Two by two tiles of c, (32, 32) and `ldc` apart, = or += a * b: `a` has rows `lda` elements apart, `b` panels of `steps`.
  template <bool ACCUMULATE>
  static void multiply(int64_t begin, int64_t end, const T* a, int64_t lda, const T* b, int64_t steps, C* c, int64_t ldc) {
    const char *first = reinterpret_cast<const char*>(a), *second = first + 32 * lda;
    if (ACCUMULATE)
      amx::detail::load_all<2, 2>(c, 4 * ldc);
    else
      amx::detail::clear<2, 2>();
    for (int64_t t = begin; t < end; ++t)
      amx::detail::step<2, 2>(first + 64 * t, 2 * lda, second + 64 * t, 2 * lda, b + panel * t, b + panel * (steps + t));
    amx::detail::store_all<2, 2>(c, 4 * ldc);
  }

  // 2^x with an error of 3e-6, a thousandth of what rounding makes of a weight; of 0 it is 1.
  static FASTADAPT_AVX512 FA_INLINE __m512 rough_power_of_2(__m512 x) {
    const __m512 t = _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);  // less the nearest integer; 0 of -inf
    __m512 p = _mm512_fmadd_ps(t, _mm512_set1_ps(0.009582853153f), _mm512_set1_ps(0.05590642493f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.2402409861f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.6931241934f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, _mm512_sub_ps(x, t));
  }
};

}  // namespace fastadapt::FA_TARGET::prefix_attention
#endif
