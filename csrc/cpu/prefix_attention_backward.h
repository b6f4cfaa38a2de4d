// Backward of prefix_attention, a call: its units, what each of them sums up, and the ends of these sums in a fixed order.
//
// A unit is a key head of some sequences that share a prefix, or some of its keys where there are few heads. What a prefix
// gets from the sequences of a unit is a partial sum, what queries get from part of the keys another. How a call is cut
// depends on its shape alone, and so do the bits.
#pragma once
#include "prefix_attention_backward_tiles.h"

namespace fastadapt::FA_TARGET::prefix_attention {

// Units of a call if its sequences are many; and, if they are few, units that keys are cut for.
constexpr int64_t most_units = 32, least_units = 8;

template <int N>
using Doubles __attribute__((vector_size(8 * N))) = double;

template <class Base>
struct BackwardOf : Base {
  using typename Base::C, typename Base::T, typename Base::W;
  using typename Base::Thread, typename Base::Tile, typename Base::Queries, typename Base::Softmax;
  using Base::group, Base::width, Base::L, Base::tile_keys, Base::tile_queries;

  enum Phase { cutting, tiles, sums };

  // Which gradients ask for which products.
  struct Wants {
    bool own_slopes, own, prefix_slopes, prefix, deltas;
    FA_INLINE explicit Wants(const Problem& p) {
      own_slopes = p.wants[grad_q] || p.wants[grad_k];
      own = own_slopes || p.wants[grad_v];
      prefix_slopes = p.wants[grad_q] || p.wants[grad_prefix_k];
      prefix = prefix_slopes || p.wants[grad_prefix_v];
      deltas = p.gate && (own_slopes || prefix_slopes || p.wants[grad_gate]);
    }
    FA_INLINE bool any_slopes() const { return own_slopes || prefix_slopes || deltas; }
  };

  // --- how a call is cut -----------------------------------------------------------------------------------------------

  // Sequences in `order`, in chunks of one prefix.
  static FA_INLINE int64_t chunk_end(const Problem& p, int64_t begin) {
    const int64_t most_of_chunk = most(1, p.b * p.h_kv / most_units);
    int64_t end = begin + 1;
    while (end < p.b && end < begin + most_of_chunk && p.prefix_of[p.order[end]] == p.prefix_of[p.order[begin]]) ++end;
    return end;
  }

  static FA_INLINE int64_t chunks(const Problem& p) {
    int64_t count = 0;
    for (int64_t begin = 0; begin < p.b; begin = chunk_end(p, begin)) ++count;
    return count;
  }

  static FA_INLINE int64_t prefix_tiles(const Problem& p) { return ceil_div(p.p, tile_keys); }
  static FA_INLINE int64_t all_tiles(const Problem& p) { return prefix_tiles(p) + ceil_div(p.t_k, tile_keys); }

  // Cuts of the keys.
  static FA_INLINE int64_t cuts(const Problem& p) {
    return most(1, least(ceil_div(least_units, most(1, p.b * p.h_kv)), all_tiles(p)));
  }

  // Memory for all threads.
  struct Shared {
    int64_t* first;  // of each chunk, and the end
    C* prefix;       // (chunks, h_kv, 2, p, width): gradients of keys and values
    C* q;            // (b, h_kv, cuts, group, t, width)
    C* gate;         // (b, h)
  };

  static FA_INLINE Shared shared(const Problem& p, Arena& arena) {
    const int64_t count = chunks(p);
    Shared s = {};
    s.first = arena.take<int64_t>(count + 1);
    if (p.wants[grad_prefix_k] || p.wants[grad_prefix_v]) s.prefix = arena.take<C>(count * p.h_kv * 2 * p.p * width(p));
    if (p.wants[grad_q] && cuts(p) > 1) s.q = arena.take<C>(p.b * p.h * p.t * cuts(p) * width(p));
    if (p.wants[grad_gate]) s.gate = arena.take<C>(p.b * p.h);
    return s;
  }

  static FA_INLINE C* prefix_sums(const Problem& p, const Shared& s, int64_t chunk, int64_t head, int64_t which) {
    return s.prefix + ((chunk * p.h_kv + head) * 2 + which) * p.p * width(p);
  }

  static FA_INLINE C* query_sums(const Problem& p, const Shared& s, int64_t i, int64_t head, int64_t cut) {
    return s.q + ((i * p.h_kv + head) * cuts(p) + cut) * group(p) * p.t * width(p);
  }

  // grad_q can be summed up where it is returned.
  static FA_INLINE bool in_place(const Problem& p) { return sizeof(T) == sizeof(C) && p.e % L == 0 && cuts(p) == 1; }

  // A thread's memory besides that of tiles: the gradients of the queries of a group.
  static FA_INLINE C* own_sums(const Problem& p, Arena& arena) {
    return p.wants[grad_q] && cuts(p) == 1 && !in_place(p) ? arena.take<C>(group(p) * p.t * width(p)) : nullptr;
  }

  static int64_t shared_bytes(const Problem& p) {
    Arena arena(nullptr);
    shared(p, arena);
    return arena.used();
  }

  static int64_t thread_bytes(const Problem& p) {
    Arena arena(nullptr);
    Base::thread(p, arena);
    own_sums(p, arena);
    return arena.used();
  }

  // --- a sequence ------------------------------------------------------------------------------------------------------

  // In float64: that the gradients of a query's scores cancel leaves little else. A y of 16 bits was rounded by more.
  static FA_INLINE C dot(const T* a, int64_t a_step, const T* b, int64_t b_step, int64_t n) {
    if constexpr (sizeof(T) == 2) {
      Vec<C> total = {};
      for (int64_t c = 0; c < n; c += L)
        total += load_at<C>(a + c * a_step, 0, n - c, a_step) * load_at<C>(b + c * b_step, 0, n - c, b_step);
      return sum<C>(total);
    }
    double sums[L];
    Doubles<L> total = {};
    for (int64_t c = 0; c < n; c += L)
      total += __builtin_convertvector(load_at<C>(a + c * a_step, 0, n - c, a_step), Doubles<L>) *
               __builtin_convertvector(load_at<C>(b + c * b_step, 0, n - c, b_step), Doubles<L>);
    memcpy(sums, &total, sizeof total);
    for (int i = 1; i < L; ++i) sums[0] += sums[i];
    return static_cast<C>(sums[0]);
  }

  // The rows of `softmax`: what forward saved, and the sums of grad_y * y.
  static void read_softmax(const Problem& p, int64_t i, int64_t head, const Wants& wants, const Thread& w) {
    const C* const saved = static_cast<const C*>(p.saved_lse);
    auto read = [&](const C* from, const Softmax& to, int64_t row) FA_FORCED {
      for (int64_t l = 0; l < p.t; ++l) {
        const double lse = from[l] * log2_e;
        const C rounded = static_cast<C>(from[l] == -infinity<C> ? -lse : lse);  // a query that sees nothing: weights of 0
        to.lse[row + l] = rounded;
        to.rest[row + l] = rounded - rounded == 0 ? static_cast<C>(lse - rounded) : 0;
      }
    };
    for (int64_t g = 0; g < group(p); ++g) {
      const int64_t j = head * group(p) + g, at = (i * p.h + j) * p.t;
      read(saved + at, w.own, g * p.t);
      if (p.gate) read(saved + p.b * p.h * p.t + at, w.prefix, g * p.t);
      for (int64_t l = 0; l < p.t && wants.any_slopes(); ++l) {
        const T *y = row_of<T>(p.saved_y, i, j, l), *grad_y = row_of<T>(p.grad_y, i, j, l);
        w.own.delta[g * p.t + l] = dot(y, p.saved_y.stride[3], grad_y, p.grad_y.stride[3], p.e);
      }
    }
  }

  // f(queries, their first row in the group) for tiles of the queries that may see a tile of keys.
  template <class F>
  static FA_INLINE void each_queries(const Problem& p, const Tile& tile, const Thread& w, const F& f) {
    for (int64_t g = 0; g < group(p); ++g)
      for (int64_t l = tile.own ? first_query(p, tile.first) : 0; l < p.t; l += tile_queries)
        f(Base::queries(p, tile, w, tile.head * group(p) + g, l), g * p.t + l);
  }

  // With a softmax of the prefix's own, what belongs to it of the sums of grad_y * y, and without the gate the gradient of it.
  static void split_deltas(const Problem& p, int64_t i, int64_t head, const Thread& w, C* grad_gate) {
    memset(w.prefix.delta, 0, group(p) * p.t * sizeof(C));
    for (int64_t first = 0; first < p.p && p.prefix_of[i] >= 0; first += tile_keys) {
      const Tile tile{i, head, first, least(tile_keys, p.p - first), false, true};
      Base::pack(p, tile, w);
      each_queries(p, tile, w, [&](const Queries& s, int64_t row) { Base::add_deltas(p, tile, w, s, w.prefix.delta + row); });
    }
    for (int64_t g = 0; g < group(p); ++g) {
      const C *delta = w.prefix.delta + g * p.t, gate = p.gate[head * group(p) + g];
      C total = 0;
      for (int64_t begin = 0; begin < p.t; begin += tile_queries) {
        C block = 0;
        for (int64_t l = begin; l < least(p.t, begin + tile_queries); ++l) block += delta[l];
        total += block;
      }
      if (grad_gate) grad_gate[g] = total;
      for (int64_t l = 0; l < p.t; ++l) w.own.delta[g * p.t + l] -= gate * delta[l];
    }
  }

  // Rows of the gradients of a tile's keys or values: those of own keys are done.
  static void put_own(const Problem& p, const Tile& tile, const C* sums, void* out) {
    for (int64_t l = 0; l < least(tile_keys, p.t_k - tile.first); ++l) {
      T* to = row_by_token<T>(out, p.t_k, p.h_kv, p.e, tile.i, tile.head, tile.first + l);
      for (int64_t c = 0; c < p.e; c += L) store_at<C>(to, c, p.e - c, load<C>(sums + l * width(p) + c));
    }
  }

  static void put_prefix(const Problem& p, const Tile& tile, const C* sums, bool accumulate, C* out) {
    for (int64_t c = 0; c < tile.n * width(p); c += L) put(out + tile.first * width(p) + c, load<C>(sums + c), accumulate);
  }

  // Cut `cut` of the keys of sequence i, the first of its chunk or not.
  static void sequence(const Problem& p, int64_t i, int64_t head, int64_t cut, int64_t chunk, bool first_of_chunk,
                       const Shared& shared, const Thread& w, C* own_sums) {
    const Wants wants(p);
    read_softmax(p, i, head, wants, w);
    if (wants.deltas)
      split_deltas(p, i, head, w, shared.gate && cut == 0 ? shared.gate + i * p.h + head * group(p) : nullptr);
    C* const sums = shared.q ? query_sums(p, shared, i, head, cut) : own_sums;
    const int64_t ld = in_place(p) ? p.h * p.e : width(p), queries = group(p) * p.t;
    auto grad_of = [&](int64_t row) FA_FORCED -> C* {
      if (!p.wants[grad_q]) return nullptr;
      if (!in_place(p)) return sums + row * ld;
      return row_by_token<C>(p.grads[grad_q], p.t, p.h, p.e, i, head * group(p) + row / p.t, row % p.t);
    };
    for (int64_t row = 0; row < queries && p.wants[grad_q]; ++row) memset(grad_of(row), 0, least(ld, width(p)) * sizeof(C));
    const int64_t of_prefix = prefix_tiles(p), all = all_tiles(p);
    for (int64_t number = all * cut / cuts(p); number < all * (cut + 1) / cuts(p); ++number) {
      const bool own = number >= of_prefix;
      const int64_t first = (own ? number - of_prefix : number) * tile_keys, end = own ? p.key_lengths[i] : p.p;
      const bool slopes = own ? wants.own_slopes : wants.prefix_slopes;
      const Tile tile{i, head, first, most(0, least(tile_keys, end - first)), own, slopes};
      if (!(own ? wants.own : wants.prefix && p.prefix_of[i] >= 0)) continue;
      const int64_t rows = least(tile_keys, round_up(own ? p.t_k - first : tile.n, Base::strip));
      for (C* grad : {w.grad_k, w.grad_v}) memset(grad, 0, rows * width(p) * sizeof(C));
      if (tile.n) {
        Base::pack(p, tile, w);
        each_queries(p, tile, w, [&](const Queries& s, int64_t row) { Base::visit(p, tile, w, s, grad_of(row), ld); });
      }
      if (own && p.wants[grad_k]) put_own(p, tile, w.grad_k, p.grads[grad_k]);
      if (own && p.wants[grad_v]) put_own(p, tile, w.grad_v, p.grads[grad_v]);
      if (own || !shared.prefix) continue;
      put_prefix(p, tile, w.grad_k, !first_of_chunk, prefix_sums(p, shared, chunk, head, 0));
      put_prefix(p, tile, w.grad_v, !first_of_chunk, prefix_sums(p, shared, chunk, head, 1));
    }
    for (int64_t row = 0; row < queries && own_sums; ++row) put_query(p, i, head, row, own_sums + row * ld);
  }

  static FA_INLINE void put_query(const Problem& p, int64_t i, int64_t head, int64_t row, const C* sums) {
    T* to = row_by_token<T>(p.grads[grad_q], p.t, p.h, p.e, i, head * group(p) + row / p.t, row % p.t);
    for (int64_t c = 0; c < p.e; c += L) store_at<C>(to, c, p.e - c, load<C>(sums + c));
  }

  // --- sums of partial sums --------------------------------------------------------------------------------------------

  // Rows of sums that a unit adds up.
  static constexpr int64_t rows_of_unit = 64;

  static FA_INLINE int64_t prefix_units(const Problem& p) {
    const bool wanted = p.wants[grad_prefix_k] || p.wants[grad_prefix_v];
    return wanted ? p.prefixes * p.h_kv * ceil_div(p.p, rows_of_unit) : 0;
  }
  static FA_INLINE int64_t query_blocks(const Problem& p) { return ceil_div(group(p) * p.t, rows_of_unit); }
  static FA_INLINE int64_t query_units(const Problem& p) {
    return p.wants[grad_q] && cuts(p) > 1 ? p.b * p.h_kv * query_blocks(p) : 0;
  }

  static void sum_prefix(const Problem& p, const Shared& s, int64_t unit) {
    const int64_t blocks = ceil_div(p.p, rows_of_unit), head = unit / blocks % p.h_kv, prefix = unit / blocks / p.h_kv;
    const int64_t begin = unit % blocks * rows_of_unit, end = least(p.p, begin + rows_of_unit), count = chunks(p);
    auto of_chunk = [&](int64_t chunk) FA_FORCED { return p.prefix_of[p.order[s.first[chunk]]]; };
    int64_t first = 0, last = count;  // the chunks are sorted by their prefix
    while (first < last) {
      const int64_t middle = (first + last) / 2;
      of_chunk(middle) < prefix ? first = middle + 1 : last = middle;
    }
    while (last < count && of_chunk(last) == prefix) ++last;
    for (int which = 0; which < 2; ++which) {
      const int gradient = which ? grad_prefix_v : grad_prefix_k;
      if (!p.wants[gradient]) continue;
      for (int64_t l = begin; l < end; ++l)
        for (int64_t c = 0; c < p.e; c += L) {
          Vec<C> total = {};
          for (int64_t chunk = first; chunk < last; ++chunk)
            total += load<C>(prefix_sums(p, s, chunk, head, which) + l * width(p) + c);
          W* to = static_cast<W*>(p.grads[gradient]) + ((prefix * p.h_kv + head) * p.p + l) * p.e;
          store_at<C>(to, c, p.e - c, total);
        }
    }
  }

  static void sum_queries(const Problem& p, const Shared& s, int64_t unit) {
    const int64_t blocks = query_blocks(p), head = unit / blocks % p.h_kv, i = unit / blocks / p.h_kv;
    const int64_t begin = unit % blocks * rows_of_unit;
    for (int64_t row = begin; row < least(group(p) * p.t, begin + rows_of_unit); ++row) {
      C* const sums = query_sums(p, s, i, head, 0) + row * width(p);
      for (int64_t cut = 1; cut < cuts(p); ++cut) {
        const C* more = query_sums(p, s, i, head, cut) + row * width(p);
        for (int64_t c = 0; c < p.e; c += L) put(sums + c, load<C>(more + c), true);
      }
      put_query(p, i, head, row, sums);
    }
  }

  static void sum_gate(const Problem& p, const Shared& s) {
    for (int64_t j = 0; j < p.h; ++j) {
      C total = 0;
      for (int64_t begin = 0; begin < p.b; begin += rows_of_unit) {
        C block = 0;
        for (int64_t i = begin; i < least(p.b, begin + rows_of_unit); ++i) block += s.gate[i * p.h + j];
        total += block;
      }
      if (!p.wide_gate)
        store_some<C>(static_cast<T*>(p.grads[grad_gate]) + j, broadcast<C>(total), 1);
      else if constexpr (sizeof(C) == sizeof(float))
        static_cast<float*>(p.grads[grad_gate])[j] = total;
    }
  }

  // --- units -----------------------------------------------------------------------------------------------------------

  static int64_t units(const Problem& p, int phase) {
    if (phase == cutting) return 1;
    if (phase == tiles) return chunks(p) * p.h_kv * cuts(p);
    return prefix_units(p) + query_units(p) + p.wants[grad_gate];
  }

  static void run(const Problem& p, int phase, void* shared_memory, void* memory, int64_t unit) {
    Arena shared_arena(shared_memory), arena(memory);
    const Shared s = shared(p, shared_arena);
    if (phase == cutting) {
      int64_t count = 0;
      for (int64_t begin = 0; begin < p.b; begin = chunk_end(p, begin)) s.first[count++] = begin;
      s.first[count] = p.b;
      return;
    }
    if (phase == tiles) {
      const Thread w = Base::thread(p, arena);
      C* const sums = own_sums(p, arena);
      const typename Base::Scope scope(w);
      const int64_t cut = unit % cuts(p), head = unit / cuts(p) % p.h_kv, chunk = unit / cuts(p) / p.h_kv;
      for (int64_t at = s.first[chunk]; at < s.first[chunk + 1]; ++at)
        sequence(p, p.order[at], head, cut, chunk, at == s.first[chunk], s, w, sums);
      return;
    }
    const int64_t prefix = prefix_units(p), query = query_units(p);
    if (unit < prefix) return sum_prefix(p, s, unit);
    if (unit < prefix + query) return sum_queries(p, s, unit - prefix);
    sum_gate(p, s);
  }

  static BackwardKernel kernel() { return {shared_bytes, thread_bytes, units, run}; }
};

template <class T, class W>
struct Backward : BackwardOf<Tiles<T, W>> {};

}  // namespace fastadapt::FA_TARGET::prefix_attention
