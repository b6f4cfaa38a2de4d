// Forward and backward of the compacter adapter over the rows of one segment, a block at a time. Between the projection of a
// row and its expansion lie the n * n * q numbers z[(a, i, k)] on the way down and h[(b, i, k)] on the way up; rule and small
// factor of a side are folded into one matrix from these to the r hidden numbers.
#pragma once
#include "activation.h"
#include "compacter_args.h"
#include "kron_products.h"

namespace fastadapt::FA_TARGET::compacter {

using namespace fastadapt::compacter;
using namespace fastadapt::FA_TARGET::kron;

// A side's rule a[term][outer][inner] and small factor f[term][rank][hidden in chunk], and both folded: in row (outer, term,
// rank) and column (inner, j), a[term][outer][inner] * f[term][rank][j]. Outer is the index of a chunk of x or y.
template <class C>
struct Side {
  C *rule, *factor, *folded;
};

template <class C>
struct Weights {
  Matrix<C> s, t;
  C *s_memory, *t_memory, *down_bias, *up_bias;
  Side<C> down, up;  // `up` carries the scale in `folded`
};

// Sums of the rows of a segment; null where none of the gradients that need them is wanted.
template <class C>
struct Partial {
  C *s, *t, *down, *up, *down_bias, *up_bias;
};

template <class C>
struct Pass {
  static FA_INLINE int64_t ranks(const Problem& p) { return p.n * p.q; }
  static FA_INLINE int64_t middle(const Problem& p) { return p.n * p.n * p.q; }
  static FA_INLINE int64_t folded_stride(const Problem& p) { return padded<C>(p.r); }
  static FA_INLINE Shape shape(const Problem& p) { return {p.n, p.d / p.n}; }

  static FA_INLINE Weights<C> weights(const Problem& p, Arena& arena) {
    Weights<C> w = {};
    const int64_t width = p.d / p.n;
    w.s_memory = arena.take<C>(matrix_size<C>(ranks(p), width));
    w.t_memory = arena.take<C>(matrix_size<C>(ranks(p), width));
    w.down_bias = p.down_bias.data ? arena.take<C>(p.r) : nullptr;
    w.up_bias = p.up_bias.data ? arena.take<C>(p.n * padded<C>(width)) : nullptr;
    for (Side<C>* side : {&w.down, &w.up}) {
      side->rule = arena.take<C>(p.n * p.n * p.n);
      side->factor = arena.take<C>(p.r * p.q);
      side->folded = arena.take<C>(middle(p) * folded_stride(p));
    }
    w.s = {w.s_memory, 0};
    w.t = {w.t_memory, 0};
    return w;
  }

  // With TRANSPOSED, the last two indices of both factors are swapped in memory.
  static void read_side(const Problem& p, Factor a, Factor f, bool transposed, int64_t adapter, C factor,
                        const Side<C>& side) {
    const int64_t n = p.n, q = p.q, chunk = p.r / n, ld = folded_stride(p);
    if (transposed) {
      std::swap(a.stride_1, a.stride_2);
      std::swap(f.stride_1, f.stride_2);
    }
    read_factor(p, a, adapter, n, n, n, side.rule);
    read_factor(p, f, adapter, n, q, chunk, side.factor);
    C* row = side.folded;
    for (int64_t outer = 0; outer < n; ++outer)
      for (int64_t ik = 0; ik < n * q; ++ik, row += ld)
        for (int64_t inner = 0; inner < n; ++inner) {
          const C rule = factor * side.rule[(ik / q * n + outer) * n + inner];
          for (int64_t j = 0; j < chunk; ++j) row[inner * chunk + j] = rule * side.factor[ik * chunk + j];
        }
  }

  static C scale(const Problem& p) {
    if (!p.scale.data) return p.scale_value;
    C value;
    read_parameter<C>(p, p.scale, 0, {1, 1}, 1, &value, 1);
    return value;
  }

  static void read_sides(const Problem& p, int64_t adapter, Weights<C>& w) {
    read_side(p, p.down_a, p.down_t, false, adapter, 1, w.down);
    read_side(p, p.up_a, p.up_s, true, adapter, scale(p), w.up);
  }

  // What is copied stays in a thread's memory for its next segment, if that is of the same adapter.
  static void read_weights(const Problem& p, const Segment& segment, Weights<C>& w) {
    const int64_t width = p.d / p.n, adapter = segment.adapter;
    w.s = read_matrix(p, p.down_s, p.down_s.stride_2, p.down_s.stride_1, adapter, p.n, p.q, width, w.s_memory);
    w.t = read_matrix(p, p.up_t, p.up_t.stride_1, p.up_t.stride_2, adapter, p.n, p.q, width, w.t_memory);
    if (segment.packed) return;
    if (w.down_bias) read_parameter<C>(p, p.down_bias, adapter, {1, p.r}, 1, w.down_bias, p.r);
    if (w.up_bias) read_parameter(p, p.up_bias, adapter, shape(p), scale(p), w.up_bias, padded<C>(width));
    read_sides(p, adapter, w);
  }

  // A thread's memory for a block. The output in scratch takes the place of what it is made from.
  struct Scratch {
    C *x, *other, *z, *hidden, *slope, *h, *grad_h, *grad_hidden, *transposed;
  };

  static FA_INLINE Scratch scratch(const Problem& p, Arena& arena) {
    Scratch s = {};
    const int64_t ends = (middle(p) + rank_tile) * block_rows, hidden = p.r * block_rows;
    s.x = arena.take<C>(block_size<C>(p, p.x, shape(p)));
    if (p.residual.data || p.backward) s.other = arena.take<C>(block_size<C>(p, p.backward ? p.grad_y : p.residual, shape(p)));
    s.z = arena.take<C>(ends);
    s.h = arena.take<C>(ends);
    s.hidden = arena.take<C>(hidden);
    if (!p.backward) return s;
    s.grad_h = arena.take<C>(ends);
    s.slope = arena.take<C>(hidden);
    s.grad_hidden = arena.take<C>(hidden);
    s.transposed = arena.take<C>(padded<C>(p.r) * block_rows);
    return s;
  }

  // f(first row, rows of the block).
  template <class F>
  static FA_INLINE void for_blocks(const Segment& segment, const F& f) {
    for (int64_t begin = segment.begin; begin < segment.end; begin += block_rows)
      f(begin, least(block_rows, segment.end - begin));
  }

  // act(z @ folded + down_bias), and the slopes.
  template <bool GRAD>
  static void hidden(const Problem& p, const Weights<C>& w, int64_t n, const Scratch& s) {
    const int64_t columns = padded<C>(n);
    product<true, false, C>(p.r, middle(p), columns, w.down.folded, folded_stride(p), s.z, block_rows, w.down_bias, s.hidden,
                            block_rows);
    with_activation(p.activation, [&](auto code) {
      for (int64_t j = 0; j < p.r * block_rows; j += block_rows)
        for (int64_t t = j; t < j + columns; t += lanes<C>) {
          Vec<C> value, slope;
          activate_vector<decltype(code)::value, GRAD>(load<C>(s.hidden + t), value, slope, C{});
          store(s.hidden + t, value);
          if constexpr (GRAD) store(s.slope + t, slope);
        }
    });
  }

  // scale * hidden @ what leads to y.
  static FA_INLINE void raise(const Problem& p, const Weights<C>& w, int64_t n, const Scratch& s) {
    product<false, false, C>(middle(p), p.r, padded<C>(n), w.up.folded, folded_stride(p), s.hidden, block_rows, nullptr, s.h,
                             block_rows);
  }

  static void forward(const Problem& p, void* thread, const Segment& segment) {
    Arena arena(thread);
    Weights<C> w = weights(p, arena);
    const Scratch s = scratch(p, arena);
    const bool adapts = segment.adapter >= 0;
    if (adapts) read_weights(p, segment, w);
    const Rows out{p.y, p.d};
    const bool adds = p.add_x || p.residual.data;
    C* const saved = p.residual.data ? s.other : s.x;
    for_blocks(segment, [&](int64_t begin, int64_t n) {
      Block<const C*> x, residual;
      Block<C*> y;
      output_block(p, out, shape(p), begin, n, saved, y);
      load_block(p, p.x, shape(p), begin, n, s.x, x);
      if (p.residual.data) load_block(p, p.residual, shape(p), begin, n, s.other, residual);
      if (adapts) {
        project(x, n, shape(p), w.s, ranks(p), s.z, &y);
        hidden<false>(p, w, n, s);
        raise(p, w, n, s);
      }
      expand(n, shape(p), s.h, adapts ? ranks(p) : 0, w.t, adapts ? w.up_bias : nullptr,
             adds ? p.add_x ? &x : &residual : nullptr, y);
      save_block(p, out, shape(p), begin, n, saved);
    });
  }

  // Which sums backward needs.
  static FA_INLINE bool wants_down(const Problem& p) { return p.wants[grad_down_a] || p.wants[grad_down_t]; }
  static FA_INLINE bool wants_up(const Problem& p) {
    return p.wants[grad_up_a] || p.wants[grad_up_s] || p.wants[grad_scale];
  }
  static FA_INLINE bool wants_grad_z(const Problem& p) { return p.wants[grad_x] || p.wants[grad_down_s]; }
  static FA_INLINE bool wants_grad_hidden(const Problem& p) {
    return wants_grad_z(p) || wants_down(p) || p.wants[grad_down_bias];
  }
  static FA_INLINE bool wants_up_bias(const Problem& p) {
    return p.wants[grad_up_bias] || (p.wants[grad_scale] && p.up_bias.data);
  }

  static FA_INLINE Partial<C> partial(const Problem& p, Arena& arena) {
    const int64_t wide = matrix_size<C>(ranks(p), p.d / p.n), folded = middle(p) * folded_stride(p);
    Partial<C> sums = {};
    if (p.wants[grad_down_s]) sums.s = arena.take<C>(wide);
    if (p.wants[grad_up_t]) sums.t = arena.take<C>(wide);
    if (wants_down(p)) sums.down = arena.take<C>(folded);
    if (wants_up(p)) sums.up = arena.take<C>(folded);
    if (p.wants[grad_down_bias]) sums.down_bias = arena.take<C>(folded_stride(p));
    if (wants_up_bias(p)) sums.up_bias = arena.take<C>(p.n * padded<C>(p.d / p.n));
    return sums;
  }

  static int64_t partial_bytes(const Problem& p) {
    Arena arena(nullptr);
    partial(p, arena);
    return arena.used();
  }

  // From s.z, s.grad_h and the rows: what lies between, and the sums of the small factors. Leaves the gradient of z in s.z.
  static void middle_backward(const Problem& p, const Weights<C>& w, int64_t n, const Scratch& s, const Partial<C>& sums) {
    const int64_t ld = folded_stride(p), columns = padded<C>(n);
    hidden<true>(p, w, n, s);
    if (sums.t) raise(p, w, n, s);
    if (sums.up) {
      transpose_block(p.r, s.hidden, block_rows, s.transposed);
      product<false, true, C>(middle(p), n, ld, s.grad_h, block_rows, s.transposed, ld, nullptr, sums.up, ld);
    }
    if (!wants_grad_hidden(p)) return;
    product<true, false, C>(p.r, middle(p), columns, w.up.folded, ld, s.grad_h, block_rows, nullptr, s.grad_hidden,
                            block_rows);
    for (int64_t j = 0; j < p.r * block_rows; j += block_rows)
      for (int64_t t = j; t < j + columns; t += lanes<C>)
        store(s.grad_hidden + t, load<C>(s.grad_hidden + t) * load<C>(s.slope + t));
    if (sums.down || sums.down_bias) transpose_block(p.r, s.grad_hidden, block_rows, s.transposed);
    if (sums.down) product<false, true, C>(middle(p), n, ld, s.z, block_rows, s.transposed, ld, nullptr, sums.down, ld);
    for (int64_t j = 0; sums.down_bias && j < ld; j += lanes<C>) {
      Vec<C> total = {};
      for (int64_t t = 0; t < n; ++t) total += load<C>(s.transposed + t * ld + j);
      put(sums.down_bias + j, total, true);
    }
    if (wants_grad_z(p))
      product<false, false, C>(middle(p), p.r, columns, w.down.folded, ld, s.grad_hidden, block_rows, nullptr, s.z,
                               block_rows);
  }

  static void backward(const Problem& p, void* thread, const Segment& segment, void* memory) {
    Arena arena(thread), partial_arena(memory);
    Weights<C> w = weights(p, arena);
    const Scratch s = scratch(p, arena);
    const Partial<C> sums = partial(p, partial_arena);
    memset(memory, 0, partial_arena.used());
    const bool adapts = segment.adapter >= 0;
    if (adapts) read_weights(p, segment, w);
    const bool has_middle = adapts && (wants_grad_hidden(p) || sums.up || sums.t);
    const bool reads_y = has_middle || p.add_x || sums.up_bias;
    const bool fused = adapts && ranks(p) == rank_tile && p.wants[grad_x] && sums.s && sums.t;
    const Rows out{p.grads[grad_x], p.d};
    for_blocks(segment, [&](int64_t begin, int64_t n) {
      Block<const C*> x, grad_y;
      Block<C*> grad;
      if (p.wants[grad_x]) output_block(p, out, shape(p), begin, n, s.x, grad);
      if (has_middle) load_block(p, p.x, shape(p), begin, n, s.x, x);
      if (reads_y) load_block(p, p.grad_y, shape(p), begin, n, s.other, grad_y);
      if (has_middle) {
        project(x, n, shape(p), w.s, ranks(p), s.z);
        project(grad_y, n, shape(p), w.t, ranks(p), s.grad_h, p.wants[grad_x] ? &grad : nullptr);
        middle_backward(p, w, n, s, sums);
      }
      if (fused) {
        expand_and_sum(x, grad_y, n, shape(p), s.z, s.h, w.s, p.add_x, sums.s, sums.t, sums.up_bias, grad);
        return save_block(p, out, shape(p), begin, n, s.x);
      }
      if (adapts && (sums.t || sums.up_bias)) add_sums(grad_y, n, shape(p), s.h, ranks(p), sums.t, sums.up_bias);
      if (adapts && sums.s) add_sums<C>(x, n, shape(p), s.z, ranks(p), sums.s, nullptr);
      if (!p.wants[grad_x]) return;
      expand<C>(n, shape(p), s.z, adapts ? ranks(p) : 0, w.s, nullptr, p.add_x ? &grad_y : nullptr, grad);
      save_block(p, out, shape(p), begin, n, s.x);
    });
  }
};

}  // namespace fastadapt::FA_TARGET::compacter
