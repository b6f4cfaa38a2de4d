// bottleneck, key CUDA: checks what protects memory and hands tensors to the plan.
#include <tuple>

#include "bottleneck_plan_backward.cuh"
#include "call.h"

namespace fastadapt {
namespace {

constexpr const char* kOp = "bottleneck";

struct Call {
  const Tensor &x, &down_weight, &up_weight;
  const Optional &down_bias, &up_bias;
  bool add_x;
  const Optional& scale;
  double scale_value;
  int64_t activation;
  const Optional &norm_weight, &norm_bias;
  double norm_eps;
  const Optional &skip, &hidden_skip, &ids;
};

Arguments check(const Call& c, const Optional& other, const char* other_name) {
  const Tensor& x = c.x;
  const Checker checker{kOp, x};
  checker.activation();
  const bool bank = c.ids.has_value();
  FA_CHECK(c.down_weight.dim() == (bank ? 3 : 2), kOp, ": down_weight must be (r, d), or (g, r, d) with adapter_ids");
  const int64_t d = x.size(-1), r = c.down_weight.size(-2), g = bank ? c.down_weight.size(0) : 1;
  FA_CHECK(r <= kMaxRank, kOp, ": r must be at most ", kMaxRank, " in the native CUDA kernel, got ", r);
  FA_CHECK(d < (int64_t{1} << 30), kOp, ": d must be below 2**30, got ", d);
  FA_CHECK(c.up_weight.scalar_type() == c.down_weight.scalar_type(), kOp, ": up_weight must have the dtype of down_weight");
  Arguments a{};
  a.x = checker.array(x, "x");
  a.ids = checker.adapter_ids(c.ids, g);
  if (other) a.other = checker.rows(*other, other_name, d);
  if (bank) {
    a.down_weight = checker.parameter(c.down_weight, "down_weight", {g, r, d});
    a.up_weight = checker.parameter(c.up_weight, "up_weight", {g, d, r});
    a.down_bias = checker.parameter(c.down_bias, "down_bias", {g, r});
    a.up_bias = checker.parameter(c.up_bias, "up_bias", {g, d});
  } else {
    a.down_weight = checker.parameter(c.down_weight, "down_weight", {r, d});
    a.up_weight = checker.parameter(c.up_weight, "up_weight", {d, r});
    a.down_bias = checker.parameter(c.down_bias, "down_bias", {r});
    a.up_bias = checker.parameter(c.up_bias, "up_bias", {d});
  }
  if (c.scale && c.scale->dim() == 0) a.scale = checker.parameter(c.scale, "scale", {});
  else a.scale = checker.parameter(c.scale, "scale", {d});
  a.norm_weight = checker.parameter(c.norm_weight, "norm_weight", {d});
  a.norm_bias = checker.parameter(c.norm_bias, "norm_bias", {d});
  FA_CHECK(c.norm_weight || !c.norm_bias, kOp, ": norm_weight must be given with norm_bias");
  a.skip = checker.parameter(c.skip, "skip_weight", {d});
  a.hidden_skip = checker.parameter(c.hidden_skip, "hidden_skip_weight", {r});
  a.scale_value = static_cast<float>(c.scale_value), a.norm_eps = static_cast<float>(c.norm_eps);
  a.activation = static_cast<int>(c.activation), a.add_x = c.add_x;
  return a;
}

Tensor bottleneck_fwd_cuda(const Tensor& x, const Tensor& down_weight, const Tensor& up_weight, const Optional& down_bias,
    const Optional& up_bias, const Optional& residual, bool add_x, const Optional& scale, double scale_value,
    int64_t activation, const Optional& norm_weight, const Optional& norm_bias, double norm_eps, const Optional& skip_weight,
    const Optional& hidden_skip_weight, const Optional& adapter_ids) {
  const Call call{x, down_weight, up_weight, down_bias, up_bias, add_x, scale, scale_value, activation, norm_weight, norm_bias,
      norm_eps, skip_weight, hidden_skip_weight, adapter_ids};
  const Arguments a = check(call, residual, "residual");
  Tensor y = torch::stable::new_empty(x, x.sizes());
  if (y.numel() == 0) return y;
  void* out = y.mutable_data_ptr();
  run(kOp, x, [&](auto tag, const Device& device) { return bottleneck_forward<decltype(tag)>(a, out, device); });
  return y;
}

using Ten = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Ten bottleneck_bwd_cuda(const Tensor& grad_y, const Tensor& x, const Tensor& down_weight, const Tensor& up_weight,
    const Optional& down_bias, const Optional& up_bias, bool add_x, const Optional& scale, double scale_value,
    int64_t activation, const Optional& norm_weight, const Optional& norm_bias, double norm_eps, const Optional& skip_weight,
    const Optional& hidden_skip_weight, const Optional& adapter_ids, const std::vector<bool>& output_mask) {
  const Call call{x, down_weight, up_weight, down_bias, up_bias, add_x, scale, scale_value, activation, norm_weight, norm_bias,
      norm_eps, skip_weight, hidden_skip_weight, adapter_ids};
  const Arguments a = check(call, grad_y, "grad_y");
  const Optional inputs[10] = {
      x, down_weight, up_weight, down_bias, up_bias, scale, norm_weight, norm_bias, skip_weight, hidden_skip_weight};
  Outputs outputs;
  Array* const arrays[10] = {&outputs.x, &outputs.down_weight, &outputs.up_weight, &outputs.down_bias, &outputs.up_bias,
      &outputs.scale, &outputs.norm_weight, &outputs.norm_bias, &outputs.skip, &outputs.hidden_skip};
  const std::vector<Tensor> grads = Checker{kOp, x}.gradients(output_mask, inputs, arrays);
  run(kOp, x, [&](auto tag, const Device& device) { return bottleneck_backward<decltype(tag)>(a, outputs, device); });
  return {grads[0], grads[1], grads[2], grads[3], grads[4], grads[5], grads[6], grads[7], grads[8], grads[9]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastadapt, CUDA, m) {
  m.impl("bottleneck_fwd", TORCH_BOX(&bottleneck_fwd_cuda));
  m.impl("bottleneck_bwd", TORCH_BOX(&bottleneck_bwd_cuda));
}

}  // namespace fastadapt
