// The CPU kernel of a linear map of Kronecker products as PyTorch sees it: its arguments and the way of a call.
#include "kron_linear_args.h"
#include "kron_run.h"

namespace fastadapt::kron_linear {

namespace portable { Kernel<Problem> kernel(Dtype); }
#if defined(__x86_64__)
namespace avx2 { Kernel<Problem> kernel(Dtype); }
namespace avx512 { Kernel<Problem> kernel(Dtype); }
#endif

namespace {

Kernel<Problem> kernel(Dtype dtype) {
#if defined(__x86_64__)
  if (target() == Target::amx || target() == Target::avx512) return avx512::kernel(dtype);
  if (target() == Target::avx2) return avx2::kernel(dtype);
#endif
  return portable::kernel(dtype);
}

// What a call owns besides its tensors.
struct Owner {
  Reader in;
  Problem p;
  std::vector<int64_t> x_offsets, residual_offsets, grad_y_offsets;
  Division rows;

  Owner(const Tensor& x, const Tensor& a, const Tensor& s, const Tensor& t, const Optional& bias, double scale)
      : in("kron_linear", x) {
    FA_CHECK(a.dim() == 3 && s.dim() == 3 && t.dim() == 3 && a.numel() > 0 && s.numel() > 0 && t.numel() > 0,
             "kron_linear: a, s and t must be (terms, a_in, a_out), (terms, b_in, q) and (terms, q, b_out) with no size zero",
             ", got ", shape_of(a.sizes()), ", ", shape_of(s.sizes()), " and ", shape_of(t.sizes()));
    p.m = in.m;
    p.terms = a.size(0);
    p.q = s.size(2);
    p.in = {a.size(1), in.columns / a.size(1)};
    p.out = {a.size(2), t.size(2)};
    FA_CHECK(in.columns % a.size(1) == 0, "kron_linear: a must be (terms, a_in, a_out) with an a_in that divides the width ",
             in.columns, " of x, got ", shape_of(a.sizes()));
    p.a = in.factor("a", a, p.terms, p.in.chunks, p.out.chunks);
    p.s = in.factor("s", s, p.terms, p.in.width, p.q);
    p.t = in.factor("t", t, p.terms, p.q, p.out.width);
    for (const Tensor* f : {&s, &t})
      FA_CHECK(f->scalar_type() == a.scalar_type(), "kron_linear: factors must have the dtype of a, ",
               toString(a.scalar_type()), ", got ", toString(f->scalar_type()));
    p.dtype = dtype_of(in.dtype);
    p.weight_dtype = dtype_of(a.scalar_type());
    p.scale = scale;
    p.x = in.rows("x", x, in.columns, x_offsets);
    p.bias = in.parameter("bias", bias, columns(), false);
  }

  int64_t columns() const { return p.out.chunks * p.out.width; }

  void run() {
    const int64_t ends = in.columns + columns(), between = p.in.chunks * p.out.chunks;
    const int64_t work = p.m * (p.terms * p.q * (ends + between) + memory_work * ends);
    const int64_t parts = divide(p, work, nullptr, rows);
    kron::run(p, kernel(p.dtype), rows, parts);
  }
};

Tensor kron_linear_fwd_cpu(const Tensor& x, const Tensor& a, const Tensor& s, const Tensor& t, const Optional& bias,
                           const Optional& residual, double scale) {
  Owner call(x, a, s, t, bias, scale);
  Problem& p = call.p;
  if (residual) p.residual = call.in.rows("residual", *residual, call.columns(), call.residual_offsets);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = call.columns();
  Tensor y = empty(shape, x);
  p.y = y.mutable_data_ptr();
  if (p.m > 0) call.run();
  return y;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients kron_linear_bwd_cpu(const Tensor& grad_y, const Tensor& x, const Tensor& a, const Tensor& s, const Tensor& t,
                              const Optional& bias, double scale, std::vector<bool> output_mask) {
  Owner call(x, a, s, t, bias, scale);
  Problem& p = call.p;
  p.backward = true;
  p.grad_y = call.in.rows("grad_y", grad_y, call.columns(), call.grad_y_offsets);
  const Optional inputs[gradients] = {x, a, s, t, bias};
  const auto grads = gradients_of("kron_linear", x, inputs, output_mask, p.m == 0, p.wants, p.grads);
  if (p.m > 0) call.run();
  return std::tuple_cat(grads);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastadapt, CPU, m) {
  m.impl("kron_linear_fwd", TORCH_BOX(&kron_linear_fwd_cpu));
  m.impl("kron_linear_bwd", TORCH_BOX(&kron_linear_bwd_cpu));
}

}  // namespace fastadapt::kron_linear
