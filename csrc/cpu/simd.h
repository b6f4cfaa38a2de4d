// Vectors of LANES floats (or half as many doubles) over GCC vector types, their loads and stores from every dtype, and the
// elementary functions. Included once per translation unit, in the namespace FA_TARGET of the unit's instruction set.
#pragma once
#include "types.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// The instruction set whose intrinsics fit the lanes: that of the command line, or of the unit's own pragma, for which g++
// before version 13 defines no macro; clang takes none from a pragma.
#ifndef __clang__
#define FA_SET_avx2 2
#define FA_SET_avx512 512
#endif
#define FA_JOIN(a, b) a##b
#define FA_SET(target) FA_JOIN(FA_SET_, target)
#if FA_LANES == 16 && (defined(__AVX512F__) || FA_SET(FA_TARGET) == 512)
#define FA_AVX512 1
#elif FA_LANES == 8 && ((defined(__AVX2__) && defined(__F16C__)) || FA_SET(FA_TARGET) == 2)
#define FA_AVX2 1
#endif

namespace fastadapt::FA_TARGET {

template <class C>
struct Simd;

template <>
struct Simd<float> {
  static constexpr int lanes = FA_LANES;
  typedef float V __attribute__((vector_size(4 * lanes)));
  typedef int32_t I __attribute__((vector_size(4 * lanes)));
  typedef uint32_t U __attribute__((vector_size(4 * lanes)));
  typedef uint16_t H __attribute__((vector_size(2 * lanes)));
};

template <>
struct Simd<double> {
  static constexpr int lanes = FA_LANES / 2;
  typedef double V __attribute__((vector_size(8 * lanes)));
  typedef int64_t I __attribute__((vector_size(8 * lanes)));
};

template <class C>
using Vec = typename Simd<C>::V;
template <class C>
constexpr int lanes = Simd<C>::lanes;

using VF = Vec<float>;
using UF = Simd<float>::U;
using HF = Simd<float>::H;

template <class To, class From>
FA_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <class C>
FA_INLINE Vec<C> broadcast(C s) {
  return s - Vec<C>{};
}

FA_INLINE VF widen(const BFloat16* p) {
  HF h;
  memcpy(&h, p, sizeof h);
  return bit_cast<VF>(__builtin_convertvector(h, UF) << 16);
}

FA_INLINE HF narrow_bfloat16(VF v) {
  UF u = bit_cast<UF>(v);
  UF rounded = u + 0x7fff + ((u >> 16) & 1);
  u = v == v ? rounded : (u | 0x400000);  // a NaN stays one
  return __builtin_convertvector(u >> 16, HF);
}

#if defined(FA_AVX512)
FA_INLINE VF widen(const Half* p) {
  return bit_cast<VF>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
FA_INLINE HF narrow_half(VF v) { return bit_cast<HF>(_mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT)); }
#elif defined(FA_AVX2)
FA_INLINE VF widen(const Half* p) {
  return bit_cast<VF>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
FA_INLINE HF narrow_half(VF v) { return bit_cast<HF>(_mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT)); }
#else
FA_INLINE VF widen(const Half* p) {
  HF h;
  memcpy(&h, p, sizeof h);
  UF u = __builtin_convertvector(h, UF), magnitude = (u & 0x7fff) << 13;
  UF finite = bit_cast<UF>(bit_cast<VF>(magnitude) * 0x1p112f);  // exact, subnormals too
  magnitude = magnitude < (0x7c00u << 13) ? finite : (magnitude | 0x7f800000u);
  return bit_cast<VF>(magnitude | (u & 0x8000) << 16);
}

FA_INLINE HF narrow_half(VF v) {
  UF u = bit_cast<UF>(v), sign = u & 0x80000000u, magnitude = u ^ sign;
  UF normal = magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23);
  UF subnormal = bit_cast<UF>(bit_cast<VF>(magnitude) + 0.5f) - 0x3f000000u;  // the sum rounds to multiples of 2^-24
  UF half = magnitude < (113u << 23) ? subnormal : normal >> 13;
  half = magnitude >= 0x477ff000u ? UF{} + 0x7c00 : half;  // 65520 and above round to infinity
  half = magnitude > 0x7f800000u ? UF{} + 0x7e00 : half;
  return __builtin_convertvector(half | sign >> 16, HF);
}
#endif

template <class C>
FA_INLINE Vec<C> load(const C* p) {
  Vec<C> v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class C>
FA_INLINE VF load(const BFloat16* p) { return widen(p); }
template <class C>
FA_INLINE VF load(const Half* p) { return widen(p); }

template <class C>
FA_INLINE void store(C* p, Vec<C> v) { memcpy(p, &v, sizeof v); }
FA_INLINE void store(BFloat16* p, VF v) {
  HF h = narrow_bfloat16(v);
  memcpy(p, &h, sizeof h);
}
FA_INLINE void store(Half* p, VF v) {
  HF h = narrow_half(v);
  memcpy(p, &h, sizeof h);
}

// The first `count` elements, `step` apart; the other lanes are zero.
template <class C, class T>
FA_INLINE Vec<C> load_some(const T* p, int64_t count, int64_t step = 1) {
  T buffer[lanes<C>] = {};
  for (int64_t i = 0; i < count; ++i) buffer[i] = p[i * step];
  return load<C>(buffer);
}

template <class C, class T>
FA_INLINE void store_some(T* p, Vec<C> v, int64_t count) {
  T buffer[lanes<C>];
  store(buffer, v);
  for (int64_t i = 0; i < count; ++i) p[i] = buffer[i];
}

// Combines the upper half of the lanes with the lower one, then of these again, until one is left.
template <class C, int HALF, class F, int... J>
FA_INLINE C fold(Vec<C> v, const F& combine, std::integer_sequence<int, J...> lane) {
  const Vec<C> upper = __builtin_shufflevector(v, v, (J + HALF) % lanes<C>...);
  v = combine(v, upper);
  if constexpr (HALF == 1)
    return v[0];
  else
    return fold<C, HALF / 2>(v, combine, lane);
}

template <class C, class F>
FA_INLINE C fold(Vec<C> v, const F& combine) {
  return fold<C, lanes<C> / 2>(v, combine, std::make_integer_sequence<int, lanes<C>>{});
}

template <class C>
FA_INLINE C sum(Vec<C> v) {
  return fold<C>(v, [](Vec<C> a, Vec<C> b) FA_FORCED { return a + b; });
}

// The larger of two elements each; the second where one is a NaN.
template <class C>
FA_INLINE Vec<C> maximum(Vec<C> a, Vec<C> b) {
  return a > b ? a : b;
}

template <class C>
FA_INLINE C largest(Vec<C> v) {
  return fold<C>(v, [](Vec<C> a, Vec<C> b) FA_FORCED { return maximum<C>(a, b); });
}

// exp, tanh and erf of float32 within 2 ulp; of float64 by the library, lane by lane.

FA_INLINE VF exp(VF x) {
  x = x > 89.0f ? VF{} + 89.0f : x;
  x = x < -104.0f ? VF{} - 104.0f : x;
  const float magic = 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer, which then sits in the low bits
  VF shifted = x * 1.44269504f + magic, n = shifted - magic;
  VF t = x - n * 0.693359375f;
  t = t + n * 2.12194440e-4f;
  VF p = 0.00139508072f * t + 0.00836907312f;
  p = p * t + 0.0416662011f;
  p = p * t + 0.166665173f;
  p = p * t + 0.50000001f;
  p = p * t * t + t + 1.0f;
  Simd<float>::I e = bit_cast<Simd<float>::I>(shifted) - 0x4b400000, half = e >> 1;  // two factors: 2^e itself may not exist
  return p * bit_cast<VF>((half + 127) << 23) * bit_cast<VF>((e - half + 127) << 23);
}

FA_INLINE VF absolute(VF x) { return bit_cast<VF>(bit_cast<UF>(x) & 0x7fffffffu); }
FA_INLINE VF with_sign(VF magnitude, VF x) { return bit_cast<VF>(bit_cast<UF>(magnitude) | (bit_cast<UF>(x) & 0x80000000u)); }

FA_INLINE VF tanh(VF x) {
  VF a = absolute(x), t = x * x;
  VF p = 0.00214753686f * t - 0.00818267385f;
  p = p * t + 0.0217029671f;
  p = p * t - 0.0539472043f;
  p = p * t + 0.133332098f;
  p = p * t - 0.333333309f;
  VF near = p * t * x + x;
  VF far = with_sign(1.0f - 2.0f / (exp(2.0f * a) + 1.0f), x);
  return a < 0.625f ? near : far;
}

FA_INLINE VF erf(VF x) {
  VF a = absolute(x), t = x * x;
  VF p = 7.85385465e-05f * t - 0.000801019159f;
  p = p * t + 0.00518832745f;
  p = p * t - 0.0268538118f;
  p = p * t + 0.112835851f;
  p = p * t - 0.376126258f;
  p = p * t + 1.12837917f;
  VF near = p * x;
  a = a > 3.95f ? VF{} + 3.95f : a;
  VF u = a - 2.45f;  // log(1 - erf(a)) is close to a parabola
  VF q = -2.16976709e-05f * u + 6.935825e-05f;
  q = q * u - 0.000450675954f;
  q = q * u + 0.00227662086f;
  q = q * u - 0.0112977286f;
  q = q * u - 0.942230757f;
  q = q * u - 5.25837392f;
  q = q * u - 7.54153963f;
  return a < 1.0f ? near : with_sign(1.0f - exp(q), x);
}

using VD = Vec<double>;

#define FA_LANEWISE(name)                                                  \
  FA_INLINE VD name(VD x) {                                                \
    for (int i = 0; i < lanes<double>; ++i) x[i] = __builtin_##name(x[i]); \
    return x;                                                              \
  }
FA_LANEWISE(exp)
FA_LANEWISE(tanh)
FA_LANEWISE(erf)
#undef FA_LANEWISE

}  // namespace fastadapt::FA_TARGET
