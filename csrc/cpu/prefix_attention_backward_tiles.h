// Backward of prefix_attention, a tile of keys with the queries that see it: scores and gradients of weights once, and from
// them by three more products the gradients of keys, values and queries.
#pragma once
#include "prefix_attention_tiles.h"

namespace fastadapt::FA_TARGET::prefix_attention {

template <class Q, class W_>
struct Tiles {
  using T = Q;
  using W = W_;
  using C = Compute<T>;
  static constexpr int L = lanes<C>;

  // Keys and queries of a tile, and the rows or columns by which one that causality cuts is worked on.
  static constexpr int64_t tile_keys = prefix_attention::tile_keys, tile_queries = 64, strip = 16;

  // Of own keys or of the prefix, by the queries of a group of heads: the logarithm by base 2 of the sum of exponentials, its
  // part below rounding, which would move all weights of a query, and the sum of weight * gradient of the weight.
  struct Softmax {
    C *lse, *rest, *delta;
  };

  // A thread's memory. The gradients of a tile's keys stay there, and so in the cache, while the queries pass.
  struct Thread {
    C *keys, *keys_t, *values_t;   // (keys, e), (e, keys) twice
    C *grad_k, *grad_v;            // (keys, e)
    C *scaled_q, *q, *grad_y;      // (queries, e)
    C *weights, *grad_scores;      // (queries, keys)
    C* factors;                    // of dropout, of a row
    Softmax own, prefix;
  };

  struct Scope {  // what a thread needs while it works on tiles
    FA_INLINE explicit Scope(const Thread&) {}
  };

  static FA_INLINE int64_t width(const Problem& p) { return padded<C>(p.e); }
  static FA_INLINE int64_t group(const Problem& p) { return p.h_kv ? p.h / p.h_kv : 0; }

  static FA_INLINE Thread thread(const Problem& p, Arena& arena) {
    Thread w;
    for (C** tile : {&w.keys, &w.keys_t, &w.values_t, &w.grad_k, &w.grad_v}) *tile = arena.take<C>(tile_keys * width(p));
    for (C** tile : {&w.scaled_q, &w.q, &w.grad_y}) *tile = arena.take<C>(tile_queries * width(p));
    for (C** tile : {&w.weights, &w.grad_scores}) *tile = arena.take<C>(tile_queries * tile_keys);
    w.factors = arena.take<C>(tile_keys);
    auto softmax = [&]() FA_FORCED {
      Softmax s;
      for (C** rows : {&s.lse, &s.rest, &s.delta}) *rows = arena.take<C>(group(p) * p.t);
      return s;
    };
    w.own = softmax();
    w.prefix = p.gate ? softmax() : w.own;
    return w;
  }

  // n keys from `first` on, of sequence i or of its prefix, for the queries that share their head.
  struct Tile {
    int64_t i, head, first, n;
    bool own, slopes;  // slopes: with the gradients of scores, not of values alone
  };

  static void pack(const Problem& p, const Tile& tile, const Thread& w) {
    auto pack = [&](auto like, const Heads& k, const Heads& v, int64_t i) FA_FORCED {
      using S = decltype(like);
      const S *keys = row_of<S>(k, i, tile.head, tile.first), *values = row_of<S>(v, i, tile.head, tile.first);
      pack_columns<T>(keys, k.stride[2], k.stride[3], tile.n, p.e, w.keys_t, tile_keys);
      if (!tile.slopes) return;
      pack_columns<T>(values, v.stride[2], v.stride[3], tile.n, p.e, w.values_t, tile_keys);
      pack_rows<T>(keys, k.stride[2], k.stride[3], tile.n, p.e, w.keys, width(p));
    };
    if (tile.own)
      pack(T{}, p.k, p.v, tile.i);
    else
      pack(W{}, p.prefix_k, p.prefix_v, p.prefix_of[tile.i]);
  }

  // Queries [l, l + m) of head j; query l + r sees the keys of the tile up to r + limit, as far as causality goes.
  struct Queries {
    int64_t j, l, m, limit;
    Operand<C> q, grad_y;
    Softmax softmax;
  };

  // Rows with whole vectors: in place where they lie so, else in scratch.
  static FA_INLINE Operand<C> rows(const Problem& p, const Heads& t, int64_t i, int64_t j, int64_t l, int64_t n, C* scratch) {
    const T* first = row_of<T>(t, i, j, l);
    if constexpr (sizeof(T) == sizeof(C))
      if (t.stride[3] == 1 && p.e % L == 0) return {first, t.stride[2]};
    pack_rows<T>(first, t.stride[2], t.stride[3], n, p.e, scratch, width(p));
    return {scratch, width(p)};
  }

  // Queries as forward multiplies them with keys: then scores have the bits of those that lse was made of.
  static void scale_rows(const Problem& p, int64_t i, int64_t j, int64_t l, int64_t n, C* out) {
    const C scale = static_cast<C>(p.scale * log2_e);
    const int64_t step = p.q.stride[3];
    for (int64_t r = 0; r < n; ++r, out += width(p)) {
      const T* from = row_of<T>(p.q, i, j, l + r);
      for (int64_t c = 0; c < p.e; c += L) store(out + c, load_at<C>(from + c * step, 0, p.e - c, step) * scale);
    }
  }

  static FA_INLINE Queries queries(const Problem& p, const Tile& tile, const Thread& w, int64_t j, int64_t l) {
    const Softmax& softmax = tile.own ? w.own : w.prefix;
    const int64_t m = least(tile_queries, p.t - l), row = (j - tile.head * group(p)) * p.t + l;
    const int64_t limit = tile.own && p.is_causal ? least(tile_keys, l + p.t_k - p.t - tile.first) : tile_keys;
    scale_rows(p, tile.i, j, l, m, w.scaled_q);
    return {j, l, m, limit, rows(p, p.q, tile.i, j, l, m, w.q), rows(p, p.grad_y, tile.i, j, l, m, w.grad_y),
            {softmax.lse + row, softmax.rest + row, softmax.delta + row}};
  }

  // Scores of queries [begin, end) with the first n keys, and the gradients of the weights.
  static FA_INLINE void scores(const Problem& p, const Tile& tile, const Thread& w, const Queries& s, int64_t begin,
                               int64_t end, int64_t n) {
    auto multiply = [&](const Operand<C>& a, const C* b, C* c) FA_FORCED {
      product(end - begin, p.e, n, a.data + begin * a.ld, a.ld, b, tile_keys, false, c + begin * tile_keys, tile_keys);
    };
    if (tile.own && in_place<C>(p, p.k))
      scores_in_place<T>(p, tile.i, tile.head, tile.first, n, end - begin, w.scaled_q + begin * width(p), width(p),
                         w.weights + begin * tile_keys);
    else
      multiply({w.scaled_q, width(p)}, w.keys_t, w.weights);
    if (tile.slopes) multiply(s.grad_y, w.values_t, w.grad_scores);
  }

  static FA_INLINE void draw(const Problem& p, const Tile& tile, const Thread& w, const Queries& s, int64_t r, int64_t n) {
    const int64_t column = (tile.own ? own_column(p) : 0) + tile.first;
    dropout_factors(dropout_of(p), dropout_row(p, tile.i, s.j, s.l + r), column, n, w.factors);
  }

  // Far from 0 a logarithm is rounded by more than 1, and only says that a weight is at most 1.
  static FA_INLINE Vec<C> weight_of(Vec<C> score, const Softmax& softmax, int64_t r) {
    const Vec<C> x = score - softmax.lse[r] - softmax.rest[r];
    return power_of_2(x > 0 ? Vec<C>{} : x);
  }

  // Row r: scores become weights as grad_v needs them, gradients of weights those of scores. LIMITED: causality hides keys;
  // MODIFIED: a mask does, or weights have factors.
  template <bool LIMITED, bool MODIFIED>
  static FA_INLINE void weigh(const Problem& p, const Tile& tile, const Thread& w, const Queries& s, int64_t r, int64_t n) {
    typename Simd<C>::I index;
    for (int c = 0; c < L; ++c) index[c] = c;
    C *weights = w.weights + r * tile_keys, *grads = w.grad_scores + r * tile_keys;
    const C lse = s.softmax.lse[r], delta = s.softmax.delta[r];
    const C gain = MODIFIED && p.gate && !tile.own ? p.gate[s.j] : 1, to_grad = static_cast<C>(p.scale) * gain;
    const C nothing = lse == lse ? 0 : lse;  // a hidden key has no part, whatever its score is, but of a sum that is NaN
    const bool dropped = MODIFIED && p.dropped;
    if (MODIFIED && tile.own && p.mask_kind != Mask::none) add_mask<T>(p, tile.i, s.j, s.l + r, tile.first, n, weights);
    if (dropped) draw(p, tile, w, s, r, n);
    for (int64_t c = 0; c < n; c += L, index += L) {
      const Vec<C> score = load<C>(weights + c);
      const auto seen = [&](Vec<C> v, C hidden) FA_FORCED {
        if (LIMITED) v = index <= static_cast<int>(s.limit + r) ? v : broadcast<C>(hidden);
        return MODIFIED ? score == -infinity<C> ? broadcast<C>(nothing) : v : v;
      };
      const Vec<C> weight = seen(weight_of(score, s.softmax, r), nothing);
      const Vec<C> factor = dropped ? load<C>(w.factors + c) : broadcast<C>(1);
      store(weights + c, MODIFIED ? weight * factor * gain : weight);
      if (!tile.slopes) continue;
      const Vec<C> grad = load<C>(grads + c);
      store(grads + c, seen(weight * ((MODIFIED ? grad * factor : grad) - delta), 0) * to_grad);
    }
  }

  static void weigh_rows(const Problem& p, const Tile& tile, const Thread& w, const Queries& s, int64_t begin, int64_t end,
                         int64_t n) {
    const bool modified = p.dropped || (tile.own ? p.mask_kind != Mask::none : p.gate != nullptr);
    const bool limited = s.limit + begin < n - 1;
    for (int64_t r = begin; r < end; ++r)
      if (modified)
        weigh<true, true>(p, tile, w, s, r, n);
      else if (limited)
        weigh<true, false>(p, tile, w, s, r, n);
      else
        weigh<false, false>(p, tile, w, s, r, n);
  }

  // Keys [c, c + n): what queries from `begin` on give their gradients.
  static FA_INLINE void add_to_keys(const Problem& p, const Tile& tile, const Thread& w, const Queries& s, int64_t begin,
                                    int64_t c, int64_t n) {
    auto add = [&](const C* a, const Operand<C>& b, C* out) FA_FORCED {
      gemm_transposed(n, s.m - begin, p.e, a + begin * tile_keys + c, tile_keys, b.data + begin * b.ld, b.ld, true,
                      out + c * width(p), width(p));
    };
    add(w.weights, s.grad_y, w.grad_v);
    if (tile.slopes) add(w.grad_scores, s.q, w.grad_k);
  }

  // What the first n keys give the gradients of queries [begin, end).
  static FA_INLINE void add_to_queries(const Problem& p, const Thread& w, int64_t begin, int64_t end, int64_t n, C* grad_q,
                                       int64_t ld) {
    product(end - begin, n, p.e, w.grad_scores + begin * tile_keys, tile_keys, w.keys, width(p), true, grad_q + begin * ld, ld);
  }

  // All that the queries and the tile give one another. A null `grad_q` isn't wanted.
  static void visit(const Problem& p, const Tile& tile, const Thread& w, const Queries& s, C* grad_q, int64_t ld) {
    if (s.limit >= tile.n - 1) {
      scores(p, tile, w, s, 0, s.m, tile.n);
      weigh_rows(p, tile, w, s, 0, s.m, tile.n);
      add_to_keys(p, tile, w, s, 0, 0, tile.n);
      if (grad_q) add_to_queries(p, w, 0, s.m, tile.n, grad_q, ld);
      return;
    }
    for (int64_t begin = 0; begin < s.m; begin += strip) {
      const int64_t end = least(s.m, begin + strip), n = least(tile.n, end + s.limit), all = least(tile.n, round_up(n, strip));
      scores(p, tile, w, s, begin, end, n);
      weigh_rows(p, tile, w, s, begin, end, n);
      for (int64_t r = begin; r < end; ++r)  // the strips of keys reach this far
        for (int64_t c = padded<C>(n); c < all; c += L) {
          store(w.weights + r * tile_keys + c, Vec<C>{});
          store(w.grad_scores + r * tile_keys + c, Vec<C>{});
        }
      if (grad_q) add_to_queries(p, w, begin, end, n, grad_q, ld);
    }
    for (int64_t c = 0; c < tile.n && c - s.limit < s.m; c += strip)
      add_to_keys(p, tile, w, s, most(0, c - s.limit), c, least(strip, tile.n - c));
  }

  // delta[r] += the sum of weight * its gradient, over a tile of a prefix with a softmax of its own.
  static void add_deltas(const Problem& p, const Tile& tile, const Thread& w, const Queries& s, C* delta) {
    scores(p, tile, w, s, 0, s.m, tile.n);
    for (int64_t r = 0; r < s.m; ++r) {
      C *weights = w.weights + r * tile_keys, *grads = w.grad_scores + r * tile_keys;
      if (p.dropped) draw(p, tile, w, s, r, tile.n);
      Vec<C> total = {};
      for (int64_t c = 0; c < tile.n; c += L) {
        const Vec<C> weight = weight_of(load<C>(weights + c), s.softmax, r);
        Vec<C> product = weight * load<C>(grads + c);
        if (p.dropped) product *= load<C>(w.factors + c);
        for (int64_t k = tile.n - c; k < L; ++k) product[k] = 0;
        total += product;
      }
      delta[r] += sum<C>(total);
    }
  }
};

}  // namespace fastadapt::FA_TARGET::prefix_attention
