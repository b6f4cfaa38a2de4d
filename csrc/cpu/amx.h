#pragma once
// bfloat16 products of one row block on the tiles of Intel AMX, accumulated in float32.  Torch-free.
//
// Three products are enough for an adapter, forward and backward; m is the number of rows of the block:
//   down         z[m, n] = x[m, k] * B          x: bfloat16 rows anywhere in memory, B: packed weight, z: float32
//   up           y[m, n] = epilogue(a * B)      a: small bfloat16 matrix, y: bfloat16 rows anywhere in memory
//   accumulate   c[r, n] += at[r, m] * x[m, n]  at: small transposed bfloat16 matrix, c: float32, owned by the thread
// A call is legal between the construction and the destruction of a Session on the same thread.  Any m, k, n, r: padding
// exists only in the packed weights and the scratch, and nothing is read or written outside of the rows of x and y.
#include "types.h"

#if defined(__x86_64__) && defined(__linux__) && \
    ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && defined(__GNUC__) && __GNUC__ >= 11))
#define FASTADAPT_AMX 1
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#define FASTADAPT_AMX 0
#endif

namespace fastadapt::amx {

using bf16 = BFloat16;

// Sizes of the padded buffers that the caller owns; align them to 64 bytes.
// Elements of a packed weight with k inner and n outer entries.
constexpr int64_t packed_size(int64_t n, int64_t k) { return round_up(n, 32) * round_up(k, 32); }
// Elements of the scratch of a thread whose blocks have at most m rows and whose down products at most k inner entries.
constexpr int64_t scratch_size(int64_t m, int64_t k) { return 2048 + 1024 + round_up(m, 32) * 32 + 32 * round_up(k, 32); }
// Row length of the accumulators; the odd number of cache lines keeps the 16 rows of a tile out of one cache set.
constexpr int64_t accumulator_stride(int64_t n) { return round_up(n, 32) + 16; }

#if FASTADAPT_AMX

#define FASTADAPT_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

// Asks the processor and, once, the system: Linux grants the tile registers to a process on request.
inline bool available() {
  static const bool granted = [] {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return false;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") ||
        !__builtin_cpu_supports("avx512dq"))
      return false;
    constexpr long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  }();
  return granted;
}

// Configures all eight tiles as 16 rows of 64 bytes.  Other libraries use the tiles too, each with a configuration of its
// own, so that a session must not span a call into one of them.
class Session {
 public:
  // scratch: scratch_size(m, k) elements, 64-byte aligned, used by this thread alone.
  Session(bf16* scratch, int64_t m)
      : product(reinterpret_cast<float*>(scratch)), tail(scratch + 2048), pairs(tail + 1024),
        copy(pairs + round_up(m, 32) * 32) {
    alignas(64) uint8_t config[64] = {1};  // palette 1
    for (int tile = 0; tile < 8; tile++) {
      config[16 + 2 * tile] = 64;  // bytes a row, 16 bits wide
      config[48 + tile] = 16;      // rows
    }
    asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
  }
  ~Session() { asm volatile("tilerelease" ::: "memory"); }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  float* const product;  // 32 by 32: four tiles on their way to memory
  bf16* const tail;      // the last, partial step of two strips
  bf16* const pairs;     // the rows of a block, interleaved in pairs, 32 columns of them
  bf16* const copy;      // two strips that cannot be read in place
};

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

template <int T>
inline __attribute__((always_inline)) void load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(T), "r"(p), "r"(stride) : "memory");
}
template <int T>
inline __attribute__((always_inline)) void store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(T), "r"(p), "r"(stride) : "memory");
}
template <int T>
inline __attribute__((always_inline)) void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int C, int A, int B>
inline __attribute__((always_inline)) void multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// Sixteen rows of a left operand: k bfloat16 each, `stride` bytes apart; the last k % 32 are at `tail`, 64 bytes apart.
struct Strip {
  const char* p;
  int64_t stride;
  const char* tail;
};

// Tiles 0..3 (row-major, 2 by 2) += left strips * right panels; MT row tiles, NT column tiles.
template <int MT, int NT>
inline __attribute__((always_inline)) void step(const char* a0, int64_t s0, const char* a1, int64_t s1, const bf16* b0,
                                                const bf16* b1) {
  load<4>(a0, s0);
  load<6>(b0, 64);
  multiply<0, 4, 6>();
  if constexpr (NT == 2) {
    load<7>(b1, 64);
    multiply<1, 4, 7>();
  }
  if constexpr (MT == 2) {
    load<5>(a1, s1);
    multiply<2, 5, 6>();
    if constexpr (NT == 2) multiply<3, 5, 7>();
  }
}
template <int MT, int NT>
inline __attribute__((always_inline)) void clear() {
  zero<0>();
  if constexpr (NT == 2) zero<1>();
  if constexpr (MT == 2) zero<2>();
  if constexpr (MT == 2 && NT == 2) zero<3>();
}
// Stores tiles 0..3 as a matrix whose rows are `stride` bytes apart.
template <int MT, int NT>
inline __attribute__((always_inline)) void store_all(float* c, int64_t stride) {
  store<0>(c, stride);
  if constexpr (NT == 2) store<1>(c + 16, stride);
  if constexpr (MT == 2) store<2>(c + 4 * stride, stride);
  if constexpr (MT == 2 && NT == 2) store<3>(c + 4 * stride + 16, stride);
}
template <int MT, int NT>
inline __attribute__((always_inline)) void load_all(const float* c, int64_t stride) {
  load<0>(c, stride);
  if constexpr (NT == 2) load<1>(c + 16, stride);
  if constexpr (MT == 2) load<2>(c + 4 * stride, stride);
  if constexpr (MT == 2 && NT == 2) load<3>(c + 4 * stride + 16, stride);
}

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

inline uint32_t mask_of(int64_t count) { return count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1; }

FASTADAPT_AVX512 inline __m512 widen(__mmask16 mask, const bf16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16));
}
// Rounds to nearest even.
FASTADAPT_AVX512 inline __m512i narrow(__m512 first, __m512 second) { return (__m512i)_mm512_cvtne2ps_pbh(second, first); }

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

// z[m, n] = start + x * B; z has round_up(m, 16) rows of ldz >= round_up(n, 16) floats, of which the surplus is overwritten.
// start: round_up(n, 16) floats for every row, or null.
inline void down(const Session& session, const bf16* const* x, int64_t m, int64_t k, const bf16* packed, int64_t n,
                 const float* start, float* z, int64_t ldz) {
  const int64_t k32 = round_up(k, 32), panels = round_up(n, 16) / 16;
  for (int64_t i = 0; i < m; i += 32) {
    const bool two = m - i > 16;
    detail::Strip strips[2];
    for (int64_t s = 0; s <= two; s++)
      strips[s] = detail::strip(x + i + 16 * s, least(16, m - i - 16 * s), k, session.copy + 16 * k32 * s,
                                session.tail + 512 * s);
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
FASTADAPT_AVX512 inline void up(const Session& session, const bf16* a, int64_t m, int64_t k, const bf16* packed, int64_t n,
                                const Epilogue& e, bf16* const* y) {
  const int64_t lda = round_up(k, 32);
  for (int64_t c = 0; c < n; c += 32) {
    const detail::Columns col = detail::columns(e, c, n);
    for (int64_t i = 0; i < m; i += 32) {
      (m - i > 16 ? detail::up_tile<2> : detail::up_tile<1>)(a + i * lda, lda, packed + c * lda, lda / 32, session.product);
      for (int64_t j = i; j < least(m, i + 32); j++) detail::finish_row(e, col, session.product + 32 * (j - i), j, c, y[j]);
    }
  }
}

// c[r, n] += at * x, or = if fresh; at as transpose_round leaves it for m rows, c has round_up(r, 16) rows of
// ldc >= accumulator_stride(n) floats.
FASTADAPT_AVX512 inline void accumulate(const Session& session, const bf16* at, int64_t lda, int64_t r, const bf16* const* x,
                                        int64_t m, int64_t n, bool fresh, float* c, int64_t ldc) {
  const int64_t m32 = round_up(m, 32), r16 = round_up(r, 16);
  for (int64_t j = 0; j < n; j += 32) {
    const uint32_t mask = detail::mask_of(n - j);
    for (int64_t i = 0; i < m32; i += 2) {
      __m512i first, second;
      detail::interleave(detail::row32(x[least(i, m - 1)] + j, i < m ? mask : 0),
                         detail::row32(x[least(i + 1, m - 1)] + j, i + 1 < m ? mask : 0), &first, &second);
      bf16* out = session.pairs + i / 32 * 1024 + i % 32 * 16;
      _mm512_store_si512(out, first);
      _mm512_store_si512(out + 512, second);
    }
    for (int64_t i = 0; i < r16; i += 32)
      (r16 - i > 16 ? detail::accumulate_tile<2> : detail::accumulate_tile<1>)(at + i * lda, lda, m32 / 32, session.pairs,
                                                                               fresh, c + i * ldc + j, ldc);
  }
}

#else

inline bool available() { return false; }

#endif  // FASTADAPT_AMX

}  // namespace fastadapt::amx
