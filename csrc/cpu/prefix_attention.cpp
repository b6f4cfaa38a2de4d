// The CPU kernel of attention with a prefix as PyTorch sees it: checks, layouts and threads.
#include <array>
#include <atomic>
#include <cmath>
#include <numeric>
#include <tuple>

#include "amx_tiles.h"
#include "arguments.h"
#include "pieces.h"
#include "prefix_attention_args.h"
#include "scratch.h"
#include "target.h"

namespace fastadapt::prefix_attention {

using namespace fastadapt::cpu;

#define FA_KERNELS               \
  Kernel kernel(Dtype, bool);    \
  BackwardKernel backward_kernel(Dtype, bool);
namespace portable { FA_KERNELS }
#if defined(__x86_64__)
namespace avx2 { FA_KERNELS }
namespace avx512 {
FA_KERNELS
Kernel amx_kernel(Dtype, bool);
BackwardKernel amx_backward_kernel(Dtype, bool);
}
#endif
#undef FA_KERNELS

namespace {

// Called, not taken the address of: a build for one instruction set leaves the others undefined.
std::pair<Kernel, BackwardKernel> kernels(const Problem& p) {
  const Dtype dtype = p.dtype;
  const bool wide = p.wide_parameters;
#if FASTADAPT_AMX
  if (target() == Target::amx && dtype == Dtype::bfloat16)
    return {avx512::amx_kernel(dtype, wide), avx512::amx_backward_kernel(dtype, wide)};
#endif
#if defined(__x86_64__)
  if (target() == Target::amx || target() == Target::avx512)
    return {avx512::kernel(dtype, wide), avx512::backward_kernel(dtype, wide)};
  if (target() == Target::avx2) return {avx2::kernel(dtype, wide), avx2::backward_kernel(dtype, wide)};
#endif
  return {portable::kernel(dtype, wide), portable::backward_kernel(dtype, wide)};
}

constexpr const char* op = "prefix_attention";

// The arguments that both directions share.
struct Arguments {
  const Tensor &q, &k, &v, &prefix_k, &prefix_v;
  const Optional& gate;
  bool is_causal;
  const Optional &key_lengths, &attn_mask;
  double scale, dropout_p;
  const Optional &seed, &adapter_ids;
};

Heads heads(const char* name, const Tensor& t, std::initializer_list<int64_t> shape) {
  const auto sizes = t.sizes();
  FA_CHECK(t.is_cpu(), op, ": ", name, " must be on the CPU like q");
  FA_CHECK(sizes.size() == shape.size() && std::equal(shape.begin(), shape.end(), sizes.begin()), op, ": ", name, " must be ",
           shape_of(shape), ", got ", shape_of(sizes));
  Heads out{elements(op, name, t), {}};
  for (size_t i = 0; i < shape.size(); ++i) out.stride[4 - shape.size() + i] = t.stride(i);
  return out;
}

void same_dtype(const char* name, const Tensor& t, ScalarType dtype) {
  FA_CHECK(t.scalar_type() == dtype, op, ": ", name, " must be ", toString(dtype), ", got ", toString(t.scalar_type()));
}

// Integers of any dtype, one a sequence, each in [low, high].
std::vector<int64_t> integers(const char* name, const Tensor& t, int64_t b, int64_t low, int64_t high) {
  const Heads from = heads(name, t, {b});
  std::vector<int64_t> out(b);
  auto read = [&](auto* data) {
    for (int64_t i = 0; i < b; ++i) {
      out[i] = data[i * from.stride[3]];
      FA_CHECK(out[i] >= low && out[i] <= high, op, ": ", name, " must lie in [", low, ", ", high, "], got ", out[i]);
    }
  };
  switch (t.scalar_type()) {
    case ScalarType::Long: read(static_cast<const int64_t*>(from.data)); break;
    case ScalarType::Int: read(static_cast<const int32_t*>(from.data)); break;
    case ScalarType::Short: read(static_cast<const int16_t*>(from.data)); break;
    case ScalarType::Char: read(static_cast<const int8_t*>(from.data)); break;
    case ScalarType::Byte: read(static_cast<const uint8_t*>(from.data)); break;
    default: FA_CHECK(false, op, ": ", name, " must be an integer tensor, got ", toString(t.scalar_type()));
  }
  return out;
}

// A float32 or 16-bit number of a parameter.
double number(const Tensor& t, int64_t at) {
  const char* data = static_cast<const char*>(t.const_data_ptr());
  switch (t.scalar_type()) {
    case ScalarType::Double: return reinterpret_cast<const double*>(data)[at];
    case ScalarType::Float: return reinterpret_cast<const float*>(data)[at];
    case ScalarType::Half: return reinterpret_cast<const torch::headeronly::Half*>(data)[at];
    default: return reinterpret_cast<const torch::headeronly::BFloat16*>(data)[at];
  }
}

// What a call owns besides its tensors.
struct Call {
  Problem p;
  std::vector<int64_t> prefix_of, key_lengths, order;
  std::vector<double> gate;

  explicit Call(const Arguments& a) {
    const ScalarType dtype = a.q.scalar_type();
    const bool narrow = dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
    FA_CHECK(dtype == ScalarType::Double || dtype == ScalarType::Float || narrow, op,
             ": q must be float16, bfloat16, float32 or float64, got ", toString(dtype));
    FA_CHECK(a.q.dim() == 4 && a.k.dim() == 4 && a.q.size(3) > 0, op,
             ": q and k must be (b, h, t, e) and (b, h_kv, t_k, e) with e above zero, got ", shape_of(a.q.sizes()), " and ",
             shape_of(a.k.sizes()));
    p.b = a.q.size(0), p.h = a.q.size(1), p.t = a.q.size(2), p.e = a.q.size(3);
    p.h_kv = a.k.size(1), p.t_k = a.k.size(2);
    FA_CHECK(p.h == p.h_kv || (p.h_kv > 0 && p.h % p.h_kv == 0), op, ": k must have a number of heads that divides the ", p.h,
             " of q, got ", p.h_kv);
    p.q = heads("q", a.q, {p.b, p.h, p.t, p.e});
    p.k = heads("k", a.k, {p.b, p.h_kv, p.t_k, p.e});
    p.v = heads("v", a.v, {p.b, p.h_kv, p.t_k, p.e});
    same_dtype("k", a.k, dtype);
    same_dtype("v", a.v, dtype);
    const ScalarType wide = a.prefix_k.scalar_type();
    FA_CHECK(wide == dtype || (narrow && wide == ScalarType::Float), op, ": prefix_k must have the dtype of q, ",
             toString(dtype), narrow ? ", or float32" : "", ", got ", toString(wide));
    same_dtype("prefix_v", a.prefix_v, wide);
    p.dtype = dtype_of(dtype);
    p.wide_parameters = wide != dtype;
    read_prefix(a);
    if (a.key_lengths) key_lengths = integers("key_lengths", *a.key_lengths, p.b, 0, p.t_k);
    else key_lengths.assign(p.b, p.t_k);
    p.key_lengths = key_lengths.data();
    p.is_causal = a.is_causal;
    if (a.attn_mask) {
      p.mask = heads("attn_mask", *a.attn_mask, {p.b, p.h, p.t, p.t_k});
      const ScalarType of_mask = a.attn_mask->scalar_type();
      FA_CHECK(of_mask == ScalarType::Bool || of_mask == dtype || of_mask == ScalarType::Float, op,
               ": attn_mask must be bool, float32 or of the dtype of q, got ", toString(of_mask));
      p.mask_kind = of_mask == ScalarType::Bool ? Mask::boolean : of_mask == dtype ? Mask::like_q : Mask::float32;
    }
    if (a.gate) {
      const Heads from = heads("gate", *a.gate, {p.h});
      const ScalarType of_gate = a.gate->scalar_type();
      FA_CHECK(of_gate == dtype || (narrow && of_gate == ScalarType::Float), op, ": gate must have the dtype of q, ",
               toString(dtype), narrow ? ", or float32" : "", ", got ", toString(of_gate));
      for (int64_t j = 0; j < p.h; ++j) gate.push_back(number(*a.gate, j * from.stride[3]));
      if (p.h == 0) gate.push_back(0);  // so that there is one
      p.gate = gate.data();
      p.wide_gate = of_gate != dtype;
    }
    p.scale = a.scale;
    FA_CHECK(a.dropout_p >= 0 && a.dropout_p < 1, op, ": dropout_p must lie in [0, 1), got ", a.dropout_p);
    p.dropped = static_cast<uint32_t>(std::nearbyint(a.dropout_p * 65536));
    FA_CHECK(p.dropped < 65536, op, ": dropout_p must leave one weight of 65536, got ", a.dropout_p);
    p.kept_scale = 65536.0 / (65536 - p.dropped);
    if (p.dropped) {
      FA_CHECK(a.seed && a.seed->is_cpu() && a.seed->dim() == 0 && a.seed->scalar_type() == ScalarType::Long, op,
               ": seed must be a 0-d int64 tensor on the CPU where dropout_p is above 0");
      p.seed = *static_cast<const uint64_t*>(elements(op, "seed", *a.seed));
    }
  }

  void read_prefix(const Arguments& a) {
    const bool several = a.prefix_k.dim() == 4;
    FA_CHECK(several || (a.prefix_k.dim() == 3 && !a.adapter_ids), op, ": prefix_k must be (h_kv, p, e), (b, h_kv, p, e) or "
             "with adapter_ids a bank (g, h_kv, p, e), got ", shape_of(a.prefix_k.sizes()));
    p.p = a.prefix_k.size(several + 1);
    if (several) {
      p.prefixes = a.adapter_ids ? a.prefix_k.size(0) : p.b;
      p.prefix_k = heads("prefix_k", a.prefix_k, {p.prefixes, p.h_kv, p.p, p.e});
      p.prefix_v = heads("prefix_v", a.prefix_v, {p.prefixes, p.h_kv, p.p, p.e});
    } else {
      p.prefix_k = heads("prefix_k", a.prefix_k, {p.h_kv, p.p, p.e});
      p.prefix_v = heads("prefix_v", a.prefix_v, {p.h_kv, p.p, p.e});
    }
    if (a.adapter_ids) prefix_of = integers("adapter_ids", *a.adapter_ids, p.b, -1, p.prefixes - 1);
    else prefix_of.assign(p.b, 0);
    if (several && !a.adapter_ids) std::iota(prefix_of.begin(), prefix_of.end(), 0);
    p.prefix_of = prefix_of.data();
    order.resize(p.b);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return prefix_of[i] < prefix_of[j]; });
    p.order = order.data();
  }

  // Multiplications of a product of all queries and all keys.
  int64_t work() const { return p.b * p.h * p.t * (p.t_k + p.p) * p.e; }
};

// (b, heads, t, e) laid out as (b, t, heads, e).
Tensor by_token(const Tensor& like) {
  const int64_t sizes[] = {like.size(0), like.size(2), like.size(1), like.size(3)};
  return torch::stable::transpose(empty(sizes, like), 1, 2);
}

// f(part, unit) for all units; each part takes the next one that is left.
template <class F>
void each_unit(int64_t parts, int64_t units, const F& f) {
  std::atomic<int64_t> next{0};
  each_part(parts, [&](int64_t part) {
    for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;) f(part, unit);
  });
}

// Rows that a unit has at most: so often it uses a tile of keys that it packs. Fewer where threads would wait for one another.
constexpr int64_t unit_rows = 512, units_a_thread = 8;

void divide(Problem& p, int64_t parts) {
  const int64_t group = p.h / p.h_kv;
  for (int64_t rows = unit_rows;; rows /= 2) {
    p.unit_queries = std::min(p.t, rows);
    p.unit_heads = std::max<int64_t>(1, std::min(group, rows / p.t));
    p.units = p.b * p.h_kv * ceil_div(group, p.unit_heads) * ceil_div(p.t, p.unit_queries);
    if (parts == 1 || p.units >= parts * units_a_thread || rows <= 32) return;
  }
}

std::tuple<Tensor, Tensor> prefix_attention_fwd_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& prefix_k,
                                                    const Tensor& prefix_v, const Optional& gate, bool is_causal,
                                                    const Optional& key_lengths, const Optional& attn_mask, double scale,
                                                    double dropout_p, const Optional& seed, const Optional& adapter_ids,
                                                    bool keep_lse) {
  Call call({q, k, v, prefix_k, prefix_v, gate, is_causal, key_lengths, attn_mask, scale, dropout_p, seed, adapter_ids});
  Problem& p = call.p;
  const Tensor y = by_token(q);
  std::vector<int64_t> shape{0};
  if (keep_lse) shape = {gate ? 2 : 1, p.b, p.h, p.t};
  const Tensor lse = empty(shape, p.dtype == Dtype::float64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32());
  if (y.numel() == 0) return {y, lse};
  p.y = y.mutable_data_ptr();
  p.lse = keep_lse ? lse.mutable_data_ptr() : nullptr;
  const Kernel run = kernels(p).first;
  int64_t parts = useful_parts(2 * call.work(), p.b * p.h * p.t);
  divide(p, parts);
  parts = std::min(parts, p.units);
  const int64_t bytes = run.thread_bytes(p);
  ScratchMemory memory(parts * bytes);
  for (int64_t part = 0; part < parts; ++part) run.begin(p, memory.data() + part * bytes);
  each_unit(parts, p.units, [&](int64_t part, int64_t unit) { run.forward(p, memory.data() + part * bytes, unit); });
  return {y, lse};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients prefix_attention_bwd_cpu(const Tensor& grad_y, const Tensor& y, const Tensor& lse, const Tensor& q, const Tensor& k,
                                   const Tensor& v, const Tensor& prefix_k, const Tensor& prefix_v, const Optional& gate,
                                   bool is_causal, const Optional& key_lengths, const Optional& attn_mask, double scale,
                                   double dropout_p, const Optional& seed, const Optional& adapter_ids,
                                   std::vector<bool> output_mask) {
  Call call({q, k, v, prefix_k, prefix_v, gate, is_causal, key_lengths, attn_mask, scale, dropout_p, seed, adapter_ids});
  Problem& p = call.p;
  p.grad_y = heads("grad_y", grad_y, {p.b, p.h, p.t, p.e});
  p.saved_y = heads("y", y, {p.b, p.h, p.t, p.e});
  same_dtype("grad_y", grad_y, q.scalar_type());
  same_dtype("y", y, q.scalar_type());
  heads("lse", lse, {gate ? 2 : 1, p.b, p.h, p.t});
  same_dtype("lse", lse, p.dtype == Dtype::float64 ? ScalarType::Double : ScalarType::Float);
  FA_CHECK(lse.is_contiguous(), op, ": lse must be what forward returned");
  p.saved_lse = elements(op, "lse", lse);
  FA_CHECK(output_mask.size() == gradients, op, ": output_mask must have 6 entries, got ", output_mask.size());
  const Optional inputs[gradients] = {q, k, v, prefix_k, prefix_v, gate};
  std::array<Tensor, gradients> grads;
  const int64_t none = 0;
  for (int i = 0; i < gradients; ++i) {
    p.wants[i] = output_mask[i];
    FA_CHECK(!p.wants[i] || inputs[i], op, ": output_mask[", i, "] asks for the gradient of an argument that is None");
    grads[i] = !p.wants[i] ? empty({&none, 1}, q) : i <= grad_v ? by_token(*inputs[i]) : empty(inputs[i]->sizes(), *inputs[i]);
    p.grads[i] = grads[i].mutable_data_ptr();
  }
  const BackwardKernel run = kernels(p).second;
  const int64_t parts = useful_parts(5 * call.work(), p.b * p.h * p.t), bytes = run.thread_bytes(p);
  ScratchMemory memory(parts * bytes + run.shared_bytes(p));
  for (int phase = 0; phase < backward_phases; ++phase) {
    const int64_t units = run.units(p, phase);
    each_unit(std::min(parts, units), units, [&](int64_t part, int64_t unit) {
      run.run(p, phase, memory.data() + parts * bytes, memory.data() + part * bytes, unit);
    });
  }
  return std::tuple_cat(grads);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastadapt, CPU, m) {
  m.impl("prefix_attention_fwd", TORCH_BOX(&prefix_attention_fwd_cpu));
  m.impl("prefix_attention_bwd", TORCH_BOX(&prefix_attention_bwd_cpu));
}

}  // namespace fastadapt::prefix_attention
