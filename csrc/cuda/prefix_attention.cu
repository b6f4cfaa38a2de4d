// prefix_attention, key CUDA: checks what protects memory and hands tensors to the plan.
#include <tuple>

#include "call.h"
#include "prefix_attention_plan_backward.cuh"

namespace fastadapt {
namespace {

constexpr const char* kOp = "prefix_attention";

struct PrefixCall {
  const Tensor &q, &k, &v, &prefix_k, &prefix_v;
  const Optional& gate;
  bool is_causal;
  const Optional &key_lengths, &attn_mask;
  double scale, dropout_p;
  const Optional &seed, &ids;
};

PrefixArguments check(const PrefixCall& c) {
  const Tensor& q = c.q;
  const Checker checker{kOp, q, "q"};
  checker.activation();
  FA_CHECK(q.dim() == 4 && c.k.dim() == 4, kOp, ": q must be (b, h, t, e) and k (b, h_kv, t_k, e)");
  const int64_t b = q.size(0), h = q.size(1), t = q.size(2), e = q.size(3), h_kv = c.k.size(1), t_k = c.k.size(2);
  const int64_t dims = c.prefix_k.dim(), most = int64_t{1} << 30;
  const bool bank = c.ids.has_value();
  FA_CHECK(e > 0 && e <= 256 && e % 8 == 0, kOp, ": e must be a multiple of 8 up to 256 on CUDA, got ", e);
  FA_CHECK(h_kv == h || (h_kv > 0 && h % h_kv == 0), kOp, ": h_kv must divide h, got ", h_kv, " and ", h);
  FA_CHECK(dims == 4 || (dims == 3 && !bank), kOp, ": prefix_k must have three or four dims, four with adapter_ids");
  const int64_t p = c.prefix_k.size(-2), g = dims == 4 && bank ? c.prefix_k.size(0) : b;
  FA_CHECK(h * t < most && t_k < most && p < most, kOp, ": h * t, t_k and p must be below 2**30");
  PrefixArguments a{};
  a.q = checker.array(q, "q");
  auto keys = [&](const Tensor& x, const char* name) {
    FA_CHECK(x.scalar_type() == q.scalar_type(), kOp, ": ", name, " must have the dtype of q");
    return checker.parameter(x, name, {b, h_kv, t_k, e});
  };
  auto prefix = [&](const Tensor& x, const char* name) {
    return dims == 4 ? checker.parameter(x, name, {g, h_kv, p, e}) : checker.parameter(x, name, {h_kv, p, e});
  };
  a.k = keys(c.k, "k"), a.v = keys(c.v, "v");
  a.prefix_k = prefix(c.prefix_k, "prefix_k"), a.prefix_v = prefix(c.prefix_v, "prefix_v");
  FA_CHECK(a.prefix_k.kind == a.prefix_v.kind, kOp, ": prefix_v must have the dtype of prefix_k");
  a.gate = checker.parameter(c.gate, "gate", {h});
  if (c.key_lengths) {
    checker.device(*c.key_lengths, "key_lengths");
    checker.shape(*c.key_lengths, "key_lengths", {b});
    a.lengths = checker.array(*c.key_lengths, "key_lengths");
    FA_CHECK(a.lengths.kind >= Kind::int64, kOp, ": key_lengths must be an integer tensor");
  }
  if (c.attn_mask) {
    const Tensor& mask = *c.attn_mask;
    if (mask.scalar_type() == ScalarType::Bool) {
      checker.device(mask, "attn_mask");
      checker.shape(mask, "attn_mask", {b, h, t, t_k});
      void* data = const_cast<void*>(elements(kOp, "attn_mask", mask));
      a.mask = Array{data, Kind::uint8, 4, mask.sizes().data(), mask.strides().data()};
    } else {
      a.mask = checker.parameter(mask, "attn_mask", {b, h, t, t_k});
    }
  }
  a.ids = checker.adapter_ids(c.ids, g);
  a.seed = checker.seed(c.seed, c.dropout_p);
  a.scale = static_cast<float>(c.scale), a.dropout_p = c.dropout_p, a.causal = c.is_causal;
  return a;
}

// (b, h, t, e), laid out as (b, t, h, e).
Tensor by_token(const Tensor& like) {
  const int64_t shape[] = {like.size(0), like.size(2), like.size(1), like.size(3)};
  return torch::stable::transpose(torch::stable::new_empty(like, {shape, 4}), 1, 2);
}

std::tuple<Tensor, Tensor> prefix_attention_fwd_cuda(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& prefix_k,
    const Tensor& prefix_v, const Optional& gate, bool is_causal, const Optional& key_lengths, const Optional& attn_mask,
    double scale, double dropout_p, const Optional& seed, const Optional& adapter_ids, bool keep_lse) {
  const PrefixArguments a = check(PrefixCall{
      q, k, v, prefix_k, prefix_v, gate, is_causal, key_lengths, attn_mask, scale, dropout_p, seed, adapter_ids});
  const int64_t parts[] = {gate ? 2 : 1, q.size(0), q.size(1), q.size(2)}, none[] = {0};
  Tensor y = by_token(q);
  Tensor lse = keep_lse ? torch::stable::new_empty(q, {parts, 4}, ScalarType::Float)
                        : torch::stable::new_empty(q, {none, 1}, ScalarType::Float);
  if (y.numel() == 0) return {y, lse};
  float* sums = keep_lse ? static_cast<float*>(lse.mutable_data_ptr()) : nullptr;
  void* out = y.mutable_data_ptr();
  run(kOp, q, [&](auto tag, const Device& device) { return prefix_attention_forward<decltype(tag)>(a, out, sums, device); });
  return {y, lse};
}

using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Six prefix_attention_bwd_cuda(const Tensor& grad_y, const Tensor& y, const Tensor& lse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& prefix_k, const Tensor& prefix_v, const Optional& gate, bool is_causal,
    const Optional& key_lengths, const Optional& attn_mask, double scale, double dropout_p, const Optional& seed,
    const Optional& adapter_ids, const std::vector<bool>& output_mask) {
  const PrefixArguments a = check(PrefixCall{
      q, k, v, prefix_k, prefix_v, gate, is_causal, key_lengths, attn_mask, scale, dropout_p, seed, adapter_ids});
  const Checker checker{kOp, q, "q"};
  auto like_q = [&](const Tensor& x, const char* name) {
    FA_CHECK(x.scalar_type() == q.scalar_type(), kOp, ": ", name, " must have the dtype of q");
    return checker.parameter(x, name, {q.size(0), q.size(1), q.size(2), q.size(3)});
  };
  const Array of_grad_y = like_q(grad_y, "grad_y"), of_y = like_q(y, "y");
  checker.device(lse, "lse");
  checker.shape(lse, "lse", {gate ? 2 : 1, q.size(0), q.size(1), q.size(2)});
  FA_CHECK(lse.scalar_type() == ScalarType::Float && lse.is_contiguous(), kOp, ": lse must be contiguous float32");
  FA_CHECK(output_mask.size() == 6, kOp, ": output_mask must have 6 entries, got ", output_mask.size());

  const Optional inputs[6] = {q, k, v, prefix_k, prefix_v, gate};
  PrefixGradients outputs;
  Array* const arrays[6] = {&outputs.q, &outputs.k, &outputs.v, &outputs.prefix_k, &outputs.prefix_v, &outputs.gate};
  std::vector<Tensor> grads;
  grads.reserve(6);  // arrays borrow their sizes
  const int64_t none[] = {0};
  for (int i = 0; i < 6; i++) {
    const bool given = output_mask[i] && inputs[i];
    grads.push_back(!given  ? torch::stable::new_empty(q, {none, 1})
                    : i < 3 ? by_token(*inputs[i])
                            : torch::stable::new_empty(*inputs[i], inputs[i]->sizes()));
    if (given && grads[i].numel() > 0) *arrays[i] = checker.array(grads[i], "gradient");
  }
  const float* sums = static_cast<const float*>(lse.data_ptr());
  run(kOp, q, [&](auto tag, const Device& device) {
    return prefix_attention_backward<decltype(tag)>(a, of_grad_y, of_y, sums, outputs, device);
  });
  return {grads[0], grads[1], grads[2], grads[3], grads[4], grads[5]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastadapt, CUDA, m) {
  m.impl("prefix_attention_fwd", TORCH_BOX(&prefix_attention_fwd_cuda));
  m.impl("prefix_attention_bwd", TORCH_BOX(&prefix_attention_bwd_cuda));
}

}  // namespace fastadapt
