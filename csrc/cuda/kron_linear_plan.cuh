// The host side of kron_linear: from arrays to kernel parameters, and which kernels run.
#pragma once
#include "kron_linear.cuh"
#include "kron_plan.cuh"

namespace fastadapt {

struct KronLinearArguments {
  Array x, other, a, s, t, bias;
  float scale;
};

// Contiguous outputs; data is nullptr where a gradient isn't wanted.
struct KronLinearOutputs {
  Array x, a, s, t, bias;
};

// Fills the parameters of both directions, of which a row needs as much shared memory as `bytes` says; an error, or nullptr.
template <class T>
const char* describe(KronLinear& p, const KronLinearArguments& a, int64_t (*bytes)(const KronLinear&), const Device& device) {
  p = KronLinear{};
  p.m = 1;
  for (int i = 0; i < a.x.dims - 1; i++) p.m *= a.x.size[i];
  if (!as_rows<T>(p.x, a.x) || !as_rows<T>(p.other, a.other)) return "more than 8 leading dims that can't be joined";
  KronPacker packer(device, 1);
  p.a = packer.rule(a.a), p.s = packer.factor(a.s, kFactorS), p.t = packer.factor(a.t, kFactorT);
  p.bias = packer.vector(a.bias), p.scale = a.scale;
  const int q = static_cast<int>(a.s.size[2]);
  p.rank = Rank{p.a.terms * q, q, p.s.width};
  p.tile_rows = kron_rows(p.m, bytes(p), p.a.from, device);
  if (p.tile_rows == 0) return "a row needs more shared memory than a block can have";
  packer.run<T>();
  return nullptr;
}

template <class T>
const char* kron_linear_forward(const KronLinearArguments& a, void* y, const Device& device) {
  KronLinear p;
  if (const char* error = describe<T>(p, a, kron_linear_forward_bytes, device)) return error;
  p.out = y;
  const int64_t shared = kron_shared(p.tile_rows, kron_linear_forward_bytes(p));
  launch_over(divide_up(p.m, p.tile_rows), kron_linear_fwd_kernel<T>, shared, device, p);
  return nullptr;
}

template <class T>
const char* kron_linear_backward(const KronLinearArguments& a, const KronLinearOutputs& o, const Device& device) {
  KronLinearGradients q{};
  if (const char* error = describe<T>(q.p, a, kron_linear_backward_bytes, device)) return error;
  const KronLinear& p = q.p;
  q.p.out = o.x.data;
  const int64_t splits = split_count(1, p.m, 2 * p.tile_rows, device);
  KronReducer reducer(device, 1, splits);
  q.a = reducer.add(o.a, kRuleDims, false, {}, p.scale);
  q.s = reducer.add(o.s, kFactorS, true);
  q.t = reducer.add(o.t, kFactorT, true, {}, p.scale);
  q.bias = reducer.add(o.bias, kVectorDims, false);
  q.splits = reducer.count ? splits : 0;
  const int64_t shared = kron_shared(p.tile_rows, kron_linear_backward_bytes(p));
  launch_over(q.splits ? q.splits : divide_up(p.m, p.tile_rows), kron_linear_bwd_kernel<T>, shared, device, q);
  reducer.run<T>();
  return nullptr;
}

}  // namespace fastadapt
