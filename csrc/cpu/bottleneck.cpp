// The CPU kernel of the bottleneck adapter as PyTorch sees it: checks, layouts, and the division of rows among threads.
#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "../common.h"
#include "amx.h"
#include "bottleneck_args.h"
#include "scratch.h"
#include "target.h"

namespace fastadapt::bottleneck {

namespace portable { Kernel kernel(Dtype, Dtype); }
#if defined(__x86_64__)
namespace avx2 { Kernel kernel(Dtype, Dtype); }
namespace avx512 { Kernel kernel(Dtype, Dtype); Kernel amx_kernel(Dtype); }
#endif

namespace {

using Optional = std::optional<Tensor>;

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

// --- checks: everything that would read or write outside of a tensor, or that the formulas don't define -----------------

std::string shape_of(const Tensor& t) {
  std::string s = "(";
  for (int64_t i = 0; i < t.dim(); ++i) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + ")";
}

bool has_shape(const Tensor& t, std::initializer_list<int64_t> shape) {
  const auto sizes = t.sizes();
  return sizes.size() == shape.size() && std::equal(shape.begin(), shape.end(), sizes.begin());
}

struct Shapes {
  ScalarType dtype;
  bool bank;
  int64_t g, m, d, r;
};

void check_parameter(const char* name, const Tensor& t, const Shapes& s, bool right_shape) {
  FA_CHECK(t.is_cpu(), "bottleneck: ", name, " must be on the CPU like x");
  FA_CHECK(right_shape, "bottleneck: ", name, " has the shape ", shape_of(t), ", which does not fit g = ", s.g, ", d = ", s.d, ", r = ", s.r);
  const ScalarType dtype = t.scalar_type();
  const bool narrow = s.dtype == ScalarType::Half || s.dtype == ScalarType::BFloat16;
  FA_CHECK(dtype == s.dtype || (narrow && dtype == ScalarType::Float), "bottleneck: ", name, " must have the dtype of x, ",
           torch::headeronly::toString(s.dtype), narrow ? ", or float32" : "", ", got ", torch::headeronly::toString(dtype));
}

Parameter parameter(const char* name, const Optional& t, const Shapes& s, int64_t size, bool banked) {
  if (!t) return {};
  const bool bank = banked && s.bank;
  check_parameter(name, *t, s, bank ? has_shape(*t, {s.g, size}) : has_shape(*t, {size}));
  return {t->const_data_ptr(), t->scalar_type() == s.dtype, bank ? t->stride(0) : 0, t->stride(bank)};
}

Weight weight(const char* name, const Tensor& t, const Shapes& s, int64_t rows, int64_t columns) {
  check_parameter(name, t, s, s.bank ? has_shape(t, {s.g, rows, columns}) : has_shape(t, {rows, columns}));
  const auto strides = t.strides();
  return {t.const_data_ptr(), s.bank ? strides[0] : 0, strides[s.bank], strides[s.bank + 1]};
}

// Offsets of every index over the first `dims` dims.
std::vector<int64_t> index_offsets(const Tensor& t, int64_t dims) {
  std::vector<int64_t> offsets{0};
  for (int64_t i = 0; i < dims; ++i) {
    std::vector<int64_t> longer;
    longer.reserve(offsets.size() * t.size(i));
    for (int64_t base : offsets)
      for (int64_t j = 0; j < t.size(i); ++j) longer.push_back(base + j * t.stride(i));
    offsets.swap(longer);
  }
  return offsets;
}

// Leading dims become one stride where their strides allow it, and a table of offsets otherwise.
Rows rows(const char* name, const Tensor& t, const Tensor& x, std::vector<int64_t>& offsets) {
  const auto sizes = t.sizes(), strides = t.strides(), like = x.sizes();
  const bool same = sizes.size() == like.size() && std::equal(sizes.begin(), sizes.end(), like.begin());
  FA_CHECK(same && t.scalar_type() == x.scalar_type() && t.is_cpu(), "bottleneck: ", name, " must be ", shape_of(x), " ",
           torch::headeronly::toString(x.scalar_type()), " like x, got ", shape_of(t), " ", torch::headeronly::toString(t.scalar_type()));
  const int64_t leading = static_cast<int64_t>(sizes.size()) - 1;
  Rows out{t.const_data_ptr(), 0, sizes[leading] > 1 ? strides[leading] : 1};
  int64_t span = -1;  // the stride with which the next dim outwards would merge
  bool merged = true;
  for (int64_t i = leading - 1; i >= 0; --i) {
    if (sizes[i] == 1) continue;
    if (span < 0)
      out.ld = strides[i];
    else
      merged = merged && strides[i] == span;
    span = strides[i] * sizes[i];
  }
  if (!merged) {
    offsets = index_offsets(t, leading);
    out.offsets = offsets.data();
  }
  return out;
}

Dtype dtype_of(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Half: return Dtype::float16;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    default: return Dtype::float64;
  }
}

// --- rows and adapters ---------------------------------------------------------------------------------------------------

// What a call owns besides its tensors.
struct Call {
  Problem p;
  std::vector<int64_t> x_offsets, residual_offsets, grad_y_offsets, order;
  std::vector<Segment> segments;
  std::vector<int64_t> first_segment;  // of each chunk of rows, and the end
  int64_t parts = 1;
};

template <class I>
void copy_ids(const Tensor& ids, int64_t repeat, int64_t g, std::vector<int64_t>& out) {
  const I* data = static_cast<const I*>(ids.const_data_ptr());
  for (int64_t offset : index_offsets(ids, ids.dim())) {
    const int64_t id = static_cast<int64_t>(data[offset]);
    FA_CHECK(id >= -1 && id < g, "bottleneck: adapter_ids must lie in [-1, ", g - 1, "] for a bank of ", g, ", got ", id);
    out.insert(out.end(), repeat, id);
  }
}

// The adapter of every row.
std::vector<int64_t> row_adapters(const Tensor& ids, const Tensor& x, int64_t m, int64_t g) {
  const auto sizes = ids.sizes(), leading = x.sizes();
  const size_t dims = leading.size() - 1;
  bool fits = ids.is_cpu() && (sizes.size() == dims || (sizes.size() == 1 && dims >= 1));
  for (size_t i = 0; fits && i < sizes.size(); ++i) fits = sizes[i] == leading[i];
  FA_CHECK(fits, "bottleneck: adapter_ids must have one entry a sequence or one a token of x ", shape_of(x), ", got ", shape_of(ids));
  std::vector<int64_t> out;
  out.reserve(m);
  const int64_t count = ids.numel(), repeat = count ? m / count : 0;
  switch (ids.scalar_type()) {
    case ScalarType::Long: copy_ids<int64_t>(ids, repeat, g, out); break;
    case ScalarType::Int: copy_ids<int32_t>(ids, repeat, g, out); break;
    case ScalarType::Short: copy_ids<int16_t>(ids, repeat, g, out); break;
    case ScalarType::Char: copy_ids<int8_t>(ids, repeat, g, out); break;
    case ScalarType::Byte: copy_ids<uint8_t>(ids, repeat, g, out); break;
    default: FA_CHECK(false, "bottleneck: adapter_ids must be an integer tensor, got ", torch::headeronly::toString(ids.scalar_type()));
  }
  return out;
}

// Sorts the rows by adapter (a counting sort keeps their order) and cuts them where the adapter or the chunk changes.
void divide(Call& call, int64_t chunks, const std::vector<int64_t>* adapters) {
  const int64_t m = call.p.m, g = call.p.g;
  std::vector<int64_t> ends;
  if (adapters) {
    std::vector<int64_t> next(g + 2, 0);
    for (int64_t id : *adapters) ++next[id + 2];
    for (int64_t i = 1; i < g + 2; ++i) next[i] += next[i - 1];
    ends.assign(next.begin() + 1, next.end());
    call.order.resize(m);
    for (int64_t row = 0; row < m; ++row) call.order[next[(*adapters)[row] + 1]++] = row;
    call.p.order = call.order.data();
  }
  int64_t adapter = adapters ? -1 : 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    call.first_segment.push_back(call.segments.size());
    int64_t begin = m * chunk / chunks;
    const int64_t end = m * (chunk + 1) / chunks;
    while (begin < end) {
      while (adapters && ends[adapter + 1] <= begin) ++adapter;
      const int64_t stop = adapters ? std::min(end, ends[adapter + 1]) : end;
      call.segments.push_back({adapter, begin, stop});
      call.p.segment_rows = std::max(call.p.segment_rows, stop - begin);
      begin = stop;
    }
  }
  call.first_segment.push_back(call.segments.size());
}

template <class F>
void each_part(int64_t parts, const F& f) {
  if (parts == 1) return f(0);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) f(part);
  });
}

// f(thread, number of the segment, segment), a run of chunks for each thread.
template <class F>
void each_segment(const Call& call, const F& f) {
  const int64_t chunks = call.first_segment.size() - 1;
  each_part(call.parts, [&](int64_t part) {
    const int64_t first = call.first_segment[chunks * part / call.parts], last = call.first_segment[chunks * (part + 1) / call.parts];
    for (int64_t i = first; i < last; ++i) {
      Segment segment = call.segments[i];
      segment.packed = i > first && call.segments[i - 1].adapter == segment.adapter;
      f(part, i, segment);
    }
  });
}

// Chunks of rows. Each sums weight gradients of its own, so that their number must not depend on that of the threads: then
// neither do the bits.
int64_t chunks(const Call& call) {
  if (!call.p.backward) return call.parts;
  const int64_t least_rows = kernel(call.p.dtype, call.p.weight_dtype).chunk_rows;
  int64_t count = 1;
  while (count < 16 && call.p.m >= count * 2 * least_rows) count *= 2;
  return count;
}

// Threads that the work is worth.
int64_t useful_parts(const Problem& p) {
  const int64_t work = p.m * p.d * (p.r + 4) * (p.backward ? 3 : 1);
  return std::max<int64_t>(1, std::min<int64_t>({static_cast<int64_t>(torch::stable::get_num_threads()), work / 400000, p.m}));
}

// Whether threads had better share the columns than the rows: few rows wouldn't repay a packed copy of the weights, and large
// weights, or sums of their gradients, would pass through the cache for every block of rows. A norm needs whole rows, and a
// bank a weight for each row.
bool few_rows(const Problem& p, const Kernel& k) {
  if (!k.project || p.bank || p.norm_weight.data || p.m < 1) return false;
  if (p.m <= 128) return true;
  if (k.most_column_rows && p.m > k.most_column_rows) return false;
  const int64_t weight_bytes = p.d * p.r * 4, hidden_bytes = p.m * round_up(p.r, 16) * 4;
  return p.backward ? weight_bytes >= (512 << 10) && hidden_bytes <= (4 << 20) : weight_bytes >= (768 << 10) && hidden_bytes <= (1 << 20);
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

// The arguments that both directions share.
struct Arguments {
  const Tensor &x, &down_weight, &up_weight;
  const Optional &down_bias, &up_bias, &scale, &norm_weight, &norm_bias, &skip_weight, &hidden_skip_weight, &adapter_ids;
  bool add_x;
  double scale_value, norm_eps;
  int64_t activation;
};

Shapes shapes(const Arguments& a) {
  const Tensor &x = a.x, &down = a.down_weight;
  const ScalarType dtype = x.scalar_type();
  FA_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16 || dtype == ScalarType::Double,
           "bottleneck: x must be float16, bfloat16, float32 or float64, got ", torch::headeronly::toString(dtype));
  FA_CHECK(x.is_cpu(), "bottleneck: x must be on the CPU");
  FA_CHECK(x.dim() >= 1, "bottleneck: x must be (..., d), got a 0-d tensor");
  FA_CHECK(down.dim() == 2 || down.dim() == 3, "bottleneck: down_weight must be (r, d) or (g, r, d), got ", shape_of(down));
  const bool bank = down.dim() == 3;
  FA_CHECK(bank == a.adapter_ids.has_value(), "bottleneck: a bank (g, r, d) and adapter_ids come together, got down_weight ",
           shape_of(down), bank ? " without" : " with", " adapter_ids");
  FA_CHECK(a.activation >= 0 && a.activation <= 5, "bottleneck: activation must be a code from 0 to 5, got ", a.activation);
  const auto sizes = x.sizes();
  int64_t m = 1;
  for (size_t i = 0; i + 1 < sizes.size(); ++i) m *= sizes[i];
  return {dtype, bank, bank ? down.size(0) : 1, m, sizes[sizes.size() - 1], down.size(bank)};
}

void read(const Arguments& a, const Shapes& s, Call& call) {
  Problem& p = call.p;
  p.m = s.m;
  p.d = s.d;
  p.r = s.r;
  p.g = s.g;
  p.bank = s.bank;
  p.add_x = a.add_x;
  p.activation = a.activation;
  p.scale_value = a.scale_value;
  p.norm_eps = a.norm_eps;
  p.x = rows("x", a.x, a.x, call.x_offsets);
  p.down = weight("down_weight", a.down_weight, s, s.r, s.d);
  p.up = weight("up_weight", a.up_weight, s, s.d, s.r);
  FA_CHECK(a.up_weight.scalar_type() == a.down_weight.scalar_type(), "bottleneck: up_weight must have the dtype of down_weight, ",
           torch::headeronly::toString(a.down_weight.scalar_type()), ", got ", torch::headeronly::toString(a.up_weight.scalar_type()));
  p.dtype = dtype_of(s.dtype);
  p.weight_dtype = dtype_of(a.down_weight.scalar_type());
  p.down_bias = parameter("down_bias", a.down_bias, s, s.r, true);
  p.up_bias = parameter("up_bias", a.up_bias, s, s.d, true);
  if (a.scale && a.scale->dim() == 0) {
    check_parameter("scale", *a.scale, s, true);
    p.scale = {a.scale->const_data_ptr(), a.scale->scalar_type() == s.dtype, 0, 0};
  } else {
    p.scale = parameter("scale", a.scale, s, s.d, false);
  }
  FA_CHECK(a.norm_weight || !a.norm_bias, "bottleneck: norm_weight must be given with norm_bias");
  p.norm_weight = parameter("norm_weight", a.norm_weight, s, s.d, false);
  p.norm_bias = parameter("norm_bias", a.norm_bias, s, s.d, false);
  p.skip = parameter("skip_weight", a.skip_weight, s, s.d, false);
  p.hidden_skip = parameter("hidden_skip_weight", a.hidden_skip_weight, s, s.r, false);
}

void schedule(const Arguments& a, Call& call) {
  call.parts = useful_parts(call.p);
  if (!a.adapter_ids) return divide(call, chunks(call), nullptr);
  const std::vector<int64_t> adapters = row_adapters(*a.adapter_ids, a.x, call.p.m, call.p.g);
  divide(call, chunks(call), &adapters);
}

// Uninitialised and contiguous.
Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, const Tensor& like) {
  int64_t local[8];
  std::vector<int64_t> many(sizes.size() > 8 ? sizes.size() : 0);
  int64_t *strides = many.empty() ? local : many.data(), stride = 1;
  for (int64_t i = static_cast<int64_t>(sizes.size()) - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= std::max<int64_t>(1, sizes[i]);
  }
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  AtenTensorHandle out;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(sizes.size(), sizes.data(), strides, dtype, aoti_torch_device_type_cpu(), -1, &out));
  return Tensor(out);
}

Tensor bottleneck_fwd_cpu(const Tensor& x, const Tensor& down_weight, const Tensor& up_weight, const Optional& down_bias,
                          const Optional& up_bias, const Optional& residual, bool add_x, const Optional& scale, double scale_value,
                          int64_t activation, const Optional& norm_weight, const Optional& norm_bias, double norm_eps,
                          const Optional& skip_weight, const Optional& hidden_skip_weight, const Optional& adapter_ids) {
  const Arguments a{x, down_weight, up_weight, down_bias, up_bias, scale, norm_weight, norm_bias, skip_weight,
                    hidden_skip_weight, adapter_ids, add_x, scale_value, norm_eps, activation};
  const Shapes s = shapes(a);
  FA_CHECK(!add_x || !residual, "bottleneck: residual must be None when x is the residual");
  Call call;
  read(a, s, call);
  Problem& p = call.p;
  if (residual) p.residual = rows("residual", *residual, x, call.residual_offsets);
  schedule(a, call);
  Tensor y = empty(x.sizes(), x);
  if (p.m == 0 || p.d == 0) return y;
  p.y = y.mutable_data_ptr();
  const Kernel k = plan(call);
  const Sizes sizes = k.sizes(p);
  ScratchMemory memory(sizes.shared + call.parts * sizes.thread);
  char *shared = memory.data(), *threads = shared + sizes.shared;
  k.read_parameters(p, shared);
  if (p.by_columns) {
    each_part(call.parts, [&](int64_t part) { k.project(p, shared, threads + part * sizes.thread, part, call.parts); });
    k.hidden(p, shared, nullptr);
    each_part(call.parts, [&](int64_t part) { k.expand(p, shared, threads + part * sizes.thread, nullptr, part, call.parts); });
    return y;
  }
  if (!p.own_weights) each_part(call.parts, [&](int64_t part) { k.pack(p, shared, part, call.parts); });
  each_segment(call, [&](int64_t part, int64_t, const Segment& s) { k.forward(p, shared, threads + part * sizes.thread, s); });
  return y;
}

// Runs backward into call.p.grads.
void differentiate(Call& call) {
  Problem& p = call.p;
  const Kernel k = plan(call);
  if (p.by_columns) {
    call.segments.assign(1, {0, 0, p.m});
    p.segment_rows = p.m;
  }
  const Sizes sizes = k.sizes(p);
  const int64_t segments = call.segments.size(), columns = p.wants[grad_scale] ? p.d * 8 : 0;
  ScratchMemory memory(sizes.shared + call.parts * sizes.thread + segments * sizes.partial + columns);
  char *shared = memory.data(), *threads = shared + sizes.shared, *partials = threads + call.parts * sizes.thread;
  p.scale_columns = partials + segments * sizes.partial;
  k.read_parameters(p, shared);
  if (p.by_columns) {
    each_part(call.parts, [&](int64_t part) { k.project(p, shared, threads + part * sizes.thread, part, call.parts); });
    k.hidden(p, shared, partials);
    each_part(call.parts, [&](int64_t part) { k.expand(p, shared, threads + part * sizes.thread, partials, part, call.parts); });
    return k.finish(p, call.segments.data(), segments, partials);
  }
  if (!p.own_weights) each_part(call.parts, [&](int64_t part) { k.pack(p, shared, part, call.parts); });
  each_segment(call, [&](int64_t part, int64_t i, const Segment& s) {
    k.backward(p, shared, threads + part * sizes.thread, s, partials + i * sizes.partial);
  });
  each_part(call.parts, [&](int64_t part) {
    k.reduce(p, shared, threads + part * sizes.thread, call.segments.data(), segments, partials, part, call.parts);
  });
  k.finish(p, call.segments.data(), segments, partials);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients bottleneck_bwd_cpu(const Tensor& grad_y, const Tensor& x, const Tensor& down_weight, const Tensor& up_weight,
                             const Optional& down_bias, const Optional& up_bias, bool add_x, const Optional& scale,
                             double scale_value, int64_t activation, const Optional& norm_weight, const Optional& norm_bias,
                             double norm_eps, const Optional& skip_weight, const Optional& hidden_skip_weight,
                             const Optional& adapter_ids, std::vector<bool> output_mask) {
  const Arguments a{x, down_weight, up_weight, down_bias, up_bias, scale, norm_weight, norm_bias, skip_weight,
                    hidden_skip_weight, adapter_ids, add_x, scale_value, norm_eps, activation};
  const Shapes s = shapes(a);
  FA_CHECK(output_mask.size() == gradients, "bottleneck: output_mask must have 10 entries, got ", output_mask.size());
  Call call;
  read(a, s, call);
  Problem& p = call.p;
  p.backward = true;
  p.grad_y = rows("grad_y", grad_y, x, call.grad_y_offsets);
  const Optional inputs[gradients] = {x, down_weight, up_weight, down_bias, up_bias, scale, norm_weight, norm_bias, skip_weight, hidden_skip_weight};
  std::array<Tensor, gradients> grads;
  const int64_t none = 0;
  for (int i = 0; i < gradients; ++i) {
    p.wants[i] = output_mask[i];
    FA_CHECK(!p.wants[i] || inputs[i], "bottleneck: output_mask[", i, "] asks for the gradient of an argument that is None");
    grads[i] = p.wants[i] ? empty(inputs[i]->sizes(), *inputs[i]) : empty({&none, 1}, x);
    if (p.wants[i]) p.grads[i] = grads[i].mutable_data_ptr();
  }
  schedule(a, call);
  differentiate(call);
  return std::tuple_cat(grads);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastadapt, CPU, m) {
  m.impl("bottleneck_fwd", TORCH_BOX(&bottleneck_fwd_cpu));
  m.impl("bottleneck_bwd", TORCH_BOX(&bottleneck_bwd_cpu));
}

}  // namespace fastadapt::bottleneck
