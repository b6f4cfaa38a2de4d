// What every row block of the bottleneck adapter shares: small parameters in the compute type, and packed weights.
#pragma once
#include "activation.h"
#include "bottleneck_args.h"
#include "narrow.h"
#include "rows.h"

namespace fastadapt::FA_TARGET::bottleneck {

using namespace fastadapt::bottleneck;

template <class C>
struct Common {
  C *scale, *norm_weight, *norm_bias, *skip, *hidden_skip;  // null where the call has none; padded with zeros
};

// One adapter, with the scale folded into the up projection and the norm's weight and bias into the down projection:
// z = xhat @ (Wd * norm_weight).T + (bd + Wd @ norm_bias).
template <class C, class Packed = C>
struct Adapter {
  C *down_bias, *up_bias;       // (r,), (d,)
  C* norm_sum;                  // backward under a norm: Wd @ norm_weight
  Packed *down, *up;            // d x r, as for project_rows, and r x d
  Packed *up_back, *down_back;  // backward: d x r and r x d
};

// Columns that a thread works on at once where threads share the columns.
constexpr int64_t strip_width = 256;

template <class C>
FA_INLINE int64_t block_rows(const Problem& p) {
  const int64_t bytes = (p.backward ? 2 : 1) * p.d * static_cast<int64_t>(sizeof(C));
  return least(96, most(24, (int64_t{768} << 10) / most(1, bytes) / 24 * 24));
}

template <class C>
struct Scratch {
  C *x, *grad_y;  // rows in the compute type, where they can't be read in place
  C *z, *grad_a, *a;
  C *rstd, *mean, *mean_x;  // one a row, for the norm
};

template <class C>
struct Partial {
  C *up, *down;                // r x d: a.T @ G and grad_z.T @ xhat, rows product_stride apart; by columns never here
  C *sum_g, *skip;             // (d,)
  C *down_bias, *hidden_skip;  // (r,)
};

FA_INLINE bool needs_hidden_grad(const Problem& p) {
  return p.wants[grad_x] || p.wants[grad_down] || p.wants[grad_down_bias] || p.wants[grad_norm_weight] ||
         p.wants[grad_norm_bias];
}
FA_INLINE bool needs_up_product(const Problem& p) { return p.wants[grad_up] || p.wants[grad_scale]; }
FA_INLINE bool needs_down_product(const Problem& p) { return p.wants[grad_down] || p.wants[grad_norm_weight]; }
FA_INLINE bool needs_grad_a(const Problem& p) { return needs_hidden_grad(p) || p.wants[grad_hidden_skip]; }
FA_INLINE bool needs_hidden(const Problem& p) { return !p.backward || needs_grad_a(p) || needs_up_product(p); }

template <class T, class W>
struct Types : Parameters<T, W> {
  using Base = Parameters<T, W>;
  using C = Compute<T>;

  static FA_INLINE Common<C> common(const Problem& p, Arena& arena) {
    const int64_t d = padded<C>(p.d) + panel_width<C>, r = padded<C>(p.r);
    Common<C> c = {};
    if (p.scale.data || p.scale_value != 1) c.scale = arena.take<C>(d);
    if (p.norm_weight.data) c.norm_weight = arena.take<C>(d);
    if (p.norm_bias.data) c.norm_bias = arena.take<C>(d);
    if (p.skip.data) c.skip = arena.take<C>(d);
    if (p.hidden_skip.data) c.hidden_skip = arena.take<C>(r);
    return c;
  }

  static FA_INLINE Adapter<C> adapter(const Problem& p, Arena& arena) {
    const int64_t d = p.d, r = p.r;
    Adapter<C> a = {};
    a.down_bias = arena.take<C>(padded<C>(r));
    a.up_bias = arena.take<C>(padded<C>(d) + panel_width<C>);
    if (p.by_columns) return a;
    if (needs_hidden(p)) a.down = arena.take<C>(projection_size<C>(d, r));
    if (!p.backward) a.up = arena.take<C>(packed_size<C>(r, d));
    if (p.backward && needs_grad_a(p)) a.up_back = arena.take<C>(projection_size<C>(d, r));
    if (p.backward && p.wants[grad_x]) a.down_back = arena.take<C>(packed_size<C>(r, d));
    if (p.backward && p.wants[grad_x] && p.norm_weight.data) a.norm_sum = arena.take<C>(padded<C>(r));
    return a;
  }

  static FA_INLINE Scratch<C> scratch(const Problem& p, Arena& arena) {
    const int64_t rows = block_rows<C>(p), hidden = rows * padded<C>(p.r), wide = rows * padded<C>(p.d);
    Scratch<C> s = {};
    s.x = arena.take<C>(wide);
    s.z = arena.take<C>(hidden);
    if (p.norm_weight.data) s.rstd = arena.take<C>(rows);
    if (!p.backward) return s;
    s.grad_y = arena.take<C>(wide);
    s.grad_a = arena.take<C>(hidden);
    s.a = arena.take<C>(hidden);
    s.mean = arena.take<C>(rows);
    s.mean_x = arena.take<C>(rows);
    return s;
  }

  static FA_INLINE int64_t product_stride(const Problem& p) { return p.by_columns ? strip_width : padded<C>(p.d); }

  static FA_INLINE Partial<C> partial(const Problem& p, Arena& arena) {
    Partial<C> q = {};
    const int64_t r = padded<C>(p.r), d = padded<C>(p.d);
    if (needs_up_product(p) && !p.by_columns) q.up = arena.take<C>(p.r * d);
    if (needs_down_product(p) && !p.by_columns) q.down = arena.take<C>(p.r * d);
    if (p.wants[grad_up_bias] || p.wants[grad_scale]) q.sum_g = arena.take<C>(d);
    if (p.wants[grad_skip]) q.skip = arena.take<C>(d);
    q.down_bias = arena.take<C>(r);
    q.hidden_skip = arena.take<C>(r);
    return q;
  }

  static Sizes sizes(const Problem& p) {
    Arena shared(nullptr), thread(nullptr), part(nullptr);
    common(p, shared);
    adapter(p, p.own_weights ? thread : shared);
    scratch(p, thread);
    partial(p, part);
    return {shared.used(), thread.used(), p.backward ? part.used() : 0};
  }

  static void read_parameters(const Problem& p, void* shared) {
    Arena arena(shared);
    const Common<C> c = common(p, arena);
    const int64_t d = padded<C>(p.d) + panel_width<C>;
    if (c.scale && p.scale.data) Base::read(p.scale, 0, p.d, c.scale, d);
    if (c.scale && !p.scale.data)
      for (int64_t i = 0; i < d; ++i) c.scale[i] = i < p.d ? static_cast<C>(p.scale_value) : 0;
    if (c.norm_weight) Base::read(p.norm_weight, 0, p.d, c.norm_weight, d);
    if (c.norm_bias) Base::read(p.norm_bias, 0, p.d, c.norm_bias, d);
    if (c.skip) Base::read(p.skip, 0, p.d, c.skip, d);
    if (c.hidden_skip) Base::read(p.hidden_skip, 0, p.r, c.hidden_skip, padded<C>(p.r));
    if (!p.own_weights) read_biases(p, c, adapter(p, arena), 0);
  }

  template <class Packed>
  static void read_biases(const Problem& p, const Common<C>& c, const Adapter<C, Packed>& a, int64_t id) {
    const int64_t r = padded<C>(p.r), d = padded<C>(p.d) + panel_width<C>;
    Base::read(p.down_bias, id, p.down_bias.data ? p.r : 0, a.down_bias, r);
    Base::read(p.up_bias, id, p.up_bias.data ? p.d : 0, a.up_bias, d);
    if (c.scale)
      for (int64_t i = 0; i < p.d; ++i) a.up_bias[i] *= c.scale[i];
  }

  static void pack_adapter(const Problem& p, const Common<C>& c, const Adapter<C>& a, int64_t id, int64_t part, int64_t parts) {
    const W *down = Base::element(p.down, id, 0, 0), *up = Base::element(p.up, id, 0, 0);
    const Weight &d = p.down, &u = p.up;
    pack_projection(Source<C, W>{down, d.stride_1, d.stride_0, p.d, p.r, c.norm_weight, nullptr}, a.down, part, parts);
    pack_part(Source<C, W>{up, u.stride_1, u.stride_0, p.r, p.d, nullptr, c.scale}, a.up, part, parts);
    pack_projection(Source<C, W>{up, u.stride_0, u.stride_1, p.d, p.r, c.scale, nullptr}, a.up_back, part, parts);
    pack_part(Source<C, W>{down, d.stride_0, d.stride_1, p.r, p.d, nullptr, c.norm_weight}, a.down_back, part, parts);
    add_norm(p, c, a, id, part, parts);
  }

  // The norm's bias through the down projection, and the sums that backward needs.
  template <class Packed>
  static void add_norm(const Problem& p, const Common<C>& c, const Adapter<C, Packed>& a, int64_t id, int64_t part,
                       int64_t parts) {
    const int64_t r0 = p.r * part / parts, r1 = p.r * (part + 1) / parts;
    if (c.norm_bias)
      for (int64_t j = r0; j < r1; ++j) a.down_bias[j] += dot(p, id, j, c.norm_bias);
    if (a.norm_sum)
      for (int64_t j = r0; j < r1; ++j) a.norm_sum[j] = dot(p, id, j, c.norm_weight);
    if (a.norm_sum && part == parts - 1)
      for (int64_t j = p.r; j < padded<C>(p.r); ++j) a.norm_sum[j] = 0;
  }

  // Row j of the down weight times a padded vector of d.
  static C dot(const Problem& p, int64_t id, int64_t j, const C* vector) {
    Vec<C> total = {};
    int64_t i = 0;
    if (p.down.stride_1 == 1)
      for (; i + lanes<C> <= p.d; i += lanes<C>) total += load<C>(Base::element(p.down, id, j, i)) * load<C>(vector + i);
    for (; i < p.d; i += lanes<C>)
      total += load_some<C>(Base::element(p.down, id, j, i), least(lanes<C>, p.d - i), p.down.stride_1) * load<C>(vector + i);
    return sum<C>(total);
  }

  // With the layout and the packing of K, which is this class or one that packs for other products.
  template <class K>
  static void pack(const Problem& p, void* shared, int64_t part, int64_t parts) {
    Arena arena(shared);
    const Common<C> c = common(p, arena);
    K::pack_adapter(p, c, K::adapter(p, arena), 0, part, parts);
  }

  // The adapter of a segment: shared, or packed here.
  template <class K>
  static FA_INLINE auto enter(const Problem& p, const Common<C>& c, Arena& shared, Arena& thread, const Segment& seg) {
    if (!p.own_weights) return K::adapter(p, shared);
    const auto a = K::adapter(p, thread);
    if (!seg.packed) {
      read_biases(p, c, a, seg.adapter);
      K::pack_adapter(p, c, a, seg.adapter, 0, 1);
    }
    return a;
  }
};

}  // namespace fastadapt::FA_TARGET::bottleneck
