// Forward of prefix_attention in bfloat16 where the processor has AMX. Prefix and own keys stand in one row of columns, unless
// a gate keeps their sums apart: a short prefix takes no tile of its own. Weights are summed up in float32 and rounded to
// bfloat16 for their product with values, as matrix units do.
#pragma once
#include "prefix_attention_amx_tiles.h"
#include "prefix_attention_forward.h"

#if FASTADAPT_AMX
namespace fastadapt::FA_TARGET::prefix_attention {

template <class W>
struct AmxForward : Forward<BFloat16, W>, AmxOperands {
  using Vector = Forward<BFloat16, W>;
  using AmxOperands::T, AmxOperands::C;
  using typename Vector::Sums, typename Vector::Unit;
  using Vector::L;

  // Keys of a tile, and the distance of rows of scores and of weights: odd numbers of cache lines, which no cache set repeats.
  static constexpr int64_t tile_keys = 256, score_ld = tile_keys + 16, weight_ld = tile_keys + 32;

  // Few rows would leave tiles next to empty.
  static FA_INLINE bool fits(const Problem& p) { return p.t * (p.h / p.h_kv) > few_rows; }

  struct Thread : Sums {
    int64_t* packed;               // head and index of the prefix whose whole tiles lie in `prefix`
    int64_t* ends;                 // columns of keys that the rows of a unit see, but for attn_mask
    T *q, *rows;                   // left operands: queries of a unit; scratch for keys on their way to the right ones
    T *keys, *values, *prefix;     // right operands: (e, keys), (keys, e); of the prefix both in turns
    C *scores, *factors;           // (block, keys); of dropout, of a row
    T *weights, *scratch;          // a left operand
  };

  static FA_INLINE int64_t tile_size(const Problem& p) { return tile_keys * width(p); }

  static int64_t prefix_tiles(const Problem& p) {
    const int64_t tiles = p.p / tile_keys;
    return 2 * tiles * tile_size(p) * static_cast<int64_t>(sizeof(T)) <= kept_bytes ? tiles : 0;
  }

  static Thread thread(const Problem& p, Arena& arena) {
    const int64_t rows = round_up(p.unit_heads * p.unit_queries, block);
    Thread t{Vector::sums(p, rows, amx::accumulator_stride(p.e), arena)};
    t.packed = arena.take<int64_t>(2);
    t.ends = arena.take<int64_t>(rows);
    t.q = arena.take<T>(rows * width(p));
    for (T** tile : {&t.rows, &t.keys, &t.values}) *tile = arena.take<T>(tile_size(p));
    t.prefix = arena.take<T>(2 * prefix_tiles(p) * tile_size(p));
    t.scores = arena.take<C>(block * score_ld);
    t.factors = arena.take<C>(p.dropped ? tile_keys + 2 * drawn_columns : 0);
    t.weights = arena.take<T>(block * weight_ld);
    t.scratch = arena.take<T>(amx::scratch_size(block, block));
    return t;
  }

  static int64_t thread_bytes(const Problem& p) {
    if (!fits(p)) return Vector::thread_bytes(p);
    Arena arena(nullptr);
    thread(p, arena);
    return arena.used();
  }

  static void begin(const Problem& p, void* memory) {
    if (!fits(p)) return Vector::begin(p, memory);
    Arena arena(memory);
    const Thread t = thread(p, arena);
    t.packed[0] = t.packed[1] = -1;
  }

  // A row of columns of keys: the first `prefix` are those of prefix `index`, own ones follow.
  struct Columns {
    int64_t index, prefix;
  };

  // n columns from `first` on, of them `prefix` of the prefix and then own keys from `own` on.
  struct Tile {
    int64_t first, n, prefix, own;
    T *keys, *values;
    FA_INLINE Tile(const Columns& all, int64_t first, int64_t n)
        : first(first), n(n), prefix(most(0, least(n, all.prefix - first))), own(most(0, first - all.prefix)) {}
  };

  static void pack(const Problem& p, const Thread& t, const Unit& u, const Columns& all, const Tile& tile) {
    const int64_t ld = width(p), n = round_up(tile.n, block);
    auto copy_rows = [&](const Heads& prefix, const Heads& own) {
      if (tile.prefix)
        copy(row_of<W>(prefix, all.index, u.kv, tile.first), prefix.stride[2], prefix.stride[3], tile.prefix, p.e, t.rows,
             tile.prefix == tile.n ? n : tile.prefix, ld);
      if (tile.prefix < tile.n)
        copy(row_of<T>(own, u.i, u.kv, tile.own), own.stride[2], own.stride[3], tile.n - tile.prefix, p.e,
             t.rows + tile.prefix * ld, n - tile.prefix, ld);
    };
    copy_rows(p.prefix_k, p.k);
    pack_columns(t.rows, n, ld, tile.keys);
    copy_rows(p.prefix_v, p.v);
    pack_rows(t.rows, n, ld, tile.values);
  }

  // Factors of the first n columns of a tile, for a row of the dropout matrix.
  static const C* draw(const Problem& p, const Thread& t, const Tile& tile, int64_t row, int64_t n) {
    const Dropout drop = dropout_of(p);
    const int64_t shift = tile.own % 8;  // it draws from multiples of eight on
    if (tile.prefix) dropout_factors(drop, row, tile.first, least(n, tile.prefix), t.factors);
    if (tile.prefix < n)
      dropout_factors(drop, row, own_column(p) + tile.own - shift, n - tile.prefix + shift, t.factors + tile.prefix);
    return t.factors + shift;
  }

  // Weights of the first n columns, a multiple of 32, of a row. What is in memory times `to_score` is a score by base 2.
  template <bool DROPPED>
  static FASTADAPT_AVX512 void weigh(const Thread& t, int64_t row, const C* scores, int64_t n, C to_score, const C* factors,
                                     T* weights) {
    __m512 high[2] = {_mm512_load_ps(scores), _mm512_load_ps(scores + L)};
    for (int64_t c = block; c < n; c += block)
      for (int v = 0; v < 2; ++v) high[v] = _mm512_max_ps(_mm512_load_ps(scores + c + v * L), high[v]);
    const VF top = bit_cast<VF>(_mm512_max_ps(high[0], high[1])) * to_score;
    if (any(top > t.top[row] + slack)) Vector::raise(t, row, top);
    const __m512 factor = _mm512_set1_ps(to_score), shift = _mm512_set1_ps(t.top[row] == -infinity<C> ? 0 : t.top[row]);
    __m512 total[2] = {bit_cast<__m512>(load<C>(t.total + row * L)), _mm512_setzero_ps()};
    for (int64_t c = 0; c < n; c += block) {
      __m512 weight[2];
      for (int v = 0; v < 2; ++v) {
        weight[v] = rough_power_of_2(_mm512_fmsub_ps(_mm512_load_ps(scores + c + v * L), factor, shift));
        total[v] = _mm512_add_ps(total[v], weight[v]);
        if (DROPPED) weight[v] = _mm512_mul_ps(weight[v], _mm512_loadu_ps(factors + c + v * L));
      }
      _mm512_store_si512(weights + c, amx::detail::narrow(weight[0], weight[1]));
    }
    store(t.total + row * L, bit_cast<VF>(_mm512_add_ps(total[0], total[1])));
  }

  // Rows [g, g + 32) of a unit, as far as there are, through the first n columns of a tile, a multiple of 32.
  static void weigh_rows(const Problem& p, const Thread& t, const Unit& u, const Tile& tile, int64_t g, int64_t n) {
    const bool masked = p.mask_kind != Mask::none && tile.prefix < tile.n, plain = !masked && p.scale > 0;
    const C to_score = static_cast<C>(p.scale * log2_e);
    for (int64_t r = 0, row; r < block && (row = g + r) < u.heads * u.queries; ++r) {
      C* const scores = t.scores + r * score_ld;
      T* const weights = t.weights + r * weight_ld;
      const int64_t head = u.head + row / u.queries, query = u.first + row % u.queries;
      const int64_t end = most(0, least(n, t.ends[row] - tile.first));
      for (int64_t c = 0; c < n && !plain; c += L) store(scores + c, load<C>(scores + c) * to_score);
      if (masked && end > tile.prefix)
        add_mask<T>(p, u.i, head, query, tile.own, end - tile.prefix, scores + tile.prefix);
      if (end < n) hide(end, n, scores);
      if (p.dropped)
        weigh<true>(t, row, scores, n, plain ? to_score : 1, draw(p, t, tile, dropout_row(p, u.i, head, query), n), weights);
      else
        weigh<false>(t, row, scores, n, plain ? to_score : 1, nullptr, weights);
    }
  }

  static void attend(const Problem& p, const Thread& t, const Unit& u, const Tile& tile) {
    const int64_t ld = width(p), steps = ld / block, key_steps = ceil_div(tile.n, block);
    for (int64_t g = 0; g < u.heads * u.queries; g += block) {
      int64_t end = 0;
      for (int64_t r = g; r < least(g + block, u.heads * u.queries); ++r) end = most(end, t.ends[r]);
      const int64_t seen = least(key_steps, ceil_div(most(0, end - tile.first), block)), n = seen * block;
      if (!seen) continue;
      for (int64_t c = 0; c < n; c += block)
        multiply<false>(0, steps, t.q + g * ld, ld, tile.keys + c * ld, steps, t.scores + c, score_ld);
      weigh_rows(p, t, u, tile, g, n);
      for (int64_t c = 0; c < ld; c += block)
        multiply<true>(0, seen, t.weights, weight_ld, tile.values + c * key_steps * block, key_steps, t.y + g * t.ld + c, t.ld);
    }
  }

  // All rows of a unit through the columns of a prefix, of own keys, or both.
  static void through(const Problem& p, const Thread& t, const Unit& u, bool prefix, bool own) {
    const int64_t index = p.prefix_of[u.i], kept = prefix_tiles(p), rows = u.heads * u.queries;
    const Columns all{index, prefix && index >= 0 ? p.p : 0};
    for (int64_t r = 0; r < rows; ++r)
      t.ends[r] = all.prefix + (own ? own_end(p, u.i, u.first + r % u.queries) : 0);
    const int64_t end = t.ends[rows - 1];  // the last query sees the most
    const bool here = t.packed[0] == u.kv && t.packed[1] == index;
    for (int64_t first = 0; first < end; first += tile_keys) {
      Tile tile(all, first, least(tile_keys, end - first));
      const bool stays = first / tile_keys < kept && tile.prefix == tile_keys;
      tile.keys = stays ? t.prefix + 2 * first * width(p) : t.keys;
      tile.values = stays ? tile.keys + tile_size(p) : t.values;
      if (!stays || !here) pack(p, t, u, all, tile);
      attend(p, t, u, tile);
    }
    if (all.prefix) t.packed[0] = u.kv, t.packed[1] = index;
  }

  static void forward(const Problem& p, void* memory, int64_t unit) {
    if (!fits(p)) return Vector::forward(p, memory, unit);
    Arena arena(memory);
    const Thread t = thread(p, arena);
    const Unit u = Vector::unit_of(p, unit);
    const int64_t rows = u.heads * u.queries, ld = width(p);
    {
      const amx::TileScope tiles(t.scratch, block);
      for (int64_t r = 0; r < rows; r += u.queries) {
        const int64_t all = r + u.queries < rows ? u.queries : round_up(rows, block) - r;
        copy(row_of<T>(p.q, u.i, u.head + r / u.queries, u.first), p.q.stride[2], p.q.stride[3], u.queries, p.e, t.q + r * ld,
             all, ld);
      }
      Vector::restart(t, round_up(rows, block));
      through(p, t, u, true, !p.gate);
      if (p.gate) {
        Vector::end_prefix(p, t, u, rows);
        through(p, t, u, false, true);
      }
    }
    Vector::end(p, t, u, rows);
  }

  static Kernel kernel() { return {thread_bytes, begin, forward}; }
};

}  // namespace fastadapt::FA_TARGET::prefix_attention
#endif
