// The CPU kernel of the compacter adapter as PyTorch sees it: its arguments and the way of a call.
#include "compacter_args.h"
#include "kron_run.h"

namespace fastadapt::compacter {

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

// The arguments that both directions share.
struct Arguments {
  const Tensor &x, &down_a, &down_s, &down_t, &up_a, &up_s, &up_t;
  const Optional &down_bias, &up_bias, &scale, &adapter_ids;
  bool add_x;
  double scale_value;
  int64_t activation;
};

// What a call owns besides its tensors.
struct Owner {
  Reader in;
  Problem p;
  std::vector<int64_t> x_offsets, residual_offsets, grad_y_offsets;
  Division rows;

  explicit Owner(const Arguments& a) : in("compacter", a.x) {
    const Tensor& rule = a.down_a;
    in.bank = a.adapter_ids.has_value();
    FA_CHECK(rule.dim() == 3 + in.bank, "compacter: down_a must be (n, n, n), or a bank (g, n, n, n) with adapter_ids, got ",
             shape_of(rule.sizes()));
    if (in.bank) in.g = rule.size(0);
    FA_CHECK(a.down_s.dim() == rule.dim() && a.down_t.dim() == rule.dim(), "compacter: down_s and down_t must have ",
             rule.dim(), " dims like down_a, got ", shape_of(a.down_s.sizes()), " and ", shape_of(a.down_t.sizes()));
    const int64_t n = rule.size(-1), q = a.down_s.size(-1), chunk = a.down_t.size(-1), d = in.columns;
    FA_CHECK(n > 0 && q > 0 && chunk > 0 && d % n == 0, "compacter: n = ", n, " must divide d = ", d,
             ", and q and r must be above zero, got down_s ", shape_of(a.down_s.sizes()), " and down_t ",
             shape_of(a.down_t.sizes()));
    FA_CHECK(a.activation >= 0 && a.activation <= 5, "compacter: activation must be a code from 0 to 5, got ", a.activation);
    p.down_a = in.factor("down_a", rule, n, n, n);
    p.down_s = in.factor("down_s", a.down_s, n, d / n, q);
    p.down_t = in.factor("down_t", a.down_t, n, q, chunk);
    p.up_a = in.factor("up_a", a.up_a, n, n, n);
    p.up_s = in.factor("up_s", a.up_s, n, chunk, q);
    p.up_t = in.factor("up_t", a.up_t, n, q, d / n);
    for (const Tensor* t : {&a.down_s, &a.down_t, &a.up_a, &a.up_s, &a.up_t})
      FA_CHECK(t->scalar_type() == rule.scalar_type(), "compacter: factors must have the dtype of down_a, ",
               toString(rule.scalar_type()), ", got ", toString(t->scalar_type()));
    p.m = in.m;
    p.g = in.g;
    p.bank = in.bank;
    p.d = d;
    p.n = n;
    p.q = q;
    p.r = n * chunk;
    p.dtype = dtype_of(in.dtype);
    p.weight_dtype = dtype_of(rule.scalar_type());
    p.activation = a.activation;
    p.add_x = a.add_x;
    p.scale_value = a.scale_value;
    p.x = in.rows("x", a.x, d, x_offsets);
    p.down_bias = in.parameter("down_bias", a.down_bias, p.r, true);
    p.up_bias = in.parameter("up_bias", a.up_bias, d, true);
    p.scale = in.broadcast_parameter("scale", a.scale, 1);
  }

  void run(const Arguments& a) {
    std::vector<int64_t> adapters;
    if (p.bank) adapters = in.adapters(*a.adapter_ids);
    const int64_t work = p.m * (2 * p.n * p.q * (p.d + p.n * p.r) + memory_work * 2 * p.d);
    const int64_t parts = divide(p, work, p.bank ? &adapters : nullptr, rows);
    kron::run(p, kernel(p.dtype), rows, parts);
  }
};

Tensor compacter_fwd_cpu(const Tensor& x, const Tensor& down_a, const Tensor& down_s, const Tensor& down_t, const Tensor& up_a,
                         const Tensor& up_s, const Tensor& up_t, const Optional& down_bias, const Optional& up_bias,
                         const Optional& residual, bool add_x, const Optional& scale, double scale_value, int64_t activation,
                         const Optional& adapter_ids) {
  const Arguments a{x, down_a, down_s, down_t, up_a, up_s, up_t, down_bias, up_bias, scale, adapter_ids, add_x, scale_value,
                    activation};
  FA_CHECK(!add_x || !residual, "compacter: residual must be None when x is the residual");
  Owner call(a);
  Problem& p = call.p;
  if (residual) p.residual = call.in.rows("residual", *residual, p.d, call.residual_offsets);
  Tensor y = empty(x.sizes(), x);
  p.y = y.mutable_data_ptr();
  if (p.m > 0 && p.d > 0) call.run(a);
  return y;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients compacter_bwd_cpu(const Tensor& grad_y, const Tensor& x, const Tensor& down_a, const Tensor& down_s,
                            const Tensor& down_t, const Tensor& up_a, const Tensor& up_s, const Tensor& up_t,
                            const Optional& down_bias, const Optional& up_bias, bool add_x, const Optional& scale,
                            double scale_value, int64_t activation, const Optional& adapter_ids,
                            std::vector<bool> output_mask) {
  const Arguments a{x, down_a, down_s, down_t, up_a, up_s, up_t, down_bias, up_bias, scale, adapter_ids, add_x, scale_value,
                    activation};
  Owner call(a);
  Problem& p = call.p;
  p.backward = true;
  p.grad_y = call.in.rows("grad_y", grad_y, p.d, call.grad_y_offsets);
  const Optional inputs[gradients] = {x, down_a, down_s, down_t, up_a, up_s, up_t, down_bias, up_bias, scale};
  const auto grads = gradients_of("compacter", x, inputs, output_mask, p.bank || p.m == 0, p.wants, p.grads);
  call.run(a);
  return std::tuple_cat(grads);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastadapt, CPU, m) {
  m.impl("compacter_fwd", TORCH_BOX(&compacter_fwd_cpu));
  m.impl("compacter_bwd", TORCH_BOX(&compacter_bwd_cpu));
}

}  // namespace fastadapt::compacter
