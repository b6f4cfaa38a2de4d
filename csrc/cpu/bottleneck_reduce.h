// The end of backward: partial gradients of the segments, added in their order, become gradients of the parameters.
#pragma once
#include "bottleneck_rows.h"

namespace fastadapt::FA_TARGET::bottleneck {

template <class T, class W, class P = Pass<T, W>>
struct Reduce : P {
  using Base = P;
  using C = Compute<T>;

  // Columns of the gradients that belong to no adapter alone, in the compute type: a lane block wide.
  struct Sums {
    Vec<C> scale, norm_weight, norm_bias, skip;
  };

  // The partials of one adapter: a run of the segments.
  struct Run {
    const Segment* segments;
    char* memory;
    int64_t first, last, bytes;

    // Moves on to the next adapter, whose segments (if any) begin where the last one's end.
    FA_INLINE void next(int64_t count, int64_t adapter) {
      for (first = last; first < count && segments[first].adapter < adapter;) ++first;
      for (last = first; last < count && segments[last].adapter == adapter;) ++last;
    }

    FA_INLINE Partial<C> operator()(const Problem& p, int64_t s) const {
      Arena arena(memory + s * bytes);
      return Base::partial(p, arena);
    }
  };

  // The sums of a strip as the only partial of an adapter, addressed by columns of the whole matrix.
  struct Whole {
    static constexpr int64_t first = 0, last = 1;
    Partial<C> sums;
    FA_INLINE const Partial<C>& operator()(const Problem&, int64_t) const { return sums; }
  };

  static FA_INLINE void write(const Parameter& q, void* out, int64_t at, Vec<C> v, int64_t count) {
    if (q.like_x)
      store_at<C>(static_cast<T*>(out) + at, 0, count, v);
    else if constexpr (sizeof(C) == sizeof(float))
      store_at<C>(static_cast<float*>(out) + at, 0, count, v);
  }

  // f(0) ... f(count - 1), unrolled where it is a whole vector.
  template <class F>
  static FA_INLINE void for_lanes(int64_t count, const F& f) {
    if (count == lanes<C>) {
#pragma GCC unroll 16
      for (int64_t t = 0; t < lanes<C>; ++t) f(t);
    } else {
      for (int64_t t = 0; t < count; ++t) f(t);
    }
  }

  // Sums `rows` rows, ld apart, of one member of the partials over the segments of the run.
  template <class R, class Member>
  static FA_INLINE void totals(const Problem& p, const R& run, Member member, int64_t at, int64_t rows, int64_t ld,
                               Vec<C> (&v)[lanes<C>]) {
    for (int64_t t = 0; t < lanes<C>; ++t) v[t] = Vec<C>{};
    for (int64_t s = run.first; s < run.last; ++s) {
      const C* from = run(p, s).*member + at;
      for_lanes(rows, [&](int64_t t) FA_FORCED { v[t] += load<C>(from + t * ld); });
    }
  }
  template <class R, class Member>
  static FA_INLINE Vec<C> total(const Problem& p, const R& run, Member member, int64_t at) {
    Vec<C> v = {};
    for (int64_t s = run.first; s < run.last; ++s) v += load<C>(run(p, s).*member + at);
    return v;
  }

  // The block of a weight gradient at column c and hidden index j, with a vector for each hidden index.
  template <class R, class Member>
  static FA_INLINE void products(const Problem& p, const R& run, Member member, int64_t c, int64_t j, Vec<C> (&v)[lanes<C>]) {
    const int64_t ld = Base::product_stride(p);
    totals(p, run, member, j * ld + c, least(lanes<C>, p.r - j), ld, v);
  }

  // Rows [c, c + count) of the up weight: grad_Wu = scale * P, grad_bu = scale * S, and their share of grad_scale.
  template <class R>
  static void up_rows(const Problem& p, const R& run, const Common<C>& common, int64_t id, int64_t c, int64_t count,
                      Sums& sums) {
    const Vec<C> scale = common.scale ? load<C>(common.scale + c) : broadcast<C>(1);
    Vec<C> sum_g = {};
    if (p.wants[grad_up_bias] || p.wants[grad_scale]) sum_g = total(p, run, &Partial<C>::sum_g, c);
    if (p.wants[grad_up_bias]) write(p.up_bias, p.grads[grad_up_bias], id * p.d + c, scale * sum_g, count);
    if (p.wants[grad_scale] && p.up_bias.data) sums.scale += sum_g * Base::parameter_at(p.up_bias, id, c, count);
    if (!needs_up_product(p)) return;
    Vec<C> dots[lanes<C>] = {};
    for (int64_t j = 0; j < p.r; j += lanes<C>) {
      Vec<C> v[lanes<C>];
      products(p, run, &Partial<C>::up, c, j, v);
      transpose<C>(v);
      W* out = static_cast<W*>(p.grads[grad_up]) + (id * p.d + c) * p.r;
      if (p.wants[grad_up])
        for_lanes(count, [&](int64_t t) FA_FORCED { store_at<C>(out + t * p.r, j, p.r - j, v[t] * scale[t]); });
      if (p.wants[grad_scale])
        for (int64_t t = 0; t < count; ++t)
          dots[t] += v[t] * load_at<C>(Base::element(p.up, id, c + t, 0), j, p.r - j, p.up.stride_1);
    }
    if (p.wants[grad_scale])
      for (int64_t t = 0; t < count; ++t) sums.scale[t] += sum<C>(dots[t]);
  }

  // Columns [c, c + count) of the down weight: grad_Wd = Q * norm_weight + outer(grad_bd, norm_bias), and the norm's gradients.
  template <class R>
  static void down_columns(const Problem& p, const R& run, const Common<C>& common, int64_t id, int64_t c, int64_t count,
                           Sums& sums) {
    for (int64_t j0 = 0; j0 < p.r; j0 += lanes<C>) {
      const Vec<C> bias = total(p, run, &Partial<C>::down_bias, j0);
      Vec<C> v[lanes<C>] = {};
      if (needs_down_product(p)) products(p, run, &Partial<C>::down, c, j0, v);
      W* out = static_cast<W*>(p.grads[grad_down]) + (id * p.r + j0) * p.d;
      const int64_t rows = least(lanes<C>, p.r - j0);
      if (p.wants[grad_down] && !common.norm_weight)
        for_lanes(rows, [&](int64_t t) FA_FORCED { store_at<C>(out + t * p.d, c, p.d - c, v[t]); });
      for (int64_t t = 0; t < rows && common.norm_weight; ++t) {
        if (p.wants[grad_down]) {
          Vec<C> grad = v[t] * load<C>(common.norm_weight + c);
          if (common.norm_bias) grad += bias[t] * load<C>(common.norm_bias + c);
          store_at<C>(out + t * p.d, c, p.d - c, grad);
        }
        if (!p.wants[grad_norm_weight] && !p.wants[grad_norm_bias]) continue;
        const Vec<C> weight = load_at<C>(Base::element(p.down, id, j0 + t, 0), c, p.d - c, p.down.stride_1);
        sums.norm_weight += weight * v[t];
        sums.norm_bias += weight * bias[t];
      }
    }
  }

  // All of that for one adapter.
  template <class R>
  static void columns(const Problem& p, const R& run, const Common<C>& common, int64_t id, int64_t c, int64_t count, Sums& s) {
    if (needs_up_product(p) || p.wants[grad_up_bias]) up_rows(p, run, common, id, c, count, s);
    if (needs_down_product(p) || p.wants[grad_norm_bias]) down_columns(p, run, common, id, c, count, s);
    if (p.wants[grad_skip]) s.skip += total(p, run, &Partial<C>::skip, c);
  }

  static void write_sums(const Problem& p, const Sums& s, int64_t c, int64_t count) {
    if (p.wants[grad_scale]) store_at<C>(static_cast<C*>(p.scale_columns), c, count, s.scale);
    if (p.wants[grad_scale] && p.scale.stride) write(p.scale, p.grads[grad_scale], c, s.scale, count);
    if (p.wants[grad_norm_weight]) write(p.norm_weight, p.grads[grad_norm_weight], c, s.norm_weight, count);
    if (p.wants[grad_norm_bias]) write(p.norm_bias, p.grads[grad_norm_bias], c, s.norm_bias, count);
    if (p.wants[grad_skip]) write(p.skip, p.grads[grad_skip], c, s.skip, count);
  }

  // Blocks [first, last) of a vector of columns.
  static void reduce_blocks(const Problem& p, const Common<C>& common, const Segment* segments, int64_t count, void* partials,
                            int64_t bytes, int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t c = block * lanes<C>, n = least(lanes<C>, p.d - c);
      Sums s = {};
      Run run = {segments, static_cast<char*>(partials), 0, 0, bytes};
      for (int64_t id = 0; id < p.g; ++id) {
        run.next(count, id);
        columns(p, run, common, id, c, n, s);
      }
      write_sums(p, s, c, n);
    }
  }

  // Columns are shared among the parts, so that no two threads write to one gradient.
  static void reduce(const Problem& p, void* shared_memory, void*, const Segment* segments, int64_t count, void* partials,
                     int64_t part, int64_t parts) {
    Arena shared(shared_memory);
    const Common<C> common = Base::common(p, shared);
    const int64_t blocks = ceil_div(p.d, lanes<C>);
    reduce_blocks(p, common, segments, count, partials, Base::sizes(p).partial, blocks * part / parts,
                  blocks * (part + 1) / parts);
  }

  // The gradients that don't have a column: of the hidden vectors, and of a scale that is one number.
  static void finish(const Problem& p, const Segment* segments, int64_t count, void* partials) {
    Run run = {segments, static_cast<char*>(partials), 0, 0, Base::sizes(p).partial};
    for (int64_t j = 0; j < p.r; j += lanes<C>) {
      Vec<C> hidden_skip = {};
      run.last = 0;
      for (int64_t id = 0; id < p.g; ++id) {
        run.next(count, id);
        if (p.wants[grad_down_bias])
          write(p.down_bias, p.grads[grad_down_bias], id * p.r + j, total(p, run, &Partial<C>::down_bias, j), p.r - j);
        if (p.wants[grad_hidden_skip]) hidden_skip += total(p, run, &Partial<C>::hidden_skip, j);
      }
      if (p.wants[grad_hidden_skip]) write(p.hidden_skip, p.grads[grad_hidden_skip], j, hidden_skip, p.r - j);
    }
    if (p.wants[grad_scale] && !p.scale.stride) {
      Vec<C> scale = {};
      for (int64_t c = 0; c < p.d; c += lanes<C>) scale += load_at<C>(static_cast<const C*>(p.scale_columns), c, p.d - c, 1);
      write(p.scale, p.grads[grad_scale], 0, broadcast<C>(sum<C>(scale)), 1);
    }
  }

  static Kernel kernel() {
    return {Base::sizes, Base::read_parameters, Base::pack, Base::forward, Base::backward, reduce, finish, 64};
  }
};

}  // namespace fastadapt::FA_TARGET::bottleneck
