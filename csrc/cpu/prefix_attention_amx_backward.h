// The tiles of prefix_attention's backward in bfloat16 where the processor has AMX. Scores stand with keys as rows and queries
// as columns: so weights are left operands for the gradients of keys and values as they are.
//
// Weights and gradients of scores are rounded to bfloat16, as matrix units do. Calls with a mask, dropout or a gate stay with
// the vector kernels.
#pragma once
#include "prefix_attention_amx_tiles.h"
#include "prefix_attention_backward.h"

#if FASTADAPT_AMX
namespace fastadapt::FA_TARGET::prefix_attention {

template <class W>
struct AmxTiles : Tiles<BFloat16, W>, AmxOperands {
  using Base = Tiles<BFloat16, W>;
  using AmxOperands::T, AmxOperands::C, AmxOperands::width, AmxOperands::pack_rows, AmxOperands::pack_columns;
  using typename Base::Softmax, typename Base::Tile;
  using Base::group, Base::L;

  // A tile of many keys: what is packed of its queries serves them all.
  static constexpr int64_t tile_keys = 256, tile_queries = 128, strip = block;

  static FA_INLINE bool fits(const Problem& p) { return !p.gate && p.mask_kind == Mask::none && !p.dropped; }

  struct Thread {
    T *scratch, *rows;
    T *keys, *values, *keys_t;           // left operands: (keys, e) twice, (e, keys)
    T *q_t, *grad_y_t, *q, *grad_y;      // right operands: (e, queries) twice, (queries, e) twice
    T *weights, *grad_scores;            // left operands: (block of keys, queries)
    T* all_grad_scores;                  // a right operand: (keys, queries)
    C *scores, *grad_weights, *grad_q;   // (block of keys, queries) twice, (e, queries)
    C *grad_k, *grad_v;                  // (keys, e)
    Softmax own, prefix;
  };

  static FA_INLINE Thread thread(const Problem& p, Arena& arena) {
    Thread w;
    const int64_t keys = tile_keys * width(p), queries = tile_queries * width(p);
    w.scratch = arena.take<T>(amx::scratch_size(block, block));
    w.rows = arena.take<T>(keys);
    for (T** a : {&w.keys, &w.values, &w.keys_t}) *a = arena.take<T>(keys);
    for (T** a : {&w.q_t, &w.grad_y_t, &w.q, &w.grad_y}) *a = arena.take<T>(queries);
    for (T** a : {&w.weights, &w.grad_scores}) *a = arena.take<T>(block * tile_queries);
    w.all_grad_scores = arena.take<T>(tile_keys * tile_queries);
    for (C** a : {&w.scores, &w.grad_weights}) *a = arena.take<C>(block * tile_queries);
    w.grad_q = arena.take<C>(queries);
    for (C** a : {&w.grad_k, &w.grad_v}) *a = arena.take<C>(keys);
    for (C** a : {&w.own.lse, &w.own.rest, &w.own.delta}) *a = arena.take<C>(group(p) * p.t);
    w.prefix = w.own;
    return w;
  }

  // Configures the tile registers of a thread while it lives.
  struct Scope {
    const amx::TileScope tiles;
    explicit Scope(const Thread& w) : tiles(w.scratch, block) {}
  };

  // Rows of a packed right operand as columns of a left one, tile_keys apart.
  static FASTADAPT_AVX512 void transpose_rows(const T* packed, int64_t n, int64_t ld, T* out) {
    for (int64_t c = 0; c < ld; c += 16)
      for (int64_t l = 0; l < n; l += block, packed += panel) {
        __m512i v[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) v[i] = _mm512_load_si512(packed + 32 * i);
        amx::detail::transpose(v);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) _mm512_store_si512(out + (c + i) * tile_keys + l, v[i]);
      }
  }

  static void pack(const Problem& p, const Tile& tile, const Thread& w) {
    const int64_t all = round_up(tile.n, block), ld = width(p);
    auto pack = [&](auto like, const Heads& k, const Heads& v, int64_t i) {
      using S = decltype(like);
      copy(row_of<S>(k, i, tile.head, tile.first), k.stride[2], k.stride[3], tile.n, p.e, w.keys, all, ld);
      if (!tile.slopes) return;
      copy(row_of<S>(v, i, tile.head, tile.first), v.stride[2], v.stride[3], tile.n, p.e, w.values, all, ld);
      pack_rows(w.keys, all, ld, w.rows);
      transpose_rows(w.rows, all, ld, w.keys_t);
    };
    if (tile.own)
      pack(T{}, p.k, p.v, tile.i);
    else
      pack(W{}, p.prefix_k, p.prefix_v, p.prefix_of[tile.i]);
  }

  // Queries [l, l + m) of a head, in whole blocks `all`; query l + r sees the keys up to r + limit.
  struct Queries {
    int64_t m, all, limit;
    C lse[tile_queries], delta[tile_queries];
  };

  static Queries queries(const Problem& p, const Tile& tile, const Thread& w, int64_t j, int64_t l) {
    const int64_t m = least(tile_queries, p.t - l), row = (j - tile.head * group(p)) * p.t + l, ld = width(p);
    Queries s;
    s.m = m;
    s.all = round_up(m, block);
    s.limit = tile.own && p.is_causal ? least(tile_keys, l + p.t_k - p.t - tile.first) : tile_keys;
    for (int64_t r = 0; r < s.all; ++r) {
      s.lse[r] = r < m ? w.own.lse[row + r] : infinity<C>;
      s.delta[r] = r < m ? w.own.delta[row + r] : 0;
    }
    auto pack = [&](const Heads& t, T* columns, T* rows) {
      copy(row_of<T>(t, tile.i, j, l), t.stride[2], t.stride[3], m, p.e, w.rows, s.all, ld);
      if (columns) pack_columns(w.rows, s.all, ld, columns);
      if (rows) pack_rows(w.rows, s.all, ld, rows);
    };
    pack(p.q, w.q_t, tile.slopes ? w.q : nullptr);
    pack(p.grad_y, tile.slopes ? w.grad_y_t : nullptr, w.grad_y);
    return s;
  }

  // Keys [key, key + 32) of the tile, queries from `begin` on: scores become weights, gradients of weights those of scores.
  static FASTADAPT_AVX512 void weigh(const Problem& p, const Tile& tile, const Thread& w, const Queries& s, int64_t key,
                                     int64_t begin) {
    typedef Simd<C>::I I;
    const C to_score = static_cast<C>(p.scale * log2_e), to_grad = static_cast<C>(p.scale);
    I index;
    for (int c = 0; c < L; ++c) index[c] = c;
    for (int64_t r = 0; r < block; r += 2)
      for (int64_t c = begin; c < s.all; c += block) {
        __m512i slopes[2];
        for (int h = 0; h < 2; ++h) {
          const int64_t k = key + r + h, at = (r + h) * tile_queries + c;
          const int first = static_cast<int>(k < tile.n ? k - s.limit : tile_queries);  // of the queries that see the key
          VF weight[2], slope[2] = {};
          for (int v = 0; v < 2; ++v) {
            const auto seen = index + static_cast<int>(c + v * L) >= first;
            const VF score = load<C>(w.scores + at + v * L) * to_score - load<C>(s.lse + c + v * L);
            weight[v] = seen ? bit_cast<VF>(rough_power_of_2(bit_cast<__m512>(score))) : VF{};
            if (!tile.slopes) continue;
            slope[v] = weight[v] * (load<C>(w.grad_weights + at + v * L) - load<C>(s.delta + c + v * L)) * to_grad;
            slope[v] = seen ? slope[v] : VF{};
          }
          _mm512_store_si512(w.weights + at, amx::detail::narrow(bit_cast<__m512>(weight[0]), bit_cast<__m512>(weight[1])));
          slopes[h] = amx::detail::narrow(bit_cast<__m512>(slope[0]), bit_cast<__m512>(slope[1]));
          _mm512_store_si512(w.grad_scores + at, slopes[h]);
        }
        amx::detail::interleave(slopes[0], slopes[1], &slopes[0], &slopes[1]);
        T* to = w.all_grad_scores + c / 16 * tile_keys * 16 + key / block * panel + r * 16;
        _mm512_store_si512(to, slopes[0]);
        _mm512_store_si512(to + tile_keys * 16, slopes[1]);
      }
  }

  static void add_deltas(const Problem&, const Tile&, const Thread&, const Queries&, C*) {}  // there is no gate

  static void visit(const Problem& p, const Tile& tile, const Thread& w, const Queries& s, C* grad_q, int64_t ld) {
    const int64_t steps = ld / block, of_queries = s.all / block;
    int64_t key = 0;
    for (; key < tile.n; key += block) {
      const int64_t begin = most(0, key - s.limit) / block * block;
      if (begin >= s.all) break;
      for (int64_t c = begin; c < s.all; c += block) {
        multiply<false>(0, steps, w.keys + key * ld, ld, w.q_t + c * ld, steps, w.scores + c, tile_queries);
        if (tile.slopes)
          multiply<false>(0, steps, w.values + key * ld, ld, w.grad_y_t + c * ld, steps, w.grad_weights + c, tile_queries);
      }
      weigh(p, tile, w, s, key, begin);
      for (int64_t c = 0; c < ld; c += block) {
        const int64_t from = begin / block, at = key * ld + c;
        multiply<true>(from, of_queries, w.weights, tile_queries, w.grad_y + c * s.all, of_queries, w.grad_v + at, ld);
        if (tile.slopes)
          multiply<true>(from, of_queries, w.grad_scores, tile_queries, w.q + c * s.all, of_queries, w.grad_k + at, ld);
      }
    }
    if (!grad_q) return;
    for (int64_t c = 0; c < s.all; c += block) {
      const int64_t seen = least(key, round_up(most(0, c + block + s.limit), block)) / block;
      for (int64_t l = 0; l < ld; l += block)
        multiply<false>(0, seen, w.keys_t + l * tile_keys, tile_keys, w.all_grad_scores + c * tile_keys, tile_keys / block,
                        w.grad_q + l * tile_queries + c, tile_queries);
    }
    add_to_queries(w, s, grad_q, ld);
  }

  // grad_q += the transpose of what its tile of keys gives it.
  static FA_INLINE void add_to_queries(const Thread& w, const Queries& s, C* grad_q, int64_t ld) {
    for (int64_t r = 0; r < s.m; r += L)
      for (int64_t c = 0; c < ld; c += L) {
        VF v[L];
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) v[i] = load<C>(w.grad_q + (c + i) * tile_queries + r);
        transpose<C>(v);
        for (int64_t i = 0; i < least(L, s.m - r); ++i) put(grad_q + (r + i) * ld + c, v[i], true);
      }
  }
};

// Those of the tiles for a call that fits them, else those of the vectors.
template <class W>
struct AmxBackward {
  using Matrix = BackwardOf<AmxTiles<W>>;
  using Vector = Backward<BFloat16, W>;

  static int64_t shared_bytes(const Problem& p) { return Matrix::fits(p) ? Matrix::shared_bytes(p) : Vector::shared_bytes(p); }
  static int64_t thread_bytes(const Problem& p) { return Matrix::fits(p) ? Matrix::thread_bytes(p) : Vector::thread_bytes(p); }
  static int64_t units(const Problem& p, int phase) {
    return Matrix::fits(p) ? Matrix::units(p, phase) : Vector::units(p, phase);
  }
  static void run(const Problem& p, int phase, void* shared, void* thread, int64_t unit) {
    (Matrix::fits(p) ? Matrix::run : Vector::run)(p, phase, shared, thread, unit);
  }

  static BackwardKernel kernel() { return {shared_bytes, thread_bytes, units, run}; }
};

}  // namespace fastadapt::FA_TARGET::prefix_attention
#endif
