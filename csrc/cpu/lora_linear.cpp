// The CPU kernel of a linear layer with LoRA as PyTorch sees it: checks, layouts, the frozen product, and threads.
//
// The frozen product is the vendor library's, which adds it to what the branch has written: no pass over y but those that the
// product itself makes. On a processor with AVX-512 and without AMX it is the kernel's own in float32: 1.1 to 2 times as fast
// on an EPYC.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <array>
#include <cmath>
#include <tuple>

#include "arguments.h"
#include "lora_linear_args.h"
#include "pieces.h"
#include "scratch.h"
#include "target.h"

namespace fastadapt::lora_linear {

namespace portable { Kernel kernel(Dtype, Dtype); }
#if defined(__x86_64__)
namespace avx2 { Kernel kernel(Dtype, Dtype); }
namespace avx512 { Kernel kernel(Dtype, Dtype); }
#endif

namespace {

Kernel kernel(const Problem& p) {
#if defined(__x86_64__)
  if (target() == Target::amx || target() == Target::avx512) return avx512::kernel(p.dtype, p.weight_dtype);
  if (target() == Target::avx2) return avx2::kernel(p.dtype, p.weight_dtype);
#endif
  return portable::kernel(p.dtype, p.weight_dtype);
}

// The arguments that both directions share.
struct Arguments {
  const Tensor &x, &weight;
  const Optional& bias;
  const Tensor &lora_a, &lora_b;
  const Optional &diagonal, &gain;
  double scale, dropout_p;
  const Optional &seed, &adapter_ids;
};

struct Call {
  Problem p;
  std::vector<int64_t> x_offsets, grad_y_offsets, z_offsets;
  Division rows;  // a segment an adapter
};

Call read(const Arguments& a, Reader& reader) {
  Call call;
  Problem& p = call.p;
  reader.bank = a.adapter_ids.has_value();
  FA_CHECK(a.lora_a.dim() == 2 + reader.bank, "lora_linear: lora_a must be (r, k), or a bank (g, r, k) with adapter_ids, got ",
           shape_of(a.lora_a.sizes()));
  if (reader.bank) reader.g = a.lora_a.size(0);
  p.m = reader.m;
  p.k = reader.columns;
  p.n = a.weight.size(0);
  p.r = a.lora_a.size(reader.bank);
  p.scale = a.scale;
  p.dtype = dtype_of(reader.dtype);
  p.weight_dtype = dtype_of(a.lora_a.scalar_type());
  FA_CHECK(a.weight.scalar_type() == reader.dtype, "lora_linear: weight must have the dtype of x, ", toString(reader.dtype),
           ", got ", toString(a.weight.scalar_type()));
  FA_CHECK(a.lora_b.scalar_type() == a.lora_a.scalar_type(), "lora_linear: lora_b must have the dtype of lora_a, ",
           toString(a.lora_a.scalar_type()), ", got ", toString(a.lora_b.scalar_type()));
  p.x = reader.rows("x", a.x, p.k, call.x_offsets);
  p.weight = reader.weight("weight", a.weight, p.n, p.k, false);
  p.a = reader.weight("lora_a", a.lora_a, p.r, p.k, true);
  p.b = reader.weight("lora_b", a.lora_b, p.n, p.r, true);
  p.bias = reader.parameter("bias", a.bias, p.n, false);
  p.diagonal = reader.parameter("diagonal", a.diagonal, p.r, true);
  p.gain = reader.parameter("gain", a.gain, p.n, false);
  FA_CHECK(p.r > 0, "lora_linear: lora_a must have at least one row");
  FA_CHECK(std::isfinite(a.scale), "lora_linear: scale must be finite, got ", a.scale);
  FA_CHECK(a.dropout_p >= 0 && a.dropout_p < 1, "lora_linear: dropout_p must lie in [0, 1), got ", a.dropout_p);
  p.dropped = static_cast<uint32_t>(std::nearbyint(a.dropout_p * 65536));
  FA_CHECK(p.dropped < 65536, "lora_linear: dropout_p must leave one element of 65536, got ", a.dropout_p);
  p.kept_scale = 65536.0 / (65536 - p.dropped);
  if (p.dropped) {
    FA_CHECK(a.seed && a.seed->is_cpu() && a.seed->dim() == 0 && a.seed->scalar_type() == ScalarType::Long,
             "lora_linear: seed must be a 0-d int64 tensor on the CPU where dropout_p is above 0");
    p.seed = *static_cast<const uint64_t*>(elements("lora_linear", "seed", *a.seed));
  }
  std::vector<int64_t> adapters;
  if (reader.bank) adapters = reader.adapters(*a.adapter_ids);
  call.rows.divide(p.m, 1, reader.g, reader.bank ? &adapters : nullptr);
  if (reader.bank) p.order = call.rows.order.data();
  return call;
}

// The rows of t as a matrix: a view where their strides allow one.
Tensor matrix(const Tensor& t, const Rows& rows, int64_t m) {
  const int64_t sizes[] = {m, t.size(-1)}, strides[] = {rows.ld, rows.step};
  if (t.dim() == 2) return t;
  if (rows.offsets) return torch::stable::reshape(t, {sizes, 2});
  AtenTensorHandle out;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), 2, sizes, strides, 0, &out));  // 0: from where t begins
  return Tensor(out);
}

Tensor matrix(const Tensor& contiguous, int64_t m) {
  const int64_t n = contiguous.size(-1);
  return matrix(contiguous, Rows{nullptr, n, 1}, m);
}

// out += left @ right, or out = left @ right.
void multiply(const Tensor& out, const Tensor& left, const Tensor& right, bool add) {
  TORCH_ERROR_CODE_CHECK(add ? aoti_torch_cpu_addmm_out(out.get(), out.get(), left.get(), right.get(), 1, 1)
                             : aoti_torch_cpu_mm_out(out.get(), left.get(), right.get()));
}

int64_t bytes_of(ScalarType t) { return t == ScalarType::Double ? 8 : t == ScalarType::Float ? 4 : 2; }

// f(part, segment) for what each part of the rows has of each segment.
template <class F>
void each_row(const Call& call, int64_t parts, const F& f) {
  each_part(parts, [&](int64_t part) {
    const int64_t begin = call.p.m * part / parts, end = call.p.m * (part + 1) / parts;
    for (const Segment& s : call.rows.segments)
      if (s.begin < end && s.end > begin) f(part, Segment{s.adapter, std::max(begin, s.begin), std::min(end, s.end)});
  });
}

// Rows up to which threads share the columns of y, lest each packs all of b.
constexpr int64_t few_rows = 256;

// Whether the kernel makes the frozen product of these rows: not of so few that packing the weight costs more than it saves.
bool makes_product(const Kernel& k, const Problem& p) {
  constexpr int64_t rows_worth_packing = 4;
  return k.product && target() == Target::avx512 && p.m >= rows_worth_packing && p.k && p.n;
}

// Ranks up to which the branch is part of the frozen product's sums, which a long one would round worse.
constexpr int64_t joined_ranks = 128;

std::tuple<Tensor, Tensor, Tensor> lora_linear_fwd_cpu(const Tensor& x, const Tensor& weight, const Optional& bias,
                                                       const Tensor& lora_a, const Tensor& lora_b, const Optional& diagonal,
                                                       const Optional& gain, double scale, double dropout_p,
                                                       const Optional& seed, const Optional& adapter_ids, bool keep_z) {
  Reader reader("lora_linear", x);
  Call call = read({x, weight, bias, lora_a, lora_b, diagonal, gain, scale, dropout_p, seed, adapter_ids}, reader);
  Problem& p = call.p;
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = p.n;
  const int64_t hidden[] = {p.m, p.r};
  const int32_t wide = p.dtype == Dtype::float64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  const Tensor y = empty(shape, x), u = empty(hidden, wide), z = empty(keep_z ? shape : std::vector<int64_t>{0}, x);
  FA_CHECK(gain || !keep_z, "lora_linear: keep_z needs a gain");
  if (p.m == 0) return {y, u, z};
  p.y = y.mutable_data_ptr();
  p.z = keep_z ? z.mutable_data_ptr() : p.y;
  p.u = u.mutable_data_ptr();
  const Kernel k = kernel(p);
  const bool own = makes_product(k, p);
  p.joined = own && !p.order && p.r <= joined_ranks;
  const int64_t work = p.m * p.r * (p.k + p.n) + p.m * p.n, parts = useful_parts(work + own * p.m * p.k * p.n, p.m);
  const int64_t bytes = k.thread_bytes(p);
  ScratchMemory memory(parts * bytes);
  const bool by_columns = p.m <= few_rows && parts > 1;
  each_row(call, parts, [&](int64_t part, const Segment& s) {
    k.project(p, memory.data() + part * bytes, s);
    if (!by_columns && !p.joined) k.expand(p, memory.data() + part * bytes, s, 0, p.n);
  });
  if (by_columns && !p.joined)
    each_part(parts, [&](int64_t part) {
      const int64_t lines = (p.n + 63) / 64, begin = lines * part / parts * 64, end = lines * (part + 1) / parts * 64;
      for (const Segment& s : call.rows.segments)
        if (begin < p.n) k.expand(p, memory.data() + part * bytes, s, begin, std::min(p.n, end));
    });
  if (own) {
    each_part(parts, [&](int64_t part) { k.product(p, memory.data() + part * bytes, part, parts); });
    return {y, u, z};
  }
  multiply(matrix(keep_z ? z : y, p.m), matrix(x, p.x, p.m), torch::stable::transpose(weight, 0, 1), true);
  if (gain) each_part(parts, [&](int64_t part) { k.finish(p, p.m * part / parts, p.m * (part + 1) / parts); });
  return {y, u, z};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients lora_linear_bwd_cpu(const Tensor& grad_y, const Tensor& x, const Tensor& u, const Optional& z, const Tensor& weight,
                              const Optional& bias, const Tensor& lora_a, const Tensor& lora_b, const Optional& diagonal,
                              const Optional& gain, double scale, double dropout_p, const Optional& seed,
                              const Optional& adapter_ids, std::vector<bool> output_mask) {
  Reader reader("lora_linear", x);
  Call call = read({x, weight, bias, lora_a, lora_b, diagonal, gain, scale, dropout_p, seed, adapter_ids}, reader);
  Problem& p = call.p;
  p.backward = true;
  p.grad_y = reader.rows("grad_y", grad_y, p.n, call.grad_y_offsets);
  FA_CHECK(u.is_cpu() && u.dim() == 2 && u.size(0) == p.m && u.size(1) == p.r && u.is_contiguous() &&
               u.scalar_type() == (p.dtype == Dtype::float64 ? ScalarType::Double : ScalarType::Float),
           "lora_linear: u must be what forward returned");
  p.u = const_cast<void*>(elements("lora_linear", "u", u));
  FA_CHECK(output_mask.size() == gradients, "lora_linear: output_mask must have 7 entries, got ", output_mask.size());
  if (output_mask[grad_gain]) {
    FA_CHECK(z, "lora_linear: z is needed for the gradient of gain");
    p.saved_z = reader.rows("z", *z, p.n, call.z_offsets);
  }
  const Optional inputs[gradients] = {x, weight, bias, lora_a, lora_b, diagonal, gain};
  std::array<Tensor, gradients> grads;
  const int64_t none = 0;
  for (int i = 0; i < gradients; ++i) {
    p.wants[i] = output_mask[i];
    FA_CHECK(!p.wants[i] || inputs[i], "lora_linear: output_mask[", i, "] asks for the gradient of an argument that is None");
    grads[i] = p.wants[i] ? empty(inputs[i]->sizes(), *inputs[i]) : empty({&none, 1}, x);
    p.grads[i] = grads[i].mutable_data_ptr();
    // An adapter without rows gets zeros.
    if (p.wants[i] && (reader.bank || p.m == 0)) memset(p.grads[i], 0, grads[i].numel() * bytes_of(grads[i].scalar_type()));
  }
  const Kernel k = kernel(p);
  const bool own = p.wants[grad_x] && makes_product(k, p);
  p.joined = own && !p.order && !p.dropped && p.r <= joined_ranks;
  const bool multiplies = (p.wants[grad_x] && !own) || p.wants[grad_weight];
  const Optional scaled = gain && multiplies ? Optional(empty(grad_y.sizes(), grad_y)) : Optional();
  if (scaled) p.scaled_grad_y = scaled->mutable_data_ptr();
  const int64_t work = 3 * p.m * p.r * (p.k + p.n) + own * p.m * p.k * p.n;
  const int64_t parts = useful_parts(work, std::max<int64_t>(1, (p.k + p.n) / 64));
  const int64_t bytes = k.thread_bytes(p), ranks = (p.m * p.r * bytes_of(u.scalar_type()) + 63) / 64 * 64;
  const bool hidden = p.wants[grad_x] || p.wants[grad_a] || p.wants[grad_diagonal];
  ScratchMemory memory(parts * bytes + hidden * ranks + reader.bank * ranks);
  char* const after = memory.data() + parts * bytes;
  p.t = hidden ? after : nullptr;
  p.v = reader.bank ? after + hidden * ranks : p.u;
  if (hidden || reader.bank)
    each_row(call, parts, [&](int64_t part, const Segment& s) { k.project(p, memory.data() + part * bytes, s); });
  const std::vector<Segment>& segments = call.rows.segments;
  each_part(parts, [&](int64_t part) {
    k.gradients(p, memory.data() + part * bytes, segments.data(), segments.size(), part, parts);
    if (p.joined) k.product(p, memory.data() + part * bytes, part, parts);
  });
  if (own && !p.joined) each_part(parts, [&](int64_t part) { k.product(p, memory.data() + part * bytes, part, parts); });
  if (multiplies) {
    const Tensor g = scaled ? matrix(*scaled, p.m) : matrix(grad_y, p.grad_y, p.m);
    if (p.wants[grad_x] && !own) multiply(matrix(grads[grad_x], p.m), g, weight, true);
    if (p.wants[grad_weight]) multiply(grads[grad_weight], torch::stable::transpose(g, 0, 1), matrix(x, p.x, p.m), false);
  }
  return std::tuple_cat(grads);
}

Tensor lora_linear_norms_cpu(const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b) {
  Reader reader("lora_linear", weight);
  std::vector<int64_t> offsets;
  Problem p;
  FA_CHECK(weight.dim() == 2 && lora_a.dim() == 2 && lora_b.is_contiguous(),
           "lora_linear: weight must be (n, k), lora_a (r, k), and lora_b (n, r) and contiguous");
  p.m = reader.m;
  p.k = reader.columns;
  p.r = lora_a.size(0);
  p.dtype = dtype_of(reader.dtype);
  p.weight_dtype = p.dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32;
  for (const Tensor* t : {&lora_a, &lora_b})
    FA_CHECK(dtype_of(t->scalar_type()) == p.weight_dtype,
             "lora_linear: lora_a and lora_b must have the compute type of weight, got ", toString(t->scalar_type()));
  p.x = reader.rows("weight", weight, p.k, offsets);
  FA_CHECK(p.x.step == 1, "lora_linear: rows of weight must have no gaps");
  p.a = reader.weight("lora_a", lora_a, p.r, p.k, false);
  p.b = reader.weight("lora_b", lora_b, p.m, p.r, false);
  const int64_t rows[] = {p.m}, parts = useful_parts(p.m * p.k * (p.r + 1), std::max<int64_t>(1, p.m));
  const Tensor out = empty(rows, lora_a);
  p.y = out.mutable_data_ptr();
  const Kernel k = kernel(p);
  const int64_t bytes = k.norms_bytes(p);
  ScratchMemory memory(parts * bytes);
  each_part(parts, [&](int64_t part) {
    k.norms(p, memory.data() + part * bytes, p.m * part / parts, p.m * (part + 1) / parts);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastadapt, CPU, m) {
  m.impl("lora_linear_fwd", TORCH_BOX(&lora_linear_fwd_cpu));
  m.impl("lora_linear_bwd", TORCH_BOX(&lora_linear_bwd_cpu));
  m.impl("lora_linear_norms", TORCH_BOX(&lora_linear_norms_cpu));
}

}  // namespace fastadapt::lora_linear
