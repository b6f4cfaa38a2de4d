// What every row block of the bottleneck adapter shares: small parameters in the compute type, and packed weights.
#pragma once
#include "activation.h"
#include "bottleneck_args.h"
#include "narrow.h"

namespace fastadapt::FA_TARGET::bottleneck {

using namespace fastadapt::bottleneck;

template <class C>
struct Common {
  C *scale, *norm_weight, *norm_bias, *skip, *hidden_skip;  // null where the call has none; padded with zeros
};

// One adapter, with the scale folded into the up projection and the norm's weight and bias into the down projection:
// z = xhat @ (Wd * norm_weight).T + (bd + Wd @ norm_bias).
template <class C>
struct Adapter {
  C *down, *up;            // packed as d x r (see `project`) and r x d
  C *down_bias, *up_bias;  // (r,), (d,)
  C *up_back, *down_back;  // backward: packed as d x r and r x d
  C* norm_sum;             // backward under a norm: Wd @ norm_weight
};

// Rows that a thread works on at once: enough to reuse a panel, few enough for the block to stay in the second-level cache.
constexpr int64_t max_rows = 128;

// Columns that a thread works on at once where threads share the columns.
constexpr int64_t strip_width = 256;

template <class C>
FA_INLINE int64_t block_rows(const Problem& p) {
  const int64_t bytes = (p.backward ? 2 : 1) * p.d * static_cast<int64_t>(sizeof(C));
  return least(96, most(24, (int64_t{768} << 10) / most(1, bytes) / 24 * 24));
}

template <class C>
struct Scratch {
  C *x, *grad_y;                // rows in the compute type, where they can't be read in place
  C *z, *grad_a, *a;
  C *rstd, *mean, *mean_x;      // one a row, for the norm
};

template <class C>
struct Partial {
  C *up, *down;                   // r x d: a.T @ G and grad_z.T @ xhat, rows product_stride apart; by columns they never lie here
  C *sum_g, *skip;                // (d,)
  C *down_bias, *hidden_skip;     // (r,)
};

FA_INLINE bool needs_hidden_grad(const Problem& p) {
  return p.wants[grad_x] || p.wants[grad_down] || p.wants[grad_down_bias] || p.wants[grad_norm_weight] || p.wants[grad_norm_bias];
}
FA_INLINE bool needs_up_product(const Problem& p) { return p.wants[grad_up] || p.wants[grad_scale]; }
FA_INLINE bool needs_down_product(const Problem& p) { return p.wants[grad_down] || p.wants[grad_norm_weight]; }
FA_INLINE bool needs_grad_a(const Problem& p) { return needs_hidden_grad(p) || p.wants[grad_hidden_skip]; }
FA_INLINE bool needs_hidden(const Problem& p) { return !p.backward || needs_grad_a(p) || needs_up_product(p); }

template <class T, class W>
struct Types {
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
    const int64_t to_hidden = is_narrow(r) ? narrow_size<C>(d) : packed_size<C>(d, r);
    if (needs_hidden(p)) a.down = arena.take<C>(to_hidden);
    if (!p.backward) a.up = arena.take<C>(packed_size<C>(r, d));
    if (p.backward && needs_grad_a(p)) a.up_back = arena.take<C>(to_hidden);
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
    Sizes s;
    Arena shared(nullptr), thread(nullptr), part(nullptr);
    common(p, shared);
    adapter(p, p.own_weights ? thread : shared);
    scratch(p, thread);
    partial(p, part);
    s.shared = shared.used();
    s.thread = thread.used();
    s.partial = p.backward ? part.used() : 0;
    return s;
  }

  // Elements [i, i + count) of a parameter.
  static FA_INLINE Vec<C> parameter_at(const Parameter& q, int64_t adapter, int64_t i, int64_t count) {
    const int64_t at = adapter * q.stride_g + i * q.stride;
    if (q.like_x) return load_some<C>(static_cast<const T*>(q.data) + at, count, q.stride);
    if constexpr (sizeof(C) == sizeof(float)) return load_some<C>(static_cast<const float*>(q.data) + at, count, q.stride);
    return Vec<C>{};
  }

  // out[0, n) = q, and zeros up to `room`.
  static void read(const Parameter& q, int64_t adapter, int64_t n, C* out, int64_t room) {
    auto copy = [&](auto* data) FA_FORCED {
      data += adapter * q.stride_g;
      int64_t i = 0;
      if (q.stride == 1)
        for (; i + lanes<C> <= n; i += lanes<C>) store(out + i, load<C>(data + i));
      for (; i < n; ++i) out[i] = load_some<C>(data + i * q.stride, 1)[0];
    };
    if (q.like_x)
      copy(static_cast<const T*>(q.data));
    else if constexpr (sizeof(C) == sizeof(float))
      copy(static_cast<const float*>(q.data));
    for (int64_t i = n; i < room; ++i) out[i] = 0;
  }

  static void read_parameters(const Problem& p, void* shared) {
    Arena arena(shared);
    const Common<C> c = common(p, arena);
    const int64_t d = padded<C>(p.d) + panel_width<C>;
    if (c.scale && p.scale.data) read(p.scale, 0, p.d, c.scale, d);
    if (c.scale && !p.scale.data)
      for (int64_t i = 0; i < d; ++i) c.scale[i] = i < p.d ? static_cast<C>(p.scale_value) : 0;
    if (c.norm_weight) read(p.norm_weight, 0, p.d, c.norm_weight, d);
    if (c.norm_bias) read(p.norm_bias, 0, p.d, c.norm_bias, d);
    if (c.skip) read(p.skip, 0, p.d, c.skip, d);
    if (c.hidden_skip) read(p.hidden_skip, 0, p.r, c.hidden_skip, padded<C>(p.r));
    if (!p.own_weights) read_biases(p, c, adapter(p, arena), 0);
  }

  static void read_biases(const Problem& p, const Common<C>& c, const Adapter<C>& a, int64_t id) {
    const int64_t r = padded<C>(p.r), d = padded<C>(p.d) + panel_width<C>;
    read(p.down_bias, id, p.down_bias.data ? p.r : 0, a.down_bias, r);
    read(p.up_bias, id, p.up_bias.data ? p.d : 0, a.up_bias, d);
    if (c.scale)
      for (int64_t i = 0; i < p.d; ++i) a.up_bias[i] *= c.scale[i];
  }

  static FA_INLINE const W* element(const Weight& w, int64_t id, int64_t i, int64_t j) {
    return static_cast<const W*>(w.data) + id * w.stride_g + i * w.stride_0 + j * w.stride_1;
  }

  // Packs the share `part` of `parts` of one matrix.
  static FA_INLINE void pack_share(const Source<C, W>& source, C* packed, int64_t part, int64_t parts) {
    if (!packed) return;
    const int64_t units = pack_units<C>(source.k, source.n);
    fastadapt::FA_TARGET::pack(source, packed, units * part / parts, units * (part + 1) / parts);
  }

  // The same for a right operand of `project`.
  static FA_INLINE void pack_projection(const Source<C, W>& source, C* packed, int64_t part, int64_t parts) {
    if (!is_narrow(source.n)) return pack_share(source, packed, part, parts);
    if (packed && part == parts - 1) pack_narrow(source, packed);
  }

  // Rows of d columns to r hidden values.
  static FA_INLINE void project(const Problem& p, int64_t rows, const C* a, int64_t lda, const C* packed, const C* start, C* out) {
    if (is_narrow(p.r))
      gemm_narrow(rows, p.d, a, lda, packed, start, out, padded<C>(p.r));
    else
      gemm(rows, p.d, p.r, a, lda, packed, start, false, out, padded<C>(p.r));
  }

  static void pack_adapter(const Problem& p, const Common<C>& c, const Adapter<C>& a, int64_t id, int64_t part, int64_t parts) {
    const W *down = element(p.down, id, 0, 0), *up = element(p.up, id, 0, 0);
    pack_projection({down, p.down.stride_1, p.down.stride_0, p.d, p.r, c.norm_weight, nullptr}, a.down, part, parts);
    pack_share({up, p.up.stride_1, p.up.stride_0, p.r, p.d, nullptr, c.scale}, a.up, part, parts);
    pack_projection({up, p.up.stride_0, p.up.stride_1, p.d, p.r, c.scale, nullptr}, a.up_back, part, parts);
    pack_share({down, p.down.stride_0, p.down.stride_1, p.r, p.d, nullptr, c.norm_weight}, a.down_back, part, parts);
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
      for (; i + lanes<C> <= p.d; i += lanes<C>) total += load<C>(element(p.down, id, j, i)) * load<C>(vector + i);
    for (; i < p.d; i += lanes<C>)
      total += load_some<C>(element(p.down, id, j, i), least(lanes<C>, p.d - i), p.down.stride_1) * load<C>(vector + i);
    return sum<C>(total);
  }

  static void pack(const Problem& p, void* shared, int64_t part, int64_t parts) {
    Arena arena(shared);
    const Common<C> c = common(p, arena);
    pack_adapter(p, c, adapter(p, arena), 0, part, parts);
  }

  // The adapter of a segment: shared, or packed here.
  static FA_INLINE Adapter<C> enter(const Problem& p, const Common<C>& c, Arena& shared, Arena& thread, const Segment& seg) {
    if (!p.own_weights) return adapter(p, shared);
    const Adapter<C> a = adapter(p, thread);
    if (!seg.packed) {
      read_biases(p, c, a, seg.adapter);
      pack_adapter(p, c, a, seg.adapter, 0, 1);
    }
    return a;
  }
};

}  // namespace fastadapt::FA_TARGET::bottleneck
