// bottleneck, key CUDA: checks what protects memory and hands tensors to the plan.
#include <deque>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include "bottleneck_plan_backward.cuh"
#include "stream.h"

namespace fastadapt {
namespace {

using Optional = std::optional<Tensor>;
constexpr const char* kOp = "bottleneck";

Kind kind_of_scalar(ScalarType type, const char* name) {
  switch (type) {
    case ScalarType::Float: return Kind::float32;
    case ScalarType::Half: return Kind::float16;
    case ScalarType::BFloat16: return Kind::bfloat16;
    case ScalarType::Long: return Kind::int64;
    case ScalarType::Int: return Kind::int32;
    case ScalarType::Short: return Kind::int16;
    case ScalarType::Char: return Kind::int8;
    case ScalarType::Byte: return Kind::uint8;
    default: FA_CHECK(false, kOp, ": ", name, " has an unsupported dtype, got ", torch::headeronly::toString(type));
  }
}

Array as_array(const Tensor& t, const char* name) {
  return Array{
      t.data_ptr(), kind_of_scalar(t.scalar_type(), name), static_cast<int>(t.dim()), t.sizes().data(), t.strides().data()};
}

// Checks a parameter: on the device of x, in the dtype of x or float32, of the given shape.
struct Checker {
  const Tensor& x;

  void device(const Tensor& t, const char* name) const {
    FA_CHECK(t.is_cuda() && t.get_device_index() == x.get_device_index(), kOp, ": ", name, " must be on the device of x");
  }
  void shape(const Tensor& t, const char* name, std::initializer_list<int64_t> sizes) const {
    bool same = t.dim() == static_cast<int64_t>(sizes.size());
    int64_t i = 0;
    for (int64_t size : sizes) same = same && t.size(i++) == size;
    FA_CHECK(same, kOp, ": ", name, " has the wrong shape");
  }
  void like_x(const Tensor& t, const char* name) const {
    device(t, name);
    FA_CHECK(t.scalar_type() == x.scalar_type() && t.sizes().equals(x.sizes()), kOp, ": ", name,
        " must have the shape and dtype of x");
  }
  Array parameter(const Optional& t, const char* name, std::initializer_list<int64_t> sizes) const {
    if (!t) return Array{};
    device(*t, name);
    shape(*t, name, sizes);
    FA_CHECK(t->scalar_type() == x.scalar_type() || t->scalar_type() == ScalarType::Float, kOp, ": ", name,
        " must have the dtype of x or float32");
    return as_array(*t, name);
  }
};

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
  const Checker checker{x};
  FA_CHECK(x.is_cuda(), kOp, ": x must be on a CUDA device");
  const ScalarType type = x.scalar_type();
  FA_CHECK(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16, kOp,
      ": x must be float16, bfloat16 or float32 on CUDA, got ", torch::headeronly::toString(type));
  FA_CHECK(x.dim() >= 1, kOp, ": x must be (..., d), got a 0-d tensor");
  const bool bank = c.ids.has_value();
  FA_CHECK(c.down_weight.dim() == (bank ? 3 : 2), kOp, ": down_weight must be (r, d), or (g, r, d) with adapter_ids");
  const int64_t d = x.size(-1), r = c.down_weight.size(-2), g = bank ? c.down_weight.size(0) : 1;
  FA_CHECK(r <= kMaxRank, kOp, ": r must be at most ", kMaxRank, " in the native CUDA kernel, got ", r);
  FA_CHECK(g < 65536, kOp, ": a bank holds at most 65535 adapters in the native CUDA kernel, got ", g);
  FA_CHECK(d < (int64_t{1} << 30), kOp, ": d must be below 2**30, got ", d);
  FA_CHECK(c.up_weight.scalar_type() == c.down_weight.scalar_type(), kOp, ": up_weight must have the dtype of down_weight");
  Arguments a{};
  a.x = as_array(x, "x");
  if (other) {
    checker.like_x(*other, other_name);
    a.other = as_array(*other, other_name);
  }
  if (bank) {
    a.down_weight = checker.parameter(c.down_weight, "down_weight", {g, r, d});
    a.up_weight = checker.parameter(c.up_weight, "up_weight", {g, d, r});
    a.down_bias = checker.parameter(c.down_bias, "down_bias", {g, r});
    a.up_bias = checker.parameter(c.up_bias, "up_bias", {g, d});
    checker.device(*c.ids, "adapter_ids");
    a.ids = as_array(*c.ids, "adapter_ids");
    FA_CHECK(a.ids.kind >= Kind::int64, kOp, ": adapter_ids must be an integer tensor");
    const bool a_sequence = x.dim() > 1 && c.ids->dim() == 1;
    FA_CHECK(a_sequence || c.ids->dim() == x.dim() - 1, kOp, ": adapter_ids must have one id a sequence or one a token");
    for (int64_t i = 0; i < c.ids->dim(); i++)
      FA_CHECK(c.ids->size(i) == x.size(i), kOp, ": adapter_ids must match the leading dims of x");
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

// Runs plan(T{}, device) for the dtype of x, on the device and the current stream of x.
template <class Plan>
void run(const Tensor& x, Plan plan) {
  const int32_t index = x.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(index);
  std::deque<Tensor> workspace;  // freed with the call; the allocator keeps the memory until the stream is past it
  const Device device{device_attribute(cudaDevAttrMultiProcessorCount, index),
      device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index), current_stream(index), [&](int64_t bytes) {
        const int64_t size[] = {bytes};
        workspace.push_back(torch::stable::new_empty(x, {size, 1}, ScalarType::Byte));
        return workspace.back().mutable_data_ptr();
      }};
  const char* error = x.scalar_type() == ScalarType::Float  ? plan(float{}, device)
                      : x.scalar_type() == ScalarType::Half ? plan(f16{}, device)
                                                            : plan(bf16{}, device);
  FA_CHECK(!error, kOp, ": ", error);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
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
  run(x, [&](auto tag, const Device& device) { return bottleneck_forward<decltype(tag)>(a, y.mutable_data_ptr(), device); });
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
  FA_CHECK(output_mask.size() == 10, kOp, ": output_mask must have 10 entries, got ", output_mask.size());
  const Optional inputs[10] = {
      x, down_weight, up_weight, down_bias, up_bias, scale, norm_weight, norm_bias, skip_weight, hidden_skip_weight};
  Outputs outputs;
  Array* arrays[10] = {&outputs.x, &outputs.down_weight, &outputs.up_weight, &outputs.down_bias, &outputs.up_bias,
      &outputs.scale, &outputs.norm_weight, &outputs.norm_bias, &outputs.skip, &outputs.hidden_skip};
  std::vector<Tensor> grads;
  grads.reserve(10);
  const int64_t none[] = {0};
  for (int i = 0; i < 10; i++) {
    const bool wanted = output_mask[i] && inputs[i];
    grads.push_back(wanted ? torch::stable::new_empty(*inputs[i], inputs[i]->sizes()) : torch::stable::new_empty(x, {none, 1}));
    if (wanted && grads[i].numel() > 0) *arrays[i] = as_array(grads[i], "gradient");
  }
  run(x, [&](auto tag, const Device& device) { return bottleneck_backward<decltype(tag)>(a, outputs, device); });
  return {grads[0], grads[1], grads[2], grads[3], grads[4], grads[5], grads[6], grads[7], grads[8], grads[9]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastadapt, CUDA, m) {
  m.impl("bottleneck_fwd", TORCH_BOX(&bottleneck_fwd_cuda));
  m.impl("bottleneck_bwd", TORCH_BOX(&bottleneck_bwd_cuda));
}

}  // namespace fastadapt
