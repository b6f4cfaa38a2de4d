// The end of backward of the compacter adapter: gradients of rules and small factors from those of the folded matrices.
#pragma once
#include "compacter_rows.h"
#include "kron_reduce.h"

namespace fastadapt::FA_TARGET::compacter {

template <class C>
struct Reduce : Pass<C> {
  using Base = Pass<C>;

  // Gradients of a side in its own order of indices, and in that of the tensors where this differs.
  struct Gradients {
    C *rule, *factor, *swapped;
  };

  static FA_INLINE Gradients gradients_of_side(const Problem& p, Arena& arena) {
    const int64_t rule = p.n * p.n * p.n, factor = p.r * p.q;
    return {arena.take<C>(rule), arena.take<C>(factor), arena.take<C>(most(rule, factor))};
  }

  // The gradients of rule and factor from `sums`, that of the folded matrix.
  static void unfold(const Problem& p, const Side<C>& side, const C* sums, const Gradients& grad) {
    const int64_t n = p.n, ranks = Base::ranks(p), chunk = p.r / n;
    memset(grad.rule, 0, n * n * n * sizeof(C));
    memset(grad.factor, 0, ranks * chunk * sizeof(C));
    for (int64_t outer = 0; outer < n; ++outer)
      for (int64_t ik = 0; ik < ranks; ++ik, sums += Base::folded_stride(p))
        for (int64_t inner = 0; inner < n; ++inner) {
          const int64_t at = (ik / p.q * n + outer) * n + inner;
          const C *row = sums + inner * chunk, *factor = side.factor + ik * chunk, rule = side.rule[at];
          C* grad_factor = grad.factor + ik * chunk;
          C total = 0;
          for (int64_t j = 0; j < chunk; ++j) {
            total += row[j] * factor[j];
            grad_factor[j] += row[j] * rule;
          }
          grad.rule[at] += total;
        }
  }

  static void write(const Problem& p, int gradient, int64_t adapter, int64_t size, const C* values) {
    if (p.wants[gradient]) write_gradient(p.weight_dtype, p.grads[gradient], adapter * size, size, values);
  }

  // The same with the last two of (terms, rows, columns) swapped.
  static void write_swapped(const Problem& p, int gradient, int64_t adapter, int64_t rows, int64_t columns, const C* values,
                            C factor, C* swapped) {
    const int64_t size = rows * columns;
    for (int64_t i = 0; i < p.n; ++i)
      for (int64_t j = 0; j < rows; ++j)
        for (int64_t k = 0; k < columns; ++k)
          swapped[i * size + k * rows + j] = factor * values[i * size + j * columns + k];
    write(p, gradient, adapter, p.n * size, swapped);
  }

  static FA_INLINE Dtype dtype_of(const Problem& p, const Parameter& q) { return q.like_x ? p.dtype : Dtype::float32; }

  static void finish_adapter(const Problem& p, void* thread, int64_t adapter, void* memory, C& grad_of_scale) {
    const int64_t n = p.n, chunk = p.r / n, width = p.d / n;
    Arena arena(thread), partial_arena(memory);
    Weights<C> w = Base::weights(p, arena);
    const Gradients grad = gradients_of_side(p, arena);
    C* const wide = arena.take<C>(width * p.q);
    const Partial<C> sums = Base::partial(p, partial_arena);
    if (sums.down || sums.up) Base::read_sides(p, adapter, w);
    if (sums.down) {
      unfold(p, w.down, sums.down, grad);
      write(p, grad_down_a, adapter, n * n * n, grad.rule);
      write(p, grad_down_t, adapter, p.q * p.r, grad.factor);
    }
    if (sums.up) {
      unfold(p, w.up, sums.up, grad);
      for (int64_t i = 0; i < n * n * n; ++i) grad_of_scale += grad.rule[i] * w.up.rule[i];
      const C scale = Base::scale(p);
      write_swapped(p, grad_up_a, adapter, n, n, grad.rule, scale, grad.swapped);
      write_swapped(p, grad_up_s, adapter, p.q, chunk, grad.factor, scale, grad.swapped);
    }
    if (sums.s) write_matrix(p.weight_dtype, p.grads[grad_down_s], adapter, n, p.q, width, sums.s, false, wide);
    if (sums.t) write_matrix(p.weight_dtype, p.grads[grad_up_t], adapter, n, p.q, width, sums.t, true, wide);
    if (sums.down_bias)
      write_gradient(dtype_of(p, p.down_bias), p.grads[grad_down_bias], adapter * p.r, p.r, sums.down_bias);
    if (!sums.up_bias) return;
    const int64_t columns = n * padded<C>(width);
    if (p.wants[grad_scale]) {
      read_parameter<C>(p, p.up_bias, adapter, Base::shape(p), 1, w.up_bias, padded<C>(width));
      Vec<C> total = {};
      for (int64_t j = 0; j < columns; j += lanes<C>) total += load<C>(sums.up_bias + j) * load<C>(w.up_bias + j);
      grad_of_scale += sum<C>(total);
    }
    const C scale = Base::scale(p);
    for (int64_t j = 0; j < columns; ++j) sums.up_bias[j] *= scale;
    if (p.wants[grad_up_bias])
      write_chunks(dtype_of(p, p.up_bias), p.grads[grad_up_bias], adapter, Base::shape(p), sums.up_bias);
  }

  static void finish(const Problem& p, void* thread, const Segment* segments, int64_t count, void* partials) {
    C grad_of_scale = 0;
    for_adapters(segments, count, [&](int64_t adapter, int64_t first, int64_t) {
      finish_adapter(p, thread, adapter, static_cast<char*>(partials) + first * Base::partial_bytes(p), grad_of_scale);
    });
    if (p.wants[grad_scale]) write_gradient(dtype_of(p, p.scale), p.grads[grad_scale], 0, 1, &grad_of_scale);
  }

  static int64_t thread_bytes(const Problem& p) {
    Arena blocks(nullptr), end(nullptr);
    Base::weights(p, blocks);
    Base::scratch(p, blocks);
    if (!p.backward) return blocks.used();
    Base::weights(p, end);
    gradients_of_side(p, end);
    end.take<C>(p.d / p.n * p.q);
    return most(blocks.used(), end.used());
  }

  static Kernel<Problem> kernel() {
    return {thread_bytes, Base::partial_bytes, Base::forward, Base::backward, reduce<C, Problem, Base>, finish};
  }
};

}  // namespace fastadapt::FA_TARGET::compacter
