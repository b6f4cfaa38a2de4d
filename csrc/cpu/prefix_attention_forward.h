// Forward of prefix_attention: a thread takes the queries of a unit through all tiles of keys, the prefix first.
#pragma once
#include "prefix_attention_tiles.h"

namespace fastadapt::FA_TARGET::prefix_attention {

// Rows that go through a tile together: their scores stay in the first-level cache. Fewer at the diagonal, where a row costs as
// much as the last one.
constexpr int64_t group_rows = 24, diagonal_rows = 12;

// The largest score of a row may grow by so much before its sums are scaled again: a weight is at most 2^8.
constexpr int slack = 8;

// A packed prefix of a head up to this size stays for the next sequences.
constexpr int64_t kept_bytes = 512 << 10;

template <class T, class W>
struct Forward {
  using C = Compute<T>;
  static constexpr int L = lanes<C>;

  // A tile of keys, column by column, and of their values, whose rows are `ld` apart. Without `keys` they are the call's own.
  struct Tile {
    C* keys;
    const C* values;
    int64_t ld;
  };

  // What the rows of a unit have come to.
  struct Sums {
    int64_t ld;      // of y and base
    C *y, *base;     // sums of weighted values; with a gate what the prefix adds
    C *top, *total;  // a row's largest score, or a little less, and the sum of its weights in every lane
  };

  struct Thread : Sums {
    int64_t* packed;  // head and index of the prefix that lies in `prefix`
    C* q;             // scaled queries of a unit
    C *scores, *factors;
    C *keys, *values, *prefix_keys, *prefix_values;  // packed
  };

  static Sums sums(const Problem& p, int64_t rows, int64_t ld, Arena& arena) {
    Sums s;
    s.ld = ld;
    s.y = arena.take<C>(rows * ld);
    s.base = arena.take<C>(p.gate ? rows * ld : 0);
    s.top = arena.take<C>(rows);
    s.total = arena.take<C>(rows * L);
    return s;
  }

  static int64_t prefix_tiles(const Problem& p) {
    const int64_t tiles = ceil_div(p.p, tile_keys), bytes = tiles * tile_keys * (p.e + padded<C>(p.e)) * sizeof(C);
    return bytes <= kept_bytes ? tiles : 0;
  }

  static Thread thread(const Problem& p, Arena& arena) {
    const int64_t rows = p.unit_heads * p.unit_queries;
    Thread t{sums(p, rows, padded<C>(p.e), arena)};
    t.packed = arena.take<int64_t>(2);
    t.q = arena.take<C>(rows * t.ld);
    t.scores = arena.take<C>(group_rows * tile_keys);
    t.factors = arena.take<C>(p.dropped ? tile_keys : 0);
    t.keys = arena.take<C>(tile_keys * p.e);
    t.values = arena.take<C>(tile_keys * padded<C>(p.e));
    t.prefix_keys = arena.take<C>(prefix_tiles(p) * tile_keys * p.e);
    t.prefix_values = arena.take<C>(prefix_tiles(p) * tile_keys * padded<C>(p.e));
    return t;
  }

  static int64_t thread_bytes(const Problem& p) {
    Arena arena(nullptr);
    thread(p, arena);
    return arena.used();
  }

  static void begin(const Problem& p, void* memory) {
    Arena arena(memory);
    const Thread t = thread(p, arena);
    t.packed[0] = t.packed[1] = -1;
  }

  // The queries of a unit: heads [head, head + heads) of sequence i, of each queries [first, first + queries).
  struct Unit {
    int64_t i, kv, head, heads, first, queries;
  };

  // The heaviest first: those with the last queries.
  static Unit unit_of(const Problem& p, int64_t unit) {
    const int64_t group = p.h / p.h_kv, by_head = ceil_div(group, p.unit_heads), by_query = ceil_div(p.t, p.unit_queries);
    const int64_t query = by_query - 1 - unit % by_query, head = unit / by_query % by_head * p.unit_heads;
    const int64_t i = unit / by_query / by_head % p.b, kv = unit / by_query / by_head / p.b, first = query * p.unit_queries;
    return {p.order[i], kv, kv * group + head, least(p.unit_heads, group - head), first,
            least(p.unit_queries, p.t - first)};
  }

  template <class S>
  static void pack_keys(const Heads& keys, int64_t i, int64_t kv, int64_t first, int64_t n, int64_t e, C* out) {
    pack_columns<T>(row_of<S>(keys, i, kv, first), keys.stride[2], keys.stride[3], n, e, out, padded<C>(n));
  }

  template <class S>
  static void pack_values(const Heads& values, int64_t i, int64_t kv, int64_t first, int64_t n, int64_t e, C* out) {
    pack_rows<T>(row_of<S>(values, i, kv, first), values.stride[2], values.stride[3], n, e, out, padded<C>(e));
  }

  static Tile own_tile(const Problem& p, const Thread& t, const Unit& u, int64_t first, int64_t n) {
    Tile out{in_place<C>(p, p.k) ? nullptr : t.keys, t.values, padded<C>(p.e)};
    if (out.keys) pack_keys<T>(p.k, u.i, u.kv, first, n, p.e, t.keys);
    if constexpr (sizeof(T) == sizeof(C))
      if (in_place<C>(p, p.v)) return {out.keys, row_of<T>(p.v, u.i, u.kv, first), p.v.stride[2]};
    pack_values<T>(p.v, u.i, u.kv, first, n, p.e, t.values);
    return out;
  }

  // Lets the largest score of a row grow to the largest of `high`: what there is becomes smaller.
  static FA_INLINE void raise(const Sums& s, int64_t row, Vec<C> high) {
    C& top = s.top[row];
    const C before = top;
    top = largest<C>(maximum<C>(high, broadcast<C>(top)));
    if (before == -infinity<C>) return;
    const Vec<C> shrink = power_of_2(broadcast<C>(before - top));
    store(s.total + row * L, load<C>(s.total + row * L) * shrink);
    for (int64_t c = 0; c < s.ld; c += L) store(s.y + row * s.ld + c, load<C>(s.y + row * s.ld + c) * shrink);
  }

  // Weights of a row of n scores in place of them; the last lanes may be of no key.
  template <int NV>
  static FA_INLINE void weigh(const Thread& t, int64_t row, C* scores) {
    Vec<C> s[NV], high = load<C>(scores);
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) {
      s[v] = load<C>(scores + v * L);
      high = maximum<C>(s[v], high);
    }
    if (any(high > t.top[row] + slack)) raise(t, row, high);
    const C shift = t.top[row] == -infinity<C> ? 0 : t.top[row];
    Vec<C> total = load<C>(t.total + row * L);
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) {
      const Vec<C> weight = power_of_2(s[v] - shift);
      store(scores + v * L, weight);
      total += weight;
    }
    store(t.total + row * L, total);
  }

  // Rows [begin, end) of a unit through keys [first, first + n) of a tile: of the prefix, or own ones. Each head of `queries`.
  static void attend(const Problem& p, const Thread& t, const Unit& u, const Tile& tile, bool own, int64_t first, int64_t n,
                     int64_t begin, int64_t end) {
    const int64_t ld = padded<C>(p.e), width = padded<C>(n);
    const bool cut = own && own_end(p, u.i, u.first) < first + n;  // by causality or the length
    for (int64_t g = begin, rows; g < end; g += rows) {
      rows = least(group_rows, end - g);
      int64_t seen = n;
      bool ragged = n % L;
      if (cut) rows = least(rows, u.queries - g % u.queries);  // of one head, whose next queries see no less
      if (cut && own_end(p, u.i, u.first + g % u.queries) < first + n) {
        rows = least(diagonal_rows, rows);
        seen = least(n, own_end(p, u.i, u.first + g % u.queries + rows - 1) - first);
        ragged = true;
        if (seen <= 0) continue;
      }
      if (tile.keys)
        product(rows, p.e, seen, t.q + g * ld, ld, tile.keys, width, false, t.scores, tile_keys);
      else
        scores_in_place<T>(p, u.i, u.kv, first, seen, rows, t.q + g * ld, ld, t.scores);
      for (int64_t r = 0; r < rows; ++r) {
        C* scores = t.scores + r * tile_keys;
        const int64_t row = g + r, query = u.first + row % u.queries, head = u.head + row / u.queries;
        if (own && p.mask_kind != Mask::none) add_mask<T>(p, u.i, head, query, first, seen, scores);
        if (ragged) {
          const int64_t stop = own ? most(0, least(seen, own_end(p, u.i, query) - first)) : seen;
          hide(stop, seen, scores);
        }
        for_vectors<tile_keys / L>(ceil_div(seen, L), [&](auto nv) FA_FORCED {
          weigh<decltype(nv)::value>(t, row, scores);
        });
        if (p.dropped) {
          dropout_factors(dropout_of(p), dropout_row(p, u.i, head, query), (own ? own_column(p) : 0) + first, seen, t.factors);
          for (int64_t j = 0; j < seen; j += L) store(scores + j, load<C>(scores + j) * load<C>(t.factors + j));
        }
      }
      product(rows, seen, p.e, t.scores, tile_keys, tile.values, tile.ld, true, t.y + g * ld, ld);
    }
  }

  static void restart(const Sums& s, int64_t rows) {
    memset(s.y, 0, rows * s.ld * sizeof(C));
    memset(s.total, 0, rows * L * sizeof(C));
    for (int64_t r = 0; r < rows; ++r) s.top[r] = -infinity<C>;
  }

  // What a row's sums are to be multiplied with; keeps the logarithm of their weights, in part 0 or 1 of lse.
  static C finish(const Problem& p, const Sums& s, int64_t row, int64_t part, int64_t at) {
    const C total = sum<C>(load<C>(s.total + row * L));
    if (p.lse) {  // rounded once: backward takes weights from it
      const double log = (s.top[row] + __builtin_log2(total)) * ln_2;
      static_cast<C*>(p.lse)[part * p.b * p.h * p.t + at] = static_cast<C>(log);
    }
    return total == 0 ? 0 : 1 / total;
  }

  // f(row, head, query, their index in (b, h, t)).
  template <class F>
  static FA_INLINE void each_row(const Problem& p, const Unit& u, int64_t rows, const F& f) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t head = u.head + r / u.queries, query = u.first + r % u.queries;
      f(r, head, query, (u.i * p.h + head) * p.t + query);
    }
  }

  // The sums are those of a prefix with a softmax of its own.
  static void end_prefix(const Problem& p, const Sums& s, const Unit& u, int64_t rows) {
    each_row(p, u, rows, [&](int64_t r, int64_t head, int64_t, int64_t at) {
      const C factor = finish(p, s, r, 1, at) * static_cast<C>(p.gate[head]);
      for (int64_t c = 0; c < s.ld; c += L) store(s.base + r * s.ld + c, load<C>(s.y + r * s.ld + c) * factor);
    });
    restart(s, rows);
  }

  static void end(const Problem& p, const Sums& s, const Unit& u, int64_t rows) {
    each_row(p, u, rows, [&](int64_t r, int64_t head, int64_t query, int64_t at) {
      const C factor = finish(p, s, r, 0, at);
      T* out = row_by_token<T>(p.y, p.t, p.h, p.e, u.i, head, query);
      for (int64_t c = 0; c < p.e; c += L) {
        const Vec<C> y = load<C>(s.y + r * s.ld + c) * factor;
        store_at<C>(out + c, 0, p.e - c, p.gate ? y + load<C>(s.base + r * s.ld + c) : y);
      }
    });
  }

  static void through_prefix(const Problem& p, const Thread& t, const Unit& u) {
    const int64_t kept = prefix_tiles(p), index = p.prefix_of[u.i];
    const int64_t rows = u.heads * u.queries, ld = padded<C>(p.e);
    if (index < 0) return;
    const bool here = kept && t.packed[0] == u.kv && t.packed[1] == index;
    for (int64_t first = 0; first < p.p; first += tile_keys) {
      const int64_t n = least(tile_keys, p.p - first);
      C* const keys = kept ? t.prefix_keys + first * p.e : t.keys;
      C* const values = kept ? t.prefix_values + first * ld : t.values;
      if (!here) {
        pack_keys<W>(p.prefix_k, index, u.kv, first, n, p.e, keys);
        pack_values<W>(p.prefix_v, index, u.kv, first, n, p.e, values);
      }
      attend(p, t, u, {keys, values, ld}, false, first, n, 0, rows);
    }
    t.packed[0] = u.kv, t.packed[1] = index;
  }

  static void through_own(const Problem& p, const Thread& t, const Unit& u) {
    const int64_t rows = u.heads * u.queries, end = own_end(p, u.i, u.first + u.queries - 1);
    for (int64_t first = 0; first < end; first += tile_keys) {
      const int64_t n = least(tile_keys, end - first), skipped = most(0, first_query(p, first) - u.first);
      const Tile tile = own_tile(p, t, u, first, n);
      if (skipped == 0) {
        attend(p, t, u, tile, true, first, n, 0, rows);
        continue;
      }
      for (int64_t head = 0; head < rows; head += u.queries)
        attend(p, t, u, tile, true, first, n, head + skipped, head + u.queries);
    }
  }

  static void forward(const Problem& p, void* memory, int64_t unit) {
    Arena arena(memory);
    const Thread t = thread(p, arena);
    const Unit u = unit_of(p, unit);
    const int64_t rows = u.heads * u.queries;
    const C scale = static_cast<C>(p.scale * log2_e);
    for (int64_t r = 0; r < rows; ++r) {
      const T* from = row_of<T>(p.q, u.i, u.head + r / u.queries, u.first + r % u.queries);
      for (int64_t c = 0; c < p.e; c += L)
        store(t.q + r * t.ld + c, load_at<C>(from, c, p.e - c, p.q.stride[3]) * scale);
    }
    restart(t, rows);
    through_prefix(p, t, u);
    if (p.gate) end_prefix(p, t, u, rows);
    through_own(p, t, u);
    end(p, t, u, rows);
  }

  static Kernel kernel() { return {thread_bytes, begin, forward}; }
};

}  // namespace fastadapt::FA_TARGET::prefix_attention
