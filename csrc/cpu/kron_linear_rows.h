// Forward and backward of a linear map of Kronecker products over the rows of one segment, a block at a time. Between the
// projection of a row and its expansion lie z[(a, i, k)] and h[(b, i, k)], and the factors `a` between these.
#pragma once
#include "kron_linear_args.h"
#include "kron_reduce.h"

namespace fastadapt::FA_TARGET::kron_linear {

using namespace fastadapt::kron_linear;
using namespace fastadapt::FA_TARGET::kron;

template <class C>
struct Pass {
  struct Weights {
    Matrix<C> s, t;
    C *s_memory, *t_memory, *a, *bias;  // `a` carries the scale
  };

  struct Scratch {
    C *in, *out, *z, *h, *grad_h, *transposed;
  };

  // Sums of the rows of a segment; null where the gradient isn't wanted.
  struct Partial {
    C *a, *s, *t, *bias;
  };

  static FA_INLINE int64_t ranks(const Problem& p) { return p.terms * p.q; }
  static FA_INLINE int64_t rule_stride(const Problem& p) { return padded<C>(p.out.chunks); }

  static FA_INLINE Weights weights(const Problem& p, Arena& arena) {
    Weights w = {};
    w.s_memory = arena.take<C>(matrix_size<C>(ranks(p), p.in.width));
    w.t_memory = arena.take<C>(matrix_size<C>(ranks(p), p.out.width));
    w.a = arena.take<C>(p.terms * p.in.chunks * p.out.chunks);
    w.bias = p.bias.data && !p.backward ? arena.take<C>(p.out.chunks * padded<C>(p.out.width)) : nullptr;
    return w;
  }

  static void read_weights(const Problem& p, Weights& w) {
    w.s = read_matrix(p, p.s, p.s.stride_2, p.s.stride_1, 0, p.terms, p.q, p.in.width, w.s_memory);
    w.t = read_matrix(p, p.t, p.t.stride_1, p.t.stride_2, 0, p.terms, p.q, p.out.width, w.t_memory);
    read_factor(p, p.a, 0, p.terms, p.in.chunks, p.out.chunks, w.a);
    for (int64_t i = 0; i < p.terms * p.in.chunks * p.out.chunks; ++i) w.a[i] *= static_cast<C>(p.scale);
    if (w.bias) read_parameter<C>(p, p.bias, 0, p.out, 1, w.bias, padded<C>(p.out.width));
  }

  static FA_INLINE Scratch scratch(const Problem& p, Arena& arena) {
    Scratch s = {};
    const auto ends = [&](const Shape& shape) { return (shape.chunks * ranks(p) + rank_tile) * block_rows; };
    s.in = arena.take<C>(block_size<C>(p, p.x, p.in));
    s.out = arena.take<C>(block_size<C>(p, p.backward ? p.grad_y : p.residual, p.out));
    s.z = arena.take<C>(ends(p.in));
    s.h = arena.take<C>(ends(p.out));
    if (!p.backward) return s;
    s.grad_h = arena.take<C>(ends(p.out));
    s.transposed = arena.take<C>(rule_stride(p) * block_rows);
    return s;
  }

  static int64_t thread_bytes(const Problem& p) {
    Arena blocks(nullptr);
    weights(p, blocks);
    scratch(p, blocks);
    return most(blocks.used(), p.in.width * p.q * static_cast<int64_t>(sizeof(C)));
  }

  // With BACKWARD z[a] = the sum over b of a[term][a][b] * h[b], otherwise h[b] = that over a of a[term][a][b] * z[a].
  template <bool BACKWARD>
  static void mix(const Problem& p, const C* rule, const C* from, C* to) {
    const int64_t in = p.in.chunks, out = p.out.chunks, ld = ranks(p) * block_rows, term = p.q * block_rows;
    for (int64_t i = 0; i < p.terms; ++i, rule += in * out, from += term, to += term)
      product<!BACKWARD, false, C>(BACKWARD ? in : out, BACKWARD ? out : in, term, rule, out, from, ld, nullptr, to, ld);
  }

  static void forward(const Problem& p, void* thread, const Segment& segment) {
    Arena arena(thread);
    Weights w = weights(p, arena);
    const Scratch s = scratch(p, arena);
    read_weights(p, w);
    const Rows out{p.y, p.out.chunks * p.out.width};
    for (int64_t begin = segment.begin; begin < segment.end; begin += block_rows) {
      const int64_t n = least(block_rows, segment.end - begin);
      Block<const C*> x, residual;
      Block<C*> y;
      load_block(p, p.x, p.in, begin, n, s.in, x);
      if (p.residual.data) load_block(p, p.residual, p.out, begin, n, s.out, residual);
      project(x, n, p.in, w.s, ranks(p), s.z);
      mix<false>(p, w.a, s.z, s.h);
      output_block(p, out, p.out, begin, n, s.out, y);
      expand(n, p.out, s.h, ranks(p), w.t, w.bias, p.residual.data ? &residual : nullptr, y);
      save_block(p, out, p.out, begin, n, s.out);
    }
  }

  static FA_INLINE Partial partial(const Problem& p, Arena& arena) {
    Partial sums = {};
    if (p.wants[grad_a]) sums.a = arena.take<C>(p.terms * p.in.chunks * rule_stride(p));
    if (p.wants[grad_s]) sums.s = arena.take<C>(matrix_size<C>(ranks(p), p.in.width));
    if (p.wants[grad_t]) sums.t = arena.take<C>(matrix_size<C>(ranks(p), p.out.width));
    if (p.wants[grad_bias]) sums.bias = arena.take<C>(p.out.chunks * padded<C>(p.out.width));
    return sums;
  }

  static int64_t partial_bytes(const Problem& p) {
    Arena arena(nullptr);
    partial(p, arena);
    return arena.used();
  }

  // sums.a[term][a][b] += the sum over tokens and ranks of z[a] * grad_h[b].
  static void add_rule_sums(const Problem& p, int64_t n, const Scratch& s, const Partial& sums) {
    const int64_t ld = ranks(p) * block_rows, stride = rule_stride(p);
    for (int64_t ik = 0; ik < ranks(p); ++ik) {
      transpose_block(p.out.chunks, s.grad_h + ik * block_rows, ld, s.transposed);
      product<false, true, C>(p.in.chunks, n, stride, s.z + ik * block_rows, ld, s.transposed, stride, nullptr,
                              sums.a + ik / p.q * p.in.chunks * stride, stride);
    }
  }

  static void backward(const Problem& p, void* thread, const Segment& segment, void* memory) {
    Arena arena(thread), partial_arena(memory);
    Weights w = weights(p, arena);
    const Scratch s = scratch(p, arena);
    const Partial sums = partial(p, partial_arena);
    memset(memory, 0, partial_arena.used());
    read_weights(p, w);
    const bool wants_grad_z = p.wants[grad_x] || sums.s, wants_z = sums.a || sums.t, wants_grad_h = wants_grad_z || sums.a;
    const Rows out{p.grads[grad_x], p.in.chunks * p.in.width};
    for (int64_t begin = segment.begin; begin < segment.end; begin += block_rows) {
      const int64_t n = least(block_rows, segment.end - begin);
      Block<const C*> x, grad_y;
      if (wants_z || sums.s) load_block(p, p.x, p.in, begin, n, s.in, x);
      load_block(p, p.grad_y, p.out, begin, n, s.out, grad_y);
      if (wants_z) project(x, n, p.in, w.s, ranks(p), s.z);
      if (wants_grad_h) project(grad_y, n, p.out, w.t, ranks(p), s.grad_h);
      if (sums.t) mix<false>(p, w.a, s.z, s.h);
      if (sums.a) add_rule_sums(p, n, s, sums);
      if (sums.t || sums.bias) add_sums(grad_y, n, p.out, s.h, ranks(p), sums.t, sums.bias);
      if (wants_grad_z) mix<true>(p, w.a, s.grad_h, s.z);
      if (sums.s) add_sums<C>(x, n, p.in, s.z, ranks(p), sums.s, nullptr);
      if (!p.wants[grad_x]) continue;
      Block<C*> grad;
      output_block(p, out, p.in, begin, n, s.in, grad);
      expand<C>(n, p.in, s.z, ranks(p), w.s, nullptr, nullptr, grad);
      save_block(p, out, p.in, begin, n, s.in);
    }
  }

  static void finish(const Problem& p, void* thread, const Segment* segments, int64_t count, void* partials) {
    if (!count) return;
    Arena arena(partials);
    const Partial sums = partial(p, arena);
    const int64_t rows = p.terms * p.in.chunks, columns = p.out.chunks;
    if (sums.a)
      for (int64_t i = 0; i < rows; ++i) {
        C* row = sums.a + i * rule_stride(p);
        for (int64_t j = 0; j < columns; ++j) row[j] *= static_cast<C>(p.scale);
        write_gradient(p.weight_dtype, p.grads[grad_a], i * columns, columns, row);
      }
    C* const scratch = static_cast<C*>(thread);
    if (sums.s) write_matrix(p.weight_dtype, p.grads[grad_s], 0, p.terms, p.q, p.in.width, sums.s, false, scratch);
    if (sums.t) write_matrix(p.weight_dtype, p.grads[grad_t], 0, p.terms, p.q, p.out.width, sums.t, true, scratch);
    if (sums.bias) write_chunks(p.bias.like_x ? p.dtype : Dtype::float32, p.grads[grad_bias], 0, p.out, sums.bias);
  }

  static Kernel<Problem> kernel() {
    return {thread_bytes, partial_bytes, forward, backward, reduce<C, Problem, Pass>, finish};
  }
};

}  // namespace fastadapt::FA_TARGET::kron_linear
