// The host side of adapter_fusion: from arrays to kernel parameters, and which kernels run.
#pragma once
#include "adapter_fusion.cuh"
#include "plan.cuh"

namespace fastadapt {

struct FusionArguments {
  Array query, keys, values, grad_y, scale;  // data of values is nullptr where they are the keys
  float scale_value;
};

// Contiguous outputs; data is nullptr where a gradient isn't wanted.
struct FusionOutputs {
  Array query, keys, values, scale;
};

template <class T>
bool as_adapters(Adapters& adapters, const Array& array) {
  adapters.stride = array.stride[0];
  const Array first{array.data, array.kind, array.dims - 1, array.size + 1, array.stride + 1};
  const bool joins = as_rows<T>(adapters.rows, first);
  adapters.rows.inner.vector &= array.size[0] == 1 || array.stride[0] * static_cast<int64_t>(sizeof(T)) % 16 == 0;
  return joins;
}

// What a block needs of shared memory, and how: keys that are `read_twice` stay there if two blocks find room.
template <class T>
int64_t fusion_shared(AdapterFusion& p, bool read_twice, const Device& device) {
  const int64_t numbers = kWarps * (1 + 2 * int64_t{p.g}) * static_cast<int64_t>(sizeof(float));
  const int64_t chunks = divide_up(p.d, p.row_threads * Chunk<T>::kSize) * p.g, bytes = numbers + chunks * kThreads * 16;
  p.staged = read_twice && 2 * bytes <= device.shared_limit;
  return p.staged ? bytes : numbers;
}

// An error, or nullptr.
template <class T>
const char* describe(AdapterFusion& p, const FusionArguments& a) {
  p = AdapterFusion{};
  p.m = 1;
  for (int i = 0; i < a.query.dims - 1; i++) p.m *= a.query.size[i];
  p.d = a.query.size[a.query.dims - 1], p.g = static_cast<int>(a.keys.size[0]);
  p.row_threads = p.d > 6 * 32 * Chunk<T>::kSize ? kThreads : 32;
  if (!as_rows<T>(p.query, a.query) || !as_adapters<T>(p.keys, a.keys) ||
      !as_adapters<T>(p.values, a.values.data ? a.values : a.keys))
    return "more than 8 leading dims that can't be joined";
  p.scale = as_vector(a.scale), p.scale_value = a.scale_value;
  return nullptr;
}

inline int64_t fusion_blocks(const AdapterFusion& p) { return divide_up(p.m, kThreads / p.row_threads); }

template <class T>
const char* adapter_fusion_forward(const FusionArguments& a, void* y, float* weights, const Device& device) {
  AdapterFusion p;
  if (const char* error = describe<T>(p, a)) return error;
  const int64_t shared = fusion_shared<T>(p, !a.values.data, device);
  launch_over(fusion_blocks(p), adapter_fusion_fwd_kernel<T>, shared, device, p, static_cast<T*>(y), weights);
  return nullptr;
}

template <class T>
const char* adapter_fusion_backward(
    const FusionArguments& a, const float* weights, const FusionOutputs& o, const Device& device) {
  FusionGradients<T> q{};
  if (const char* error = describe<T>(q.p, a)) return error;
  if (!as_rows<T>(q.grad_y, a.grad_y)) return "more than 8 leading dims that can't be joined";
  q.shares_keys = !a.values.data, q.weights = weights;
  q.query = static_cast<T*>(o.query.data), q.keys = static_cast<T*>(o.keys.data), q.values = static_cast<T*>(o.values.data);
  const int64_t shared = fusion_shared<T>(q.p, q.shares_keys && (q.query || o.scale.data), device);
  const int64_t blocks = fusion_blocks(q.p);
  if (o.scale.data) q.scale = static_cast<float*>(device.allocate(blocks * sizeof(float)));
  if (q.query || q.keys || q.values || q.scale) launch_over(blocks, adapter_fusion_bwd_kernel<T>, shared, device, q);
  if (q.scale)
    launch_over(1, adapter_fusion_bwd_scale_kernel<T>, kWarps * sizeof(float), device, q.scale, blocks, o.scale.data,
        o.scale.kind == Kind::float32);
  return nullptr;
}

}  // namespace fastadapt
