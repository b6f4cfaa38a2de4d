// The CPU kernel of adapter_fusion as PyTorch sees it: its arguments and the way of a call.
#include <numeric>

#include "adapter_fusion_args.h"
#include "arguments.h"
#include "pieces.h"
#include "scratch.h"
#include "target.h"

namespace fastadapt::adapter_fusion {

namespace portable { Kernel kernel(Dtype); }
#if defined(__x86_64__)
namespace avx2 { Kernel kernel(Dtype); }
namespace avx512 { Kernel kernel(Dtype); }
#endif

namespace {

Kernel kernel(Dtype dtype) {
#if defined(__x86_64__)
  if (target() == Target::amx || target() == Target::avx512) return avx512::kernel(dtype);
  if (target() == Target::avx2) return avx2::kernel(dtype);
#endif
  return portable::kernel(dtype);
}

// Multiplications that take as long as an element on its way from or to memory.
constexpr int64_t memory_work = 8;

// Parts of the rows, each with a sum of the scale's gradient, at most. They must not depend on the number of threads: then
// neither do the bits.
constexpr int64_t most_parts = 256;

// What a call owns besides its tensors.
struct Owner {
  Reader in;
  Problem p;
  std::vector<int64_t> query_offsets, keys_offsets, values_offsets, grad_y_offsets;

  Owner(const Tensor& query, const Tensor& keys, const Optional& values, const Optional& scale, double scale_value)
      : in("adapter_fusion", query) {
    FA_CHECK(in.columns > 0 && keys.dim() == query.dim() + 1 && keys.size(0) > 0, "adapter_fusion: query must be (..., d) and "
             "keys (g, ..., d) with d and g above zero, got ", shape_of(query.sizes()), " and ", shape_of(keys.sizes()));
    p.m = in.m;
    p.g = keys.size(0);
    p.d = in.columns;
    p.dtype = dtype_of(in.dtype);
    p.query = in.rows("query", query, p.d, query_offsets);
    p.keys = stack("keys", keys, keys_offsets);
    p.shared = !values;
    p.values = values ? stack("values", *values, values_offsets) : p.keys;
    FA_CHECK(!scale || scale->dim() == 0, "adapter_fusion: scale must be 0-d, got ", shape_of(scale->sizes()));
    p.scale = in.broadcast_parameter("scale", scale, 1);
    p.scale_value = scale_value;
  }

  // Of a tensor of the dtype of query.
  Stack stack(const char* name, const Tensor& t, std::vector<int64_t>& offsets) const {
    const Rows rows = in.rows(name, t, p.d, offsets, 1);
    FA_CHECK(t.size(0) == p.g, "adapter_fusion: ", name, " must be of ", p.g, " adapters like keys, got ", t.size(0));
    return {rows, t.stride(0)};
  }

  // f(thread's memory, part, first row, end) for the rows in `parts` parts, a run of them for each thread.
  template <class F>
  void each(int64_t thread_bytes, int64_t parts, const F& f) const {
    const int64_t threads = useful_parts(p.m * (p.g + 2) * p.d * memory_work, parts);
    ScratchMemory memory(threads * thread_bytes);
    each_part(threads, [&](int64_t thread) {
      for (int64_t part = parts * thread / threads; part < parts * (thread + 1) / threads; ++part)
        f(memory.data() + thread * thread_bytes, part, p.m * part / parts, p.m * (part + 1) / parts);
    });
  }
};

std::tuple<Tensor, Tensor> adapter_fusion_fwd_cpu(const Tensor& query, const Tensor& keys, const Optional& values,
                                                  const Optional& scale, double scale_value) {
  Owner call(query, keys, values, scale, scale_value);
  Problem& p = call.p;
  std::vector<int64_t> shape(query.sizes().begin(), query.sizes().end());
  shape.back() = p.g;
  const Tensor y = empty(query.sizes(), query);
  const Tensor weights = empty(shape, p.dtype == Dtype::float64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32());
  p.y = y.mutable_data_ptr();
  p.weights = weights.mutable_data_ptr();
  const Kernel k = kernel(p.dtype);
  call.each(k.thread_bytes(p), std::min(p.m, most_parts),
            [&](void* memory, int64_t, int64_t begin, int64_t end) { k.forward(p, memory, begin, end); });
  return {y, weights};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Gradients adapter_fusion_bwd_cpu(const Tensor& grad_y, const Tensor& weights, const Tensor& query, const Tensor& keys,
                                 const Optional& values, const Optional& scale, double scale_value,
                                 std::vector<bool> output_mask) {
  Owner call(query, keys, values, scale, scale_value);
  Problem& p = call.p;
  p.grad_y = call.in.rows("grad_y", grad_y, p.d, call.grad_y_offsets);
  FA_CHECK(weights.is_cpu() && weights.is_contiguous() && weights.numel() == p.m * p.g &&
               weights.scalar_type() == (p.dtype == Dtype::float64 ? ScalarType::Double : ScalarType::Float),
           "adapter_fusion: weights must be what forward returned, got ", toString(weights.scalar_type()), " ",
           shape_of(weights.sizes()));
  p.weights = const_cast<void*>(elements("adapter_fusion", "weights", weights));
  const Optional inputs[gradients] = {query, keys, values, scale};
  const auto grads = gradients_of("adapter_fusion", query, inputs, output_mask, false, p.wants, p.grads);
  const Kernel k = kernel(p.dtype);
  const int64_t parts = std::min(p.m, most_parts);
  std::vector<double> sums(parts);
  call.each(k.thread_bytes(p), parts, [&](void* memory, int64_t part, int64_t begin, int64_t end) {
    sums[part] = k.backward(p, memory, begin, end);
  });
  if (p.wants[grad_scale]) k.write_grad_scale(p, std::accumulate(sums.begin(), sums.end(), 0.0));
  return std::tuple_cat(grads);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastadapt, CPU, m) {
  m.impl("adapter_fusion_fwd", TORCH_BOX(&adapter_fusion_fwd_cpu));
  m.impl("adapter_fusion_bwd", TORCH_BOX(&adapter_fusion_bwd_cpu));
}

}  // namespace fastadapt::adapter_fusion
