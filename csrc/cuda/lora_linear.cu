// lora_linear, key CUDA: checks what protects memory and hands tensors to the plan.
#include <tuple>

#include "call.h"
#include "lora_linear_plan.cuh"

namespace fastadapt {
namespace {

constexpr const char* kOp = "lora_linear";

struct LoraCall {
  const Tensor &x, &weight;
  const Optional& bias;
  const Tensor &lora_a, &lora_b;
  const Optional &diagonal, &gain;
  double scale, dropout_p;
  const Optional &seed, &ids;
};

LoraArguments check(const LoraCall& c) {
  const Checker checker{kOp, c.x};
  checker.activation();
  const bool bank = c.ids.has_value();
  FA_CHECK(c.weight.dim() == 2 && c.lora_a.dim() == (bank ? 3 : 2), kOp,
      ": weight must be (n, k) and lora_a (r, k), or (g, r, k) with adapter_ids");
  const int64_t n = c.weight.size(0), k = c.x.size(-1), r = c.lora_a.size(-2), g = bank ? c.lora_a.size(0) : 1;
  FA_CHECK(n < (int64_t{1} << 30) && k < (int64_t{1} << 30), kOp, ": n and k must be below 2**30, got ", n, " and ", k);
  FA_CHECK(r >= 1 && r < (int64_t{1} << 30), kOp, ": r must be at least 1 and below 2**30, got ", r);
  FA_CHECK(!bank || (r + 7) * g < (int64_t{1} << 30), kOp, ": a bank has at most 2**30 ranks, got ", g, " adapters of ", r);
  FA_CHECK(c.weight.scalar_type() == c.x.scalar_type(), kOp, ": weight must have the dtype of x");
  LoraArguments a{};
  a.x = checker.array(c.x, "x");
  a.weight = checker.parameter(c.weight, "weight", {n, k});
  a.bias = checker.parameter(c.bias, "bias", {n});
  a.ids = checker.adapter_ids(c.ids, g);
  if (bank) {
    a.lora_a = checker.parameter(c.lora_a, "lora_a", {g, r, k});
    a.lora_b = checker.parameter(c.lora_b, "lora_b", {g, n, r});
    a.diagonal = checker.parameter(c.diagonal, "diagonal", {g, r});
  } else {
    a.lora_a = checker.parameter(c.lora_a, "lora_a", {r, k});
    a.lora_b = checker.parameter(c.lora_b, "lora_b", {n, r});
    a.diagonal = checker.parameter(c.diagonal, "diagonal", {r});
  }
  a.gain = checker.parameter(c.gain, "gain", {n});
  a.scale = static_cast<float>(c.scale), a.dropout_p = c.dropout_p;
  a.seed = checker.seed(c.seed, c.dropout_p);
  return a;
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_fwd_cuda(const Tensor& x, const Tensor& weight, const Optional& bias,
    const Tensor& lora_a, const Tensor& lora_b, const Optional& diagonal, const Optional& gain, double scale, double dropout_p,
    const Optional& seed, const Optional& adapter_ids, bool keep_z) {
  LoraArguments a = check(LoraCall{x, weight, bias, lora_a, lora_b, diagonal, gain, scale, dropout_p, seed, adapter_ids});
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = weight.size(0);
  int64_t m = 1;
  for (int64_t i = 0; i < x.dim() - 1; i++) m *= x.size(i);
  const int64_t shape_u[] = {m, lora_a.size(-2)};
  Tensor y = torch::stable::new_empty(x, {shape.data(), shape.size()});
  Tensor u = torch::stable::new_empty(x, {shape_u, 2}, ScalarType::Float);
  const int64_t none = 0;
  Tensor z = keep_z ? torch::stable::new_empty(x, {shape.data(), shape.size()}) : torch::stable::new_empty(x, {&none, 1});
  if (m == 0) return {y, u, z};
  a.u = Checker{kOp, x}.array(u, "u");
  if (keep_z) a.z = Checker{kOp, x}.array(z, "z");
  void* out = y.mutable_data_ptr();
  run(kOp, x, [&](auto tag, const Device& device) { return lora_linear_forward<decltype(tag)>(a, out, device); });
  return {y, u, z};
}

using Seven = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Seven lora_linear_bwd_cuda(const Tensor& grad_y, const Tensor& x, const Tensor& u, const Optional& z, const Tensor& weight,
    const Optional& bias, const Tensor& lora_a, const Tensor& lora_b, const Optional& diagonal, const Optional& gain,
    double scale, double dropout_p, const Optional& seed, const Optional& adapter_ids, const std::vector<bool>& output_mask) {
  LoraArguments a = check(LoraCall{x, weight, bias, lora_a, lora_b, diagonal, gain, scale, dropout_p, seed, adapter_ids});
  const Checker checker{kOp, x};
  const int64_t n = weight.size(0), r = lora_a.size(-2);
  a.grad_y = checker.rows(grad_y, "grad_y", n);
  const int64_t m = n > 0 ? grad_y.numel() / n : 0;
  checker.device(u, "u");
  FA_CHECK(n == 0 || (u.dim() == 2 && u.size(0) == m && u.size(1) == r && u.scalar_type() == ScalarType::Float), kOp,
      ": u must be (m, r) in float32");
  a.u = checker.array(u, "u");
  if (z) a.z = checker.rows(*z, "z", n);
  LoraGradients outputs;
  const Optional inputs[7] = {x, weight, bias, lora_a, lora_b, diagonal, gain};
  Array* const arrays[7] = {&outputs.x, &outputs.weight, &outputs.bias, &outputs.lora_a, &outputs.lora_b, &outputs.diagonal,
      &outputs.gain};
  const std::vector<Tensor> grads = checker.gradients(output_mask, inputs, arrays);
  FA_CHECK(!outputs.gain.data || z, kOp, ": the gradient of gain needs z");
  run(kOp, x, [&](auto tag, const Device& device) { return lora_linear_backward<decltype(tag)>(a, outputs, device); });
  return {grads[0], grads[1], grads[2], grads[3], grads[4], grads[5], grads[6]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastadapt, CUDA, m) {
  m.impl("lora_linear_fwd", TORCH_BOX(&lora_linear_fwd_cuda));
  m.impl("lora_linear_bwd", TORCH_BOX(&lora_linear_bwd_cuda));
}

}  // namespace fastadapt
