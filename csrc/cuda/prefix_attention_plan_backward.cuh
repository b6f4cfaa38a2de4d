// The host side of prefix_attention's backward: which kernels run.
#pragma once
#include "bank_plan.cuh"
#include "prefix_attention_gradients.cuh"
#include "prefix_attention_plan.cuh"

namespace fastadapt {

// Those of q, k and v are laid out as (b, t, h, e), the others are contiguous; data is nullptr where a gradient isn't wanted.
struct PrefixGradients {
  Array q, k, v, prefix_k, prefix_v, gate;
};

// The gradients of the keys and values of prefixes, through planes, and of the own ones.
template <class T>
void prefix_attention_keys(
    const AttentionBackward& p, const PrefixArguments& arguments, const PrefixGradients& o, const Device& device) {
  const PrefixAttention& a = p.a;
  const bool several = arguments.prefix_k.dims == 4, prefixed = o.prefix_k.data || o.prefix_v.data;
  KeysGradients g{p, o.k.data, o.v.data, Groups{1, a.b, nullptr, nullptr, nullptr}};
  g.each = several && !arguments.ids.data, g.prefixes = several ? arguments.prefix_k.size[0] : 1;
  if (prefixed && arguments.ids.data) {
    g.groups.g = static_cast<int>(g.prefixes);
    Array sequences = arguments.q;
    sequences.dims = 2;
    Ids ids;
    as_ids(ids, arguments.ids, sequences, g.groups.g);
    sort_rows(g.groups, ids, 1, device);
  }
  const int64_t size = g.prefixes * a.h_kv * a.p * a.e, tiles = divide_up(int64_t{a.group} * a.t, kSide);
  const int64_t slabs = Slab<T>::count(a.e);
  if (prefixed) {
    const int64_t blocks = g.prefixes * a.h_kv * divide_up(a.p, kSide) * slabs;
    g.splits = split_count(blocks, (g.each ? 1 : a.b) * tiles, 1, device);  // whichever are wanted: it decides their bits
    g.prefix_blocks = blocks * g.splits * parts_of(o.prefix_k.data, o.prefix_v.data, a.e);
    auto planes = [&](const Array& out) {
      return out.data ? static_cast<float*>(device.allocate(g.splits * size * sizeof(float))) : nullptr;
    };
    g.prefix_k = planes(o.prefix_k), g.prefix_v = planes(o.prefix_v);
  }
  const int64_t own_blocks = a.b * a.h_kv * divide_up(a.t_k, kSide) * slabs * parts_of(o.k.data, o.v.data, a.e);
  launch_over(g.prefix_blocks + own_blocks, prefix_attention_keys_kernel<T>, PairShape<T>::kKeysBytes, device, g);
  if (!prefixed) return;
  const PrefixReduction r{size, g.splits, g.prefix_k, g.prefix_v, a.scale, a.dropout.threshold ? a.dropout.scale : 1.f,
      arguments.prefix_k.kind == Kind::float32, o.prefix_k.data, o.prefix_v.data};
  const dim3 grid(static_cast<unsigned>(divide_up(size, kThreads)), 2);
  launch(prefix_attention_reduce_kernel<T>, grid, kThreads, 0, device.stream, r);
}

// A gradient that isn't wanted costs no product and no pass.
template <class T>
const char* prefix_attention_backward(const PrefixArguments& arguments, const Array& grad_y, const Array& y, const float* lse,
    const PrefixGradients& o, const Device& device) {
  AttentionBackward p{describe<T>(arguments), as_heads<T>(y), as_heads<T>(grad_y), lse, nullptr, 0};
  const PrefixAttention& a = p.a;
  p.inverse = 65536 / (a.group > 0 ? a.group : 1) + 1;  // queries may have no heads
  const int64_t row_blocks = a.b * a.h_kv * divide_up(int64_t{a.group} * a.t, kSide);
  const bool gated = a.gate.data;
  if (o.q.data || o.k.data || o.prefix_k.data || o.gate.data) {  // those of values need none
    p.delta = static_cast<float*>(device.allocate((gated ? 2 : 1) * a.b * a.h * a.t * sizeof(float)));
    launch_over(row_blocks, prefix_attention_delta_kernel<T>, gated ? PairShape<T>::kDeltaBytes : 0, device, p);
  }
  if (o.gate.data) {
    const int is_float = o.gate.kind == Kind::float32;
    launch_over(a.h, prefix_attention_gate_kernel<T>, kWarps * sizeof(float), device, p, o.gate.data, is_float);
  }
  if (o.q.data)
    launch_over(row_blocks * Slab<T>::count(a.e), prefix_attention_queries_kernel<T>, PairShape<T>::kQueriesBytes, device, p,
        static_cast<T*>(o.q.data));
  if (o.k.data || o.v.data || o.prefix_k.data || o.prefix_v.data) prefix_attention_keys<T>(p, arguments, o, device);
  return nullptr;
}

}  // namespace fastadapt
