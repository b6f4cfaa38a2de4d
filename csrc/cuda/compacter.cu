// compacter, key CUDA: checks what protects memory and hands tensors to the plan.
#include <tuple>

#include "call.h"
#include "compacter_plan.cuh"

namespace fastadapt {
namespace {

constexpr const char* kOp = "compacter";

struct CompacterCall {
  const Tensor &x, &down_a, &down_s, &down_t, &up_a, &up_s, &up_t;
  const Optional &down_bias, &up_bias;
  bool add_x;
  const Optional& scale;
  double scale_value;
  int64_t activation;
  const Optional& ids;
};

CompacterArguments check(const CompacterCall& c, const Optional& other, const char* other_name) {
  const Tensor& x = c.x;
  const Checker checker{kOp, x};
  checker.activation();
  const bool bank = c.ids.has_value();
  for (const Tensor* factor : {&c.down_a, &c.down_s, &c.down_t})
    FA_CHECK(factor->dim() == (bank ? 4 : 3), kOp, ": factors must have three dims, or four with adapter_ids");
  const int64_t n = c.down_a.size(-1), q = c.down_s.size(-1), chunk = c.down_t.size(-1), d = x.size(-1);
  const int64_t g = bank ? c.down_a.size(0) : 1, most = int64_t{1} << 30;
  FA_CHECK(n > 0 && n <= 1000 && d % n == 0, kOp, ": n must divide the width of x and be at most 1000, got ", n);
  FA_CHECK(q > 0 && chunk > 0 && q < most / n && chunk < most / n && d < most, kOp,
      ": q and r must be above zero, and n * q, r and d below 2**30");
  CompacterArguments a{};
  a.x = checker.array(x, "x");
  a.ids = checker.adapter_ids(c.ids, g);
  if (other) a.other = checker.rows(*other, other_name, d);
  auto factor = [&](const Tensor& t, const char* name, int64_t i, int64_t j, int64_t k) {
    return bank ? checker.parameter(t, name, {g, i, j, k}) : checker.parameter(t, name, {i, j, k});
  };
  auto vector = [&](const Optional& t, const char* name, int64_t size) {
    return bank ? checker.parameter(t, name, {g, size}) : checker.parameter(t, name, {size});
  };
  a.down_a = factor(c.down_a, "down[0]", n, n, n), a.up_a = factor(c.up_a, "up[0]", n, n, n);
  a.down_s = factor(c.down_s, "down[1]", n, d / n, q), a.up_s = factor(c.up_s, "up[1]", n, chunk, q);
  a.down_t = factor(c.down_t, "down[2]", n, q, chunk), a.up_t = factor(c.up_t, "up[2]", n, q, d / n);
  a.down_bias = vector(c.down_bias, "down_bias", n * chunk), a.up_bias = vector(c.up_bias, "up_bias", d);
  a.scale = checker.parameter(c.scale, "scale", {});
  a.scale_value = static_cast<float>(c.scale_value);
  a.activation = static_cast<int>(c.activation), a.add_x = c.add_x;
  return a;
}

Tensor compacter_fwd_cuda(const Tensor& x, const Tensor& down_a, const Tensor& down_s, const Tensor& down_t, const Tensor& up_a,
    const Tensor& up_s, const Tensor& up_t, const Optional& down_bias, const Optional& up_bias, const Optional& residual,
    bool add_x, const Optional& scale, double scale_value, int64_t activation, const Optional& adapter_ids) {
  const CompacterArguments a = check(CompacterCall{x, down_a, down_s, down_t, up_a, up_s, up_t, down_bias, up_bias, add_x,
                                         scale, scale_value, activation, adapter_ids},
      residual, "residual");
  Tensor y = torch::stable::new_empty(x, x.sizes());
  if (y.numel() == 0) return y;
  void* out = y.mutable_data_ptr();
  run(kOp, x, [&](auto tag, const Device& device) { return compacter_forward<decltype(tag)>(a, out, device); });
  return y;
}

using Ten = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Ten compacter_bwd_cuda(const Tensor& grad_y, const Tensor& x, const Tensor& down_a, const Tensor& down_s, const Tensor& down_t,
    const Tensor& up_a, const Tensor& up_s, const Tensor& up_t, const Optional& down_bias, const Optional& up_bias, bool add_x,
    const Optional& scale, double scale_value, int64_t activation, const Optional& adapter_ids,
    const std::vector<bool>& output_mask) {
  const CompacterArguments a = check(CompacterCall{x, down_a, down_s, down_t, up_a, up_s, up_t, down_bias, up_bias, add_x,
                                         scale, scale_value, activation, adapter_ids},
      grad_y, "grad_y");
  const Optional inputs[10] = {x, down_a, down_s, down_t, up_a, up_s, up_t, down_bias, up_bias, scale};
  CompacterOutputs o;
  Array* const arrays[10] = {&o.x, &o.down_a, &o.down_s, &o.down_t, &o.up_a, &o.up_s, &o.up_t, &o.down_bias, &o.up_bias,
      &o.scale};
  const std::vector<Tensor> grads = Checker{kOp, x}.gradients(output_mask, inputs, arrays);
  run(kOp, x, [&](auto tag, const Device& device) { return compacter_backward<decltype(tag)>(a, o, device); });
  return {grads[0], grads[1], grads[2], grads[3], grads[4], grads[5], grads[6], grads[7], grads[8], grads[9]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastadapt, CUDA, m) {
  m.impl("compacter_fwd", TORCH_BOX(&compacter_fwd_cuda));
  m.impl("compacter_bwd", TORCH_BOX(&compacter_bwd_cuda));
}

}  // namespace fastadapt
