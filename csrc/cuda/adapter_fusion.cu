// adapter_fusion, key CUDA: checks what protects memory and hands tensors to the plan.
#include <tuple>

#include "adapter_fusion_plan.cuh"
#include "call.h"

namespace fastadapt {
namespace {

constexpr const char* kOp = "adapter_fusion";

FusionArguments check(const Tensor& query, const Tensor& keys, const Optional& values, const Optional& scale, double value) {
  const Checker checker{kOp, query, "query"};
  checker.activation();
  FA_CHECK(query.size(-1) > 0, kOp, ": query must have columns");
  auto adapters = [&](const Tensor& t, const char* name) {
    checker.device(t, name);
    bool same = t.scalar_type() == query.scalar_type() && t.dim() == query.dim() + 1 && t.size(0) == keys.size(0);
    for (int64_t i = 0; same && i < query.dim(); i++) same = t.size(i + 1) == query.size(i);
    FA_CHECK(same, kOp, ": ", name, " must be (g, ..., d) in the dtype of query");
    return checker.array(t, name);
  };
  FusionArguments a{};
  a.query = checker.array(query, "query");
  a.keys = adapters(keys, "keys");
  FA_CHECK(keys.size(0) > 0 && keys.size(0) <= kMostAdapters, kOp, ": keys must be of 1 to ", kMostAdapters, " adapters");
  if (values) a.values = adapters(*values, "values");
  a.scale = checker.parameter(scale, "scale", {});
  a.scale_value = static_cast<float>(value);
  return a;
}

std::vector<int64_t> weights_shape(const Tensor& query, const Tensor& keys) {
  std::vector<int64_t> shape(query.sizes().begin(), query.sizes().end());
  shape.back() = keys.size(0);
  return shape;
}

std::tuple<Tensor, Tensor> adapter_fusion_fwd_cuda(
    const Tensor& query, const Tensor& keys, const Optional& values, const Optional& scale, double scale_value) {
  const FusionArguments a = check(query, keys, values, scale, scale_value);
  const std::vector<int64_t> shape = weights_shape(query, keys);
  Tensor y = torch::stable::new_empty(query, query.sizes());
  Tensor weights = torch::stable::new_empty(query, {shape.data(), shape.size()}, ScalarType::Float);
  if (y.numel() == 0) return {y, weights};
  void* out = y.mutable_data_ptr();
  float* of_rows = static_cast<float*>(weights.mutable_data_ptr());
  run(kOp, query,
      [&](auto tag, const Device& device) { return adapter_fusion_forward<decltype(tag)>(a, out, of_rows, device); });
  return {y, weights};
}

using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Four adapter_fusion_bwd_cuda(const Tensor& grad_y, const Tensor& weights, const Tensor& query, const Tensor& keys,
    const Optional& values, const Optional& scale, double scale_value, const std::vector<bool>& output_mask) {
  FusionArguments a = check(query, keys, values, scale, scale_value);
  const Checker checker{kOp, query, "query"};
  a.grad_y = checker.rows(grad_y, "grad_y", query.size(-1));
  checker.device(weights, "weights");
  bool fits = weights.dim() == query.dim() && weights.size(-1) == keys.size(0);
  for (int64_t i = 0; fits && i < query.dim() - 1; i++) fits = weights.size(i) == query.size(i);
  FA_CHECK(fits && weights.scalar_type() == ScalarType::Float && weights.is_contiguous(), kOp,
      ": weights must be (..., g), contiguous and float32");
  const Optional inputs[4] = {query, keys, values, scale};
  FusionOutputs o;
  Array* const arrays[4] = {&o.query, &o.keys, &o.values, &o.scale};
  const std::vector<Tensor> grads = checker.gradients(output_mask, inputs, arrays);
  const float* of_rows = static_cast<const float*>(weights.data_ptr());
  run(kOp, query,
      [&](auto tag, const Device& device) { return adapter_fusion_backward<decltype(tag)>(a, of_rows, o, device); });
  return {grads[0], grads[1], grads[2], grads[3]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastadapt, CUDA, m) {
  m.impl("adapter_fusion_fwd", TORCH_BOX(&adapter_fusion_fwd_cuda));
  m.impl("adapter_fusion_bwd", TORCH_BOX(&adapter_fusion_bwd_cuda));
}

}  // namespace fastadapt
