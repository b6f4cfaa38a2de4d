// The host side of compacter: from arrays to kernel parameters, and which kernels run.
#pragma once
#include "compacter_backward.cuh"
#include "kron_plan.cuh"

namespace fastadapt {

struct CompacterArguments {
  Array x, other, down_a, down_s, down_t, up_a, up_s, up_t, down_bias, up_bias, scale, ids;
  float scale_value;
  int activation, add_x;
};

// Contiguous outputs; data is nullptr where a gradient isn't wanted.
struct CompacterOutputs {
  Array x, down_a, down_s, down_t, up_a, up_s, up_t, down_bias, up_bias, scale;
};

// Fills the parameters of both directions, of which a row needs as much shared memory as `bytes` says; an error, or nullptr.
template <class T>
const char* describe(Compacter& p, const CompacterArguments& a, int64_t (*bytes)(const Compacter&), const Device& device) {
  p = Compacter{};
  p.m = 1;
  for (int i = 0; i < a.x.dims - 1; i++) p.m *= a.x.size[i];
  if (!as_rows<T>(p.x, a.x) || !as_rows<T>(p.other, a.other)) return "more than 8 leading dims that can't be joined";
  p.scale = as_vector(a.scale), p.scale_value = a.scale_value, p.activation = a.activation, p.add_x = a.add_x;
  p.groups.g = a.ids.data ? static_cast<int>(a.down_a.size[0]) : 1;
  p.groups.m = p.m;
  KronPacker packer(device, p.groups.g);
  p.down_a = packer.rule(a.down_a), p.up_a = packer.rule(a.up_a);
  p.down_s = packer.factor(a.down_s, kFactorS), p.up_t = packer.factor(a.up_t, kFactorT);
  p.down_t = packer.factor(a.down_t, in_order(kFactorT)), p.up_s = packer.factor(a.up_s, in_order(kFactorS));
  p.down_bias = packer.vector(a.down_bias), p.up_bias = packer.vector(a.up_bias);
  p.n = p.down_a.terms, p.r = p.n * p.down_t.features;
  const int q = static_cast<int>(a.down_s.size[a.down_s.dims - 1]);
  p.rank = Rank{p.n * q, q, p.down_s.width};
  p.tile_rows = kron_rows(p.m, bytes(p), p.n, device);
  if (p.tile_rows == 0) return "a row needs more shared memory than a block can have";
  Ids ids;
  if (!as_ids(ids, a.ids, a.x, p.groups.g)) return "adapter_ids has more than 8 dims that can't be joined";
  if (a.ids.data) sort_rows(p.groups, ids, p.tile_rows, device);
  packer.run<T>();
  return nullptr;
}

// Without a bank the number of tiles is known; in a bank each adapter, and each kind of row without one, can add one.
inline int64_t tile_count(const Compacter& p) {
  return divide_up(p.m, p.tile_rows) + (p.groups.order ? p.groups.g + 2 : 0);
}

template <class T>
const char* compacter_forward(const CompacterArguments& a, void* y, const Device& device) {
  Compacter p;
  if (const char* error = describe<T>(p, a, compacter_forward_bytes, device)) return error;
  p.out = y;
  launch_over(tile_count(p), compacter_fwd_kernel<T>, kron_shared(p.tile_rows, compacter_forward_bytes(p)), device, p);
  return nullptr;
}

template <class T>
const char* compacter_backward(const CompacterArguments& a, const CompacterOutputs& o, const Device& device) {
  CompacterGradients q{};
  if (const char* error = describe<T>(q.p, a, compacter_backward_bytes, device)) return error;
  const Compacter& p = q.p;
  q.p.out = o.x.data;
  const int64_t splits = split_count(p.groups.g, p.m, 2 * p.tile_rows, device);
  KronReducer reducer(device, p.groups.g, splits);
  q.down_a = reducer.add(o.down_a, kRuleDims, false), q.down_s = reducer.add(o.down_s, kFactorS, true);
  q.down_t = reducer.add(o.down_t, in_order(kFactorT), true), q.up_s = reducer.add(o.up_s, in_order(kFactorS), true);
  q.up_a = reducer.add(o.up_a, kRuleDims, false, p.scale, p.scale_value);
  q.up_t = reducer.add(o.up_t, kFactorT, true, p.scale, p.scale_value);
  q.down_bias = reducer.add(o.down_bias, kVectorDims, false);
  q.up_bias = reducer.add(o.up_bias, kVectorDims, false, p.scale, p.scale_value);
  q.scale = reducer.add_total(o.scale);
  q.splits = reducer.count ? splits : 0;
  const int64_t adapters = p.groups.g + (p.groups.order ? 2 : 0);
  launch_over(reducer.count ? adapters * splits : tile_count(p), compacter_bwd_kernel<T>,
      kron_shared(p.tile_rows, compacter_backward_bytes(p)), device, q);
  reducer.run<T>();
  return nullptr;
}

}  // namespace fastadapt
