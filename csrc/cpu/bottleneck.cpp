// The CPU kernel of the bottleneck adapter as PyTorch sees it: its arguments, the way of a call, and its steps on threads.
#include <array>
#include <tuple>

#include "amx_tiles.h"
#include "arguments.h"
#include "bottleneck_args.h"
#include "pieces.h"
#include "scratch.h"
#include "target.h"

namespace fastadapt::bottleneck {

namespace portable { Kernel kernel(Dtype, Dtype); }
#if defined(__x86_64__)
namespace avx2 { Kernel kernel(Dtype, Dtype); }
namespace avx512 { Kernel kernel(Dtype, Dtype); Kernel amx_kernel(Dtype); }
#endif

namespace {

Kernel kernel(Dtype dtype, Dtype weight_dtype) {
#if defined(__x86_64__)
#if FASTADAPT_AMX
  if (target() == Target::amx && dtype == Dtype::bfloat16) return avx512::amx_kernel(weight_dtype);
#endif
  if (target() == Target::amx || target() == Target::avx512) return avx512::kernel(dtype, weight_dtype);
  if (target() == Target::avx2) return avx2::kernel(dtype, weight_dtype);
#endif
  return portable::kernel(dtype, weight_dtype);
}

// The arguments that both directions share.
struct Arguments {
  const Tensor &x, &down_weight, &up_weight;
  const Optional &down_bias, &up_bias, &scale, &norm_weight, &norm_bias, &skip_weight, &hidden_skip_weight, &adapter_ids;
  bool add_x;
  double scale_value, norm_eps;
  int64_t activation;
};

// What a call owns besides its tensors.
struct Call {
  Reader in;
  Problem p;
  std::vector<int64_t> x_offsets, residual_offsets, grad_y_offsets;
  Division rows;
  int64_t parts = 1;

  explicit Call(const Arguments& a) : in("bottleneck", a.x) {
    const Tensor& down = a.down_weight;
    FA_CHECK(down.dim() == 2 || down.dim() == 3, "bottleneck: down_weight must be (r, d) or (g, r, d), got ",
             shape_of(down.sizes()));
    in.bank = down.dim() == 3;
    if (in.bank) in.g = down.size(0);
    FA_CHECK(in.bank == a.adapter_ids.has_value(),
             "bottleneck: a bank (g, r, d) and adapter_ids come together, got down_weight ", shape_of(down.sizes()),
             in.bank ? " without" : " with", " adapter_ids");
    FA_CHECK(down.scalar_type() == a.up_weight.scalar_type(), "bottleneck: up_weight must have the dtype of down_weight, ",
             toString(down.scalar_type()), ", got ", toString(a.up_weight.scalar_type()));
    FA_CHECK(a.activation >= 0 && a.activation <= 5, "bottleneck: activation must be a code from 0 to 5, got ", a.activation);
    FA_CHECK(a.norm_weight || !a.norm_bias, "bottleneck: norm_weight must be given with norm_bias");
    const int64_t d = in.columns, r = down.size(in.bank);
    p.m = in.m;
    p.d = d;
    p.r = r;
    p.g = in.g;
    p.bank = in.bank;
    p.dtype = dtype_of(in.dtype);
    p.weight_dtype = dtype_of(down.scalar_type());
    p.add_x = a.add_x;
    p.activation = a.activation;
    p.scale_value = a.scale_value;
    p.norm_eps = a.norm_eps;
    p.x = in.rows("x", a.x, d, x_offsets);
    p.down = in.weight("down_weight", down, r, d, true);
    p.up = in.weight("up_weight", a.up_weight, d, r, true);
    p.down_bias = in.parameter("down_bias", a.down_bias, r, true);
    p.up_bias = in.parameter("up_bias", a.up_bias, d, true);
    p.scale = in.broadcast_parameter("scale", a.scale, d);
    p.scale_varies = a.scale && a.scale->dim();
    p.norm_weight = in.parameter("norm_weight", a.norm_weight, d, false);
    p.norm_bias = in.parameter("norm_bias", a.norm_bias, d, false);
    p.skip = in.parameter("skip_weight", a.skip_weight, d, false);
    p.hidden_skip = in.parameter("hidden_skip_weight", a.hidden_skip_weight, r, false);
  }
};

// Chunks of rows. Each sums weight gradients of its own, so that their number must not depend on that of the threads: then
// neither do the bits.
int64_t chunks(const Call& call) {
  if (!call.p.backward) return call.parts;
  const int64_t least_rows = kernel(call.p.dtype, call.p.weight_dtype).chunk_rows;
  int64_t count = 1;
  while (count < 16 && call.p.m >= count * 2 * least_rows) count *= 2;
  return count;
}

// Whether threads had better share the columns than the rows: few rows wouldn't repay a packed copy of the weights, and large
// weights, or sums of their gradients, would pass through the cache for every block of rows. A norm needs whole rows, and a
// bank a weight for each row. Small weights are packed in less time than threads take to meet once more (not measured on AMX).
bool few_rows(const Problem& p, const Kernel& k) {
  if (!k.project || p.bank || p.norm_weight.data || p.m < 1) return false;
  const int64_t weight_bytes = p.d * p.r * 4, hidden_bytes = p.m * round_up(p.r, 16) * 4;
  const bool small = !p.backward && !k.most_column_rows && weight_bytes <= (128 << 10);
  if (p.m <= (small ? 48 : 128)) return true;
  if (k.most_column_rows && p.m > k.most_column_rows) return false;
  return weight_bytes >= (p.backward ? 512 << 10 : 768 << 10) && hidden_bytes <= (p.backward ? 4 << 20 : 1 << 20);
}

// Fixes the way of a call. Weights that one thread packs for another move from cache to cache, which takes several times as
// long as packing them; copies for every thread may take half a MiB a matrix.
Kernel plan(Call& call) {
  Problem& p = call.p;
  const Kernel k = kernel(p.dtype, p.weight_dtype);
  p.by_columns = few_rows(p, k);
  p.own_weights = p.bank || (!p.by_columns && call.parts * p.d * p.r * 4 <= (512 << 10));
  return k;
}

// Divides the rows of a call, after what it reads is known.
void schedule(const Arguments& a, Call& call) {
  Problem& p = call.p;
  call.parts = useful_parts(p.m * p.d * (p.r + 4) * (p.backward ? 3 : 1), p.m);
  std::vector<int64_t> adapters;
  if (p.bank) adapters = call.in.adapters(*a.adapter_ids);
  call.rows.divide(p.m, chunks(call), p.g, p.bank ? &adapters : nullptr);
  if (p.bank) p.order = call.rows.order.data();
  p.segment_rows = call.rows.segment_rows;
}

// Runs a call: forward into p.y, backward into p.grads.
void run(Call& call) {
  Problem& p = call.p;
  const Kernel k = plan(call);
  std::vector<Segment>& segments = call.rows.segments;
  if (p.by_columns) {
    segments.assign(1, {0, 0, p.m});
    p.segment_rows = p.m;
  }
  const Sizes sizes = k.sizes(p);
  const int64_t count = segments.size(), columns = p.wants[grad_scale] ? p.d * 8 : 0;
  ScratchMemory memory(sizes.shared + call.parts * sizes.thread + count * sizes.partial + columns);
  char *shared = memory.data(), *threads = shared + sizes.shared, *partials = threads + call.parts * sizes.thread;
  p.scale_columns = partials + count * sizes.partial;
  const auto each = [&](const auto& f) {
    each_part(call.parts, [&](int64_t part) { f(threads + part * sizes.thread, part); });
  };
  k.read_parameters(p, shared);
  if (p.by_columns) {
    each([&](char* thread, int64_t part) { k.project(p, shared, thread, part, call.parts); });
    k.hidden(p, shared, partials);
    each([&](char* thread, int64_t part) { k.expand(p, shared, thread, partials, part, call.parts); });
  } else {
    if (!p.own_weights) each([&](char*, int64_t part) { k.pack(p, shared, part, call.parts); });
    call.rows.each_segment(call.parts, [&](int64_t part, int64_t i, const Segment& s) {
      char* thread = threads + part * sizes.thread;
      if (p.backward)
        k.backward(p, shared, thread, s, partials + i * sizes.partial);
      else
        k.forward(p, shared, thread, s);
    });
    if (p.backward)
      each([&](char* thread, int64_t part) {
        k.reduce(p, shared, thread, segments.data(), count, partials, part, call.parts);
      });
  }
  if (p.backward) k.finish(p, segments.data(), count, partials);
}

Tensor bottleneck_fwd_cpu(const Tensor& x, const Tensor& down_weight, const Tensor& up_weight, const Optional& down_bias,
                          const Optional& up_bias, const Optional& residual, bool add_x, const Optional& scale,
                          double scale_value, int64_t activation, const Optional& norm_weight, const Optional& norm_bias,
                          double norm_eps, const Optional& skip_weight, const Optional& hidden_skip_weight,
                          const Optional& adapter_ids) {
  const Arguments a{x, down_weight, up_weight, down_bias, up_bias, scale, norm_weight, norm_bias, skip_weight,
                    hidden_skip_weight, adapter_ids, add_x, scale_value, norm_eps, activation};
  FA_CHECK(!add_x || !residual, "bottleneck: residual must be None when x is the residual");
  Call call(a);
  Problem& p = call.p;
  if (residual) p.residual = call.in.rows("residual", *residual, p.d, call.residual_offsets);
  schedule(a, call);
  Tensor y = empty(x.sizes(), x);
  if (p.m == 0 || p.d == 0) return y;
  p.y = y.mutable_data_ptr();
  run(call);
  return y;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients bottleneck_bwd_cpu(const Tensor& grad_y, const Tensor& x, const Tensor& down_weight, const Tensor& up_weight,
                             const Optional& down_bias, const Optional& up_bias, bool add_x, const Optional& scale,
                             double scale_value, int64_t activation, const Optional& norm_weight, const Optional& norm_bias,
                             double norm_eps, const Optional& skip_weight, const Optional& hidden_skip_weight,
                             const Optional& adapter_ids, std::vector<bool> output_mask) {
  const Arguments a{x, down_weight, up_weight, down_bias, up_bias, scale, norm_weight, norm_bias, skip_weight,
                    hidden_skip_weight, adapter_ids, add_x, scale_value, norm_eps, activation};
  FA_CHECK(output_mask.size() == gradients, "bottleneck: output_mask must have 10 entries, got ", output_mask.size());
  Call call(a);
  Problem& p = call.p;
  p.backward = true;
  p.grad_y = call.in.rows("grad_y", grad_y, p.d, call.grad_y_offsets);
  const Optional inputs[gradients] = {x, down_weight, up_weight, down_bias, up_bias, scale, norm_weight, norm_bias, skip_weight,
                                      hidden_skip_weight};
  std::array<Tensor, gradients> grads;
  const int64_t none = 0;
  for (int i = 0; i < gradients; ++i) {
    p.wants[i] = output_mask[i];
    FA_CHECK(!p.wants[i] || inputs[i], "bottleneck: output_mask[", i, "] asks for the gradient of an argument that is None");
    grads[i] = p.wants[i] ? empty(inputs[i]->sizes(), *inputs[i]) : empty({&none, 1}, x);
    if (p.wants[i]) p.grads[i] = grads[i].mutable_data_ptr();
  }
  schedule(a, call);
  run(call);
  return std::tuple_cat(grads);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastadapt, CPU, m) {
  m.impl("bottleneck_fwd", TORCH_BOX(&bottleneck_fwd_cpu));
  m.impl("bottleneck_bwd", TORCH_BOX(&bottleneck_bwd_cpu));
}

}  // namespace fastadapt::bottleneck
