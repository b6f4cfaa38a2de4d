// kron_linear, key CUDA: checks what protects memory and hands tensors to the plan.
#include <tuple>

#include "call.h"
#include "kron_linear_plan.cuh"

namespace fastadapt {
namespace {

constexpr const char* kOp = "kron_linear";

// `other` has the width of y.
KronLinearArguments check(const Tensor& x, const Tensor& factor_a, const Tensor& s, const Tensor& t, const Optional& bias,
    const Optional& other, const char* other_name, double scale) {
  const Checker checker{kOp, x};
  checker.activation();
  FA_CHECK(factor_a.dim() == 3 && s.dim() == 3 && t.dim() == 3, kOp, ": a, s and t must have three dims");
  const int64_t terms = factor_a.size(0), a_in = factor_a.size(1), a_out = factor_a.size(2);
  const int64_t b_in = s.size(1), q = s.size(2), b_out = t.size(2), most = int64_t{1} << 30;
  for (int64_t size : {terms, a_in, a_out, b_in, q, b_out})
    FA_CHECK(size > 0 && size < most, kOp, ": no size of a factor may be zero, or 2**30 or more");
  FA_CHECK(a_in * b_in == x.size(-1), kOp, ": a and s must match the width of x");
  FA_CHECK(x.size(-1) < most && a_out * b_out < most && terms * q < most && a_in * a_out < most / terms, kOp,
      ": the widths of x and y, terms * q and the size of a must be below 2**30");
  KronLinearArguments a{};
  a.x = checker.array(x, "x");
  if (other) a.other = checker.rows(*other, other_name, a_out * b_out);
  a.a = checker.parameter(factor_a, "a", {terms, a_in, a_out});
  a.s = checker.parameter(s, "s", {terms, b_in, q});
  a.t = checker.parameter(t, "t", {terms, q, b_out});
  a.bias = checker.parameter(bias, "bias", {a_out * b_out});
  a.scale = static_cast<float>(scale);
  return a;
}

Tensor kron_linear_fwd_cuda(const Tensor& x, const Tensor& factor_a, const Tensor& s, const Tensor& t, const Optional& bias,
    const Optional& residual, double scale) {
  const KronLinearArguments a = check(x, factor_a, s, t, bias, residual, "residual", scale);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = factor_a.size(2) * t.size(2);
  Tensor y = torch::stable::new_empty(x, {shape.data(), shape.size()});
  if (y.numel() == 0) return y;
  void* out = y.mutable_data_ptr();
  run(kOp, x, [&](auto tag, const Device& device) { return kron_linear_forward<decltype(tag)>(a, out, device); });
  return y;
}

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Five kron_linear_bwd_cuda(const Tensor& grad_y, const Tensor& x, const Tensor& factor_a, const Tensor& s, const Tensor& t,
    const Optional& bias, double scale, const std::vector<bool>& output_mask) {
  const KronLinearArguments a = check(x, factor_a, s, t, bias, grad_y, "grad_y", scale);
  KronLinearOutputs outputs;
  const Optional inputs[5] = {x, factor_a, s, t, bias};
  Array* const arrays[5] = {&outputs.x, &outputs.a, &outputs.s, &outputs.t, &outputs.bias};
  const std::vector<Tensor> grads = Checker{kOp, x}.gradients(output_mask, inputs, arrays);
  run(kOp, x, [&](auto tag, const Device& device) { return kron_linear_backward<decltype(tag)>(a, outputs, device); });
  return {grads[0], grads[1], grads[2], grads[3], grads[4]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastadapt, CUDA, m) {
  m.impl("kron_linear_fwd", TORCH_BOX(&kron_linear_fwd_cuda));
  m.impl("kron_linear_bwd", TORCH_BOX(&kron_linear_bwd_cuda));
}

}  // namespace fastadapt
