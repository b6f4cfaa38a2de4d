// What both directions of prefix_attention share: tiles of keys and values, which queries see them, and weights.
//
// Scores are scaled by log2(e) beside the scale of the call, so that a weight is a power of 2.
#pragma once
#include "narrow.h"
#include "philox.h"
#include "prefix_attention_args.h"
#include "rows.h"

namespace fastadapt::FA_TARGET::prefix_attention {

using namespace fastadapt::prefix_attention;

// Keys of a tile. Dropout draws for a tile at once, from a multiple of eight columns on.
constexpr int64_t tile_keys = 64;
static_assert(tile_keys % drawn_columns == 0);

constexpr double log2_e = 1.4426950408889634, ln_2 = 0.6931471805599453;

template <class C>
constexpr C infinity = static_cast<C>(__builtin_inf());
template <class C>
constexpr C lowest = sizeof(C) == sizeof(float) ? -__FLT_MAX__ : -__DBL_MAX__;

// 2^x with an error of an ulp; below -126 it is 0. In float32 for x up to 127.
FA_INLINE VF power_of_2(VF x) {
  const float magic = 12582912.0f;  // as in exp()
  x = x < -127.0f ? VF{} - 127.0f : x;
  const VF shifted = x + magic, t = x - (shifted - magic);
  VF p = 1.535336196e-4f * t + 1.339887385e-3f;
  p = p * t + 9.618436918e-3f;
  p = p * t + 5.550332367e-2f;
  p = p * t + 0.2402264774f;
  p = p * t + 0.6931471825f;
  p = p * t + 1.0f;
  return p * bit_cast<VF>((bit_cast<Simd<float>::I>(shifted) - 0x4b400000 + 127) << 23);
}

FA_INLINE VD power_of_2(VD x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = __builtin_exp2(x[i]);
  return x;
}

// Whether a comparison holds in any lane.
template <class I>
FA_INLINE bool any(I compared) {
#if defined(FA_AVX512)
  return _mm512_movepi32_mask(bit_cast<__m512i>(compared));
#elif defined(FA_AVX2)
  return _mm256_movemask_epi8(bit_cast<__m256i>(compared));
#else
  uint64_t words[sizeof(I) / 8], all = 0;
  memcpy(words, &compared, sizeof words);
  for (uint64_t word : words) all |= word;
  return all;
#endif
}

// f(integral_constant<n>) for n in [1, MOST].
template <int MOST, class F>
FA_INLINE void for_vectors(int64_t n, F&& f) {
  if (n == MOST) return f(RowCount<MOST>{});
  if constexpr (MOST > 1) for_vectors<MOST - 1>(n, f);
}

// Hides keys [begin, end) of a row of scores, and what lies behind them in the last vector.
template <class C>
FA_INLINE void hide(int64_t begin, int64_t end, C* scores) {
  Vec<C> lane;
  for (int l = 0; l < lanes<C>; ++l) lane[l] = l;
  for (int64_t j = begin / lanes<C> * lanes<C>; j < end; j += lanes<C>)
    store(scores + j, lane < static_cast<C>(begin - j) ? load<C>(scores + j) : broadcast<C>(-infinity<C>));
}

// --- memory ----------------------------------------------------------------------------------------------------------

// Row l of head j of sequence i.
template <class S>
FA_INLINE const S* row_of(const Heads& t, int64_t i, int64_t j, int64_t l) {
  return static_cast<const S*>(t.data) + i * t.stride[0] + j * t.stride[1] + l * t.stride[2];
}

// Row l of head j of sequence i of a tensor (b, rows, heads, e) without gaps.
template <class S>
FA_INLINE S* row_by_token(void* t, int64_t rows, int64_t heads, int64_t e, int64_t i, int64_t j, int64_t l) {
  return static_cast<S*>(t) + ((i * rows + l) * heads + j) * e;
}

// What a prefix of its own dtype is to a q of the dtype T: rounded to it.
template <class T, class C>
FA_INLINE void round_to(C* data, int64_t n) {
  for (int64_t j = 0; j < n; j += lanes<C>) {
    T buffer[lanes<C>];
    store(buffer, load<C>(data + j));
    store(data + j, load<C>(buffer));
  }
}

// n rows of t one behind the other, `ld` apart, a multiple of the lanes, with zeros beyond column e. S is the dtype in memory.
template <class T, class S, class C>
void pack_rows(const S* from, int64_t stride, int64_t step, int64_t n, int64_t e, C* out, int64_t ld) {
  for (int64_t l = 0; l < n; ++l, out += ld) {
    for (int64_t c = 0; c < e; c += lanes<C>) store(out + c, load_at<C>(from + l * stride, c, e - c, step));
    if constexpr (sizeof(T) < sizeof(S)) round_to<T>(out, e);
  }
}

// Column c of n rows at out[c * width], `width` a multiple of the lanes that is at least n; zeros beyond column n.
template <class T, class S, class C>
void pack_columns(const S* from, int64_t stride, int64_t step, int64_t n, int64_t e, C* out, int64_t width) {
  const Source<C, S> source{from, step, stride, e, n, nullptr, nullptr};
  for (int64_t j = 0; j < width; j += lanes<C>) pack_vector(source, j, 0, e, out + j, width);
  if constexpr (sizeof(T) < sizeof(S)) round_to<T>(out, e * width);
}

// --- products --------------------------------------------------------------------------------------------------------

// Terms that are summed in one sequence: one over a whole row of a wide head would err more than PyTorch's.
constexpr int64_t sum_block = 16;

// c = a * b, or with `accumulate` c += a * b, for the whole vectors that hold n columns: a is (rows, k), b (k, n).
template <class C>
void product(int64_t rows, int64_t k, int64_t n, const C* a, int64_t lda, const C* b, int64_t ldb, bool accumulate, C* c,
             int64_t ldc) {
  constexpr int L = lanes<C>;
  for (int64_t k0 = 0; k0 < k; k0 += sum_block, accumulate = true)
    for_panels<C>(n, [&](auto nv, int64_t j) FA_FORCED {
      constexpr int NV = decltype(nv)::value;
      for_row_tiles<NV>(rows, [&](auto mr, int64_t i) FA_FORCED {
        constexpr int MR = decltype(mr)::value;
        Vec<C> acc[MR][NV] = {};
        C* out = c + i * ldc + j;
        multiply<C, MR, NV, false>(least(sum_block, k - k0), a + i * lda + k0, lda, b + k0 * ldb + j, ldb, acc);
#pragma GCC unroll 16
        for (int t = 0; t < MR; ++t)
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) put(out + t * ldc + v * L, acc[t][v], accumulate);
      });
    });
}

// Rows of all heads of a key head up to which own keys are read where they lie: to pack them would take longer.
constexpr int64_t few_rows = 4;

// Whether whole vectors of rows of t can be read for few rows. Not a question of the number of threads, so that bits aren't.
template <class C>
FA_INLINE bool in_place(const Problem& p, const Heads& t) {
  return p.t * (p.h / p.h_kv) <= few_rows && p.e % lanes<C> == 0 && t.stride[3] == 1;
}

// Scores of rows, `ld` apart, and own keys [first, first + n) of a head, by vectors along a key. Both directions have to take
// the same way: backward relies on the bits of forward's scores.
template <class T, class C>
void scores_in_place(const Problem& p, int64_t i, int64_t kv, int64_t first, int64_t n, int64_t rows, const C* q, int64_t ld,
                     C* scores) {
  constexpr int L = lanes<C>;
  const T* key = row_of<T>(p.k, i, kv, first);
  for (int64_t j = 0; j < n; j += L)
    for (int64_t r = 0; r < rows; ++r) {
      Vec<C> acc[L] = {};
      for (int64_t c = 0; c < p.e; c += L) {
        const Vec<C> x = load<C>(q + r * ld + c);
#pragma GCC unroll 16
        for (int l = 0; l < L; ++l) acc[l] += x * load<C>(key + least(j + l, n - 1) * p.k.stride[2] + c);
      }
      store(scores + r * tile_keys + j, sums<C, L>(acc));
    }
}

// --- who sees what ---------------------------------------------------------------------------------------------------

// The own keys that query l of sequence i sees, but for attn_mask: those below this one.
FA_INLINE int64_t own_end(const Problem& p, int64_t i, int64_t l) {
  const int64_t end = p.is_causal ? least(p.t_k, l + p.t_k - p.t + 1) : p.t_k;
  return most(0, least(end, p.key_lengths[i]));
}

// The first query that sees own key j, as far as causality goes.
FA_INLINE int64_t first_query(const Problem& p, int64_t j) { return p.is_causal ? most(0, j - (p.t_k - p.t)) : 0; }

// Adds attn_mask to scores of query l of head j and own keys [first, first + n); -inf where a key is hidden.
template <class T, class C>
void add_mask(const Problem& p, int64_t i, int64_t j, int64_t l, int64_t first, int64_t n, C* scores) {
  const int64_t step = p.mask.stride[3];
  if (p.mask_kind == Mask::boolean) {
    const uint8_t* row = row_of<uint8_t>(p.mask, i, j, l) + first * step;
    for (int64_t k = 0; k < n; ++k) scores[k] = row[k * step] ? scores[k] : -infinity<C>;
    return;
  }
  auto add = [&](auto* row) FA_FORCED {
    row += first * step;
    for (int64_t k = 0; k < n; k += lanes<C>) {
      const Vec<C> mask = load_at<C>(row + k * step, 0, n - k, step), hidden = broadcast<C>(-infinity<C>);
      Vec<C> added = mask * static_cast<C>(log2_e);
      added = added < lowest<C> ? broadcast<C>(lowest<C>) : added;  // a finite mask hides nothing
      store(scores + k, mask == hidden ? hidden : load<C>(scores + k) + added);
    }
  };
  if (p.mask_kind == Mask::like_q)
    add(row_of<T>(p.mask, i, j, l));
  else if constexpr (sizeof(C) == sizeof(float))
    add(row_of<float>(p.mask, i, j, l));
}

// The row of the dropout matrix of query l of head j, and its column of own key 0.
FA_INLINE int64_t dropout_row(const Problem& p, int64_t i, int64_t j, int64_t l) { return (i * p.h + j) * p.t + l; }
FA_INLINE int64_t own_column(const Problem& p) { return round_up(p.p, 8); }

FA_INLINE Dropout dropout_of(const Problem& p) { return {p.seed, p.dropped, p.kept_scale}; }

}  // namespace fastadapt::FA_TARGET::prefix_attention
