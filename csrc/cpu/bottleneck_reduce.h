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

  // One vector of a member of the partials, summed over the segments of the run.
  template <class R, class Member>
  static FA_INLINE Vec<C> total(const Problem& p, const R& run, Member member, int64_t at) {
    Vec<C> v = {};
    for (int64_t s = run.first; s < run.last; ++s) v += load<C>(run(p, s).*member + at);
    return v;
  }

  // The block of P at column c and hidden index j: a vector for each hidden index.
  template <class R>
  static void up_products(const Problem& p, const R& run, int64_t c, int64_t j, Vec<C> (&v)[lanes<C>]) {
    const int64_t ld = Base::product_stride(p);
    for (int64_t t = 0; t < lanes<C>; ++t) v[t] = Vec<C>{};
    for (int64_t s = run.first; s < run.last; ++s) {
      const C* from = run(p, s).up + j * ld + c;
      for_lanes(least(lanes<C>, p.r - j), [&](int64_t t) FA_FORCED { v[t] += load<C>(from + t * ld); });
    }
  }

  // Rows [c, c + count) of the up weight: grad_Wu = scale * P, grad_bu = scale * S, and their share of grad_scale.
  template <class R>
  static void up_rows(const Problem& p, const R& run, const Common<C>& common, int64_t id, int64_t c, int64_t count,
                      Sums& sums) {
    const Vec<C> scale = common.scale ? load<C>(common.scale + c) : broadcast<C>(1);
    Vec<C> sum_g = {};
    if (p.wants[grad_up_bias] || p.wants[grad_scale]) sum_g = total(p, run, &Partial<C>::sum_g, c);
    if (p.wants[grad_up_bias]) Base::write(p.up_bias, p.grads[grad_up_bias], id * p.d + c, scale * sum_g, count);
    if (p.wants[grad_scale] && p.up_bias.data) sums.scale += sum_g * Base::parameter_at(p.up_bias, id, c, count);
    if (!needs_up_product(p)) return;
    Vec<C> dots[lanes<C>] = {};
    for (int64_t j = 0; j < p.r; j += lanes<C>) {
      Vec<C> v[lanes<C>];
      up_products(p, run, c, j, v);
      transpose<C>(v);
      W* out = static_cast<W*>(p.grads[grad_up]) + (id * p.d + c) * p.r;
      if (p.wants[grad_up] && p.r - j >= lanes<C>)
        for_lanes(count, [&](int64_t t) FA_FORCED { store(out + t * p.r + j, v[t] * scale[t]); });
      else if (p.wants[grad_up])
        for (int64_t t = 0; t < count; ++t) store_some<C>(out + t * p.r + j, v[t] * scale[t], p.r - j);
      if (p.wants[grad_scale])
        for (int64_t t = 0; t < count; ++t)
          dots[t] += v[t] * load_at<C>(Base::element(p.up, id, c + t, 0), j, p.r - j, p.up.stride_1);
    }
    if (p.wants[grad_scale])
      for (int64_t t = 0; t < count; ++t) sums.scale[t] += sum<C>(dots[t]);
  }

  // Columns [c, c + width) of the down weight: grad_Wd = Q * norm_weight + outer(grad_bd, norm_bias), and the norm's gradients.
  template <class R>
  static void down_columns(const Problem& p, const R& run, const Common<C>& common, int64_t id, int64_t c, int64_t width,
                           Sums* sums) {
    const int64_t ld = Base::product_stride(p), vectors = ceil_div(width, lanes<C>);
    for (int64_t j = 0; j < p.r; ++j) {
      Vec<C> product[strip_width / lanes<C>] = {};
      C bias = 0;
      for (int64_t s = run.first; s < run.last; ++s) {
        const Partial<C> q = run(p, s);
        bias += q.down_bias[j];
        for (int64_t v = 0; v < vectors && q.down; ++v) product[v] += load<C>(q.down + j * ld + c + v * lanes<C>);
      }
      W* out = static_cast<W*>(p.grads[grad_down]) + (id * p.r + j) * p.d;
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t at = c + v * lanes<C>;
        Vec<C> grad = product[v];
        if (common.norm_weight) grad *= load<C>(common.norm_weight + at);
        if (common.norm_bias) grad += bias * load<C>(common.norm_bias + at);
        if (p.wants[grad_down]) store_at<C>(out, at, p.d - at, grad);
        if (!p.wants[grad_norm_weight] && !p.wants[grad_norm_bias]) continue;
        const Vec<C> weight = load_at<C>(Base::element(p.down, id, j, 0), at, p.d - at, p.down.stride_1);
        sums[v].norm_weight += weight * product[v];
        sums[v].norm_bias += weight * bias;
      }
    }
  }

  // The gradients of one adapter in columns [c, c + width), at most a strip.
  template <class R>
  static void columns(const Problem& p, const R& run, const Common<C>& common, int64_t id, int64_t c, int64_t width,
                      Sums* sums) {
    for (int64_t j = 0; j < width; j += lanes<C>) {
      Sums& s = sums[j / lanes<C>];
      if (needs_up_product(p) || p.wants[grad_up_bias]) up_rows(p, run, common, id, c + j, least(lanes<C>, width - j), s);
      if (p.wants[grad_skip]) s.skip += total(p, run, &Partial<C>::skip, c + j);
    }
    if (needs_down_product(p) || p.wants[grad_norm_bias]) down_columns(p, run, common, id, c, width, sums);
  }

  static void write_sums(const Problem& p, const Sums* sums, int64_t c, int64_t width) {
    for (int64_t j = 0; j < width; j += lanes<C>, ++sums) {
      const int64_t at = c + j, count = least(lanes<C>, width - j);
      if (p.wants[grad_scale]) store_at<C>(static_cast<C*>(p.scale_columns), at, count, sums->scale);
      if (p.wants[grad_scale] && p.scale_varies) Base::write(p.scale, p.grads[grad_scale], at, sums->scale, count);
      if (p.wants[grad_norm_weight]) Base::write(p.norm_weight, p.grads[grad_norm_weight], at, sums->norm_weight, count);
      if (p.wants[grad_norm_bias]) Base::write(p.norm_bias, p.grads[grad_norm_bias], at, sums->norm_bias, count);
      if (p.wants[grad_skip]) Base::write(p.skip, p.grads[grad_skip], at, sums->skip, count);
    }
  }

  // Columns are shared among the parts, so that no two threads write to one gradient.
  static void reduce(const Problem& p, void* shared_memory, void*, const Segment* segments, int64_t count, void* partials,
                     int64_t part, int64_t parts) {
    Arena shared(shared_memory);
    const Common<C> common = Base::common(p, shared);
    const int64_t blocks = ceil_div(p.d, lanes<C>), end = least(p.d, blocks * (part + 1) / parts * lanes<C>);
    for (int64_t c = blocks * part / parts * lanes<C>; c < end; c += strip_width) {
      const int64_t width = least(strip_width, end - c);
      Sums sums[strip_width / lanes<C>] = {};
      Run run = {segments, static_cast<char*>(partials), 0, 0, Base::sizes(p).partial};
      for (int64_t id = 0; id < p.g; ++id) {
        run.next(count, id);
        columns(p, run, common, id, c, width, sums);
      }
      write_sums(p, sums, c, width);
    }
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
          Base::write(p.down_bias, p.grads[grad_down_bias], id * p.r + j, total(p, run, &Partial<C>::down_bias, j), p.r - j);
        if (p.wants[grad_hidden_skip]) hidden_skip += total(p, run, &Partial<C>::hidden_skip, j);
      }
      if (p.wants[grad_hidden_skip]) Base::write(p.hidden_skip, p.grads[grad_hidden_skip], j, hidden_skip, p.r - j);
    }
    if (p.wants[grad_scale] && !p.scale_varies) {
      Vec<C> scale = {};
      for (int64_t c = 0; c < p.d; c += lanes<C>) scale += load_at<C>(static_cast<const C*>(p.scale_columns), c, p.d - c, 1);
      Base::write(p.scale, p.grads[grad_scale], 0, broadcast<C>(sum<C>(scale)), 1);
    }
  }

  static Kernel kernel() {
    return {Base::sizes, Base::read_parameters, Base::template pack<Base>, Base::forward, Base::backward, reduce, finish, 64};
  }
};

}  // namespace fastadapt::FA_TARGET::bottleneck
