// The CPU kernel of a linear layer with LoRA as PyTorch sees it: checks, layouts, the frozen product, and threads.
//
// The frozen product is the vendor library's, which adds it to what the branch has written: no pass over y but those that the
// product itself makes.
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
  const Optional& seed;
};

struct Call {
  Problem p;
  std::vector<int64_t> x_offsets, grad_y_offsets, y_offsets;
};

Call read(const Arguments& a, const Reader& reader) {
  Call call;
  Problem& p = call.p;
  p.m = reader.m;
  p.k = reader.columns;
  p.n = a.weight.size(0);
  p.r = a.lora_a.size(0);
  p.scale = a.scale;
  p.dtype = dtype_of(reader.dtype);
  p.weight_dtype = dtype_of(a.lora_a.scalar_type());
  FA_CHECK(a.weight.scalar_type() == reader.dtype, "lora_linear: weight must have the dtype of x, ", toString(reader.dtype),
           ", got ", toString(a.weight.scalar_type()));
  FA_CHECK(a.lora_b.scalar_type() == a.lora_a.scalar_type(), "lora_linear: lora_b must have the dtype of lora_a, ",
           toString(a.lora_a.scalar_type()), ", got ", toString(a.lora_b.scalar_type()));
  p.x = reader.rows("x", a.x, p.k, call.x_offsets);
  reader.weight("weight", a.weight, p.n, p.k, false);
  p.a = reader.weight("lora_a", a.lora_a, p.r, p.k, false);
  p.b = reader.weight("lora_b", a.lora_b, p.n, p.r, false);
  p.bias = reader.parameter("bias", a.bias, p.n, false);
  p.diagonal = reader.parameter("diagonal", a.diagonal, p.r, false);
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
    p.seed = *static_cast<const uint64_t*>(a.seed->const_data_ptr());
  }
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

std::tuple<Tensor, Tensor> lora_linear_fwd_cpu(const Tensor& x, const Tensor& weight, const Optional& bias,
                                               const Tensor& lora_a, const Tensor& lora_b, const Optional& diagonal,
                                               const Optional& gain, double scale, double dropout_p, const Optional& seed,
                                               const Optional& adapter_ids) {
  FA_CHECK(!adapter_ids, "lora_linear: this kernel knows no adapter_ids");
  const Reader reader("lora_linear", x);
  Call call = read({x, weight, bias, lora_a, lora_b, diagonal, gain, scale, dropout_p, seed}, reader);
  Problem& p = call.p;
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = p.n;
  const int64_t hidden[] = {p.m, p.r};
  const int32_t wide = p.dtype == Dtype::float64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  const Tensor y = empty(shape, x), u = empty(hidden, wide);
  if (p.m == 0) return {y, u};
  p.y = y.mutable_data_ptr();
  p.u = u.mutable_data_ptr();
  const Kernel k = kernel(p);
  const int64_t parts = useful_parts(p.m * p.r * (p.k + p.n) + p.m * p.n, p.m), thread = k.sizes(p).thread;
  ScratchMemory memory(parts * thread);
  each_part(parts, [&](int64_t part) {
    k.forward(p, memory.data() + part * thread, p.m * part / parts, p.m * (part + 1) / parts);
  });
  multiply(matrix(y, p.m), matrix(x, p.x, p.m), torch::stable::transpose(weight, 0, 1), true);
  if (gain) each_part(parts, [&](int64_t part) { k.finish(p, p.m * part / parts, p.m * (part + 1) / parts); });
  return {y, u};
}

// Rows of a segment in backward. Each leaves sums as large as the adapter's weights, so it has more rows than these; and since
// the sums must not depend on the number of threads, neither does it.
int64_t chunks(const Problem& p) {
  const int64_t rows = std::max<int64_t>(32, std::min(std::max<int64_t>(8 * p.r, p.m / 32), p.m / 4));
  return std::max<int64_t>(1, p.m / rows);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients lora_linear_bwd_cpu(const Tensor& grad_y, const Tensor& x, const Tensor& u, const Optional& y, const Tensor& weight,
                              const Optional& bias, const Tensor& lora_a, const Tensor& lora_b, const Optional& diagonal,
                              const Optional& gain, double scale, double dropout_p, const Optional& seed,
                              const Optional& adapter_ids, std::vector<bool> output_mask) {
  FA_CHECK(!adapter_ids, "lora_linear: this kernel knows no adapter_ids");
  const Reader reader("lora_linear", x);
  Call call = read({x, weight, bias, lora_a, lora_b, diagonal, gain, scale, dropout_p, seed}, reader);
  Problem& p = call.p;
  p.grad_y = reader.rows("grad_y", grad_y, p.n, call.grad_y_offsets);
  FA_CHECK(u.is_cpu() && u.dim() == 2 && u.size(0) == p.m && u.size(1) == p.r && u.is_contiguous() &&
               u.scalar_type() == (p.dtype == Dtype::float64 ? ScalarType::Double : ScalarType::Float),
           "lora_linear: u must be what forward returned");
  p.u = const_cast<void*>(u.const_data_ptr());
  FA_CHECK(output_mask.size() == gradients, "lora_linear: output_mask must have 7 entries, got ", output_mask.size());
  if (output_mask[grad_gain]) {
    FA_CHECK(y, "lora_linear: y is needed for the gradient of gain");
    p.saved_y = reader.rows("y", *y, p.n, call.y_offsets);
  }
  const Optional inputs[gradients] = {x, weight, bias, lora_a, lora_b, diagonal, gain};
  std::array<Tensor, gradients> grads;
  const int64_t none = 0;
  for (int i = 0; i < gradients; ++i) {
    p.wants[i] = output_mask[i];
    FA_CHECK(!p.wants[i] || inputs[i], "lora_linear: output_mask[", i, "] asks for the gradient of an argument that is None");
    grads[i] = p.wants[i] ? empty(inputs[i]->sizes(), *inputs[i]) : empty({&none, 1}, x);
    p.grads[i] = grads[i].mutable_data_ptr();
  }
  const bool products = p.wants[grad_x] || p.wants[grad_weight];
  const Optional scaled = gain && products ? Optional(empty(grad_y.sizes(), grad_y)) : Optional();
  if (scaled) p.scaled_grad_y = scaled->mutable_data_ptr();
  const Kernel k = kernel(p);
  const Sizes sizes = k.sizes(p);
  Division rows;
  rows.divide(p.m, chunks(p), 1, nullptr);
  const int64_t segments = rows.segments.size();
  const int64_t parts = useful_parts(3 * p.m * p.r * (p.k + p.n), std::max<int64_t>(1, segments));
  ScratchMemory memory(parts * sizes.thread + segments * sizes.partial);
  char* const partials = memory.data() + parts * sizes.thread;
  rows.each_segment(parts, [&](int64_t part, int64_t i, const Segment& s) {
    k.backward(p, memory.data() + part * sizes.thread, s, partials + i * sizes.partial);
  });
  each_part(parts, [&](int64_t part) { k.reduce(p, partials, segments, part, parts); });
  if (products) {
    const Tensor g = scaled ? matrix(*scaled, p.m) : matrix(grad_y, p.grad_y, p.m);
    if (p.wants[grad_x]) multiply(matrix(grads[grad_x], p.m), g, weight, true);
    if (p.wants[grad_weight]) multiply(grads[grad_weight], torch::stable::transpose(g, 0, 1), matrix(x, p.x, p.m), false);
  }
  return std::tuple_cat(grads);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastadapt, CPU, m) {
  m.impl("lora_linear_fwd", TORCH_BOX(&lora_linear_fwd_cpu));
  m.impl("lora_linear_bwd", TORCH_BOX(&lora_linear_bwd_cpu));
}

}  // namespace fastadapt::lora_linear
