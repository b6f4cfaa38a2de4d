// What the leaves for CUDA share: they check what protects memory, hand arrays to a plan, and run it where the tensors are.
#pragma once
#include <deque>
#include <initializer_list>
#include <optional>
#include <vector>

#include "plan.cuh"
#include "stream.h"

namespace fastadapt {
namespace {  // as torch's own tensor, nothing here is visible outside of the library

using Optional = std::optional<Tensor>;

// Checks the arguments of a call of an op.
struct Checker {
  const char* op;
  const Tensor& x;
  const char* x_name = "x";

  Array array(const Tensor& t, const char* name) const {
    void* data = const_cast<void*>(elements(op, name, t));  // arguments are only read, and what is written is new
    return Array{data, kind(t.scalar_type(), name), static_cast<int>(t.dim()), t.sizes().data(), t.strides().data()};
  }
  Kind kind(ScalarType type, const char* name) const {
    switch (type) {
      case ScalarType::Float: return Kind::float32;
      case ScalarType::Half: return Kind::float16;
      case ScalarType::BFloat16: return Kind::bfloat16;
      case ScalarType::Long: return Kind::int64;
      case ScalarType::Int: return Kind::int32;
      case ScalarType::Short: return Kind::int16;
      case ScalarType::Char: return Kind::int8;
      case ScalarType::Byte: return Kind::uint8;
      default: FA_CHECK(false, op, ": ", name, " has an unsupported dtype, got ", torch::headeronly::toString(type));
    }
  }
  void activation() const {
    FA_CHECK(x.is_cuda(), op, ": ", x_name, " must be on a CUDA device");
    const ScalarType type = x.scalar_type();
    FA_CHECK(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16, op,
        ": ", x_name, " must be float16, bfloat16 or float32 on CUDA, got ", torch::headeronly::toString(type));
    FA_CHECK(x.dim() >= 1, op, ": ", x_name, " must have at least one dim, got a 0-d tensor");
  }
  void device(const Tensor& t, const char* name) const {
    FA_CHECK(t.is_cuda() && t.get_device_index() == x.get_device_index(), op, ": ", name, " must be on the device of ", x_name);
  }
  void shape(const Tensor& t, const char* name, std::initializer_list<int64_t> sizes) const {
    bool same = t.dim() == static_cast<int64_t>(sizes.size());
    int64_t i = 0;
    for (int64_t size : sizes) same = same && t.size(i++) == size;
    FA_CHECK(same, op, ": ", name, " has the wrong shape");
  }
  // Rows like those of x, of `columns` columns, in the dtype of x.
  Array rows(const Tensor& t, const char* name, int64_t columns) const {
    device(t, name);
    bool same = t.scalar_type() == x.scalar_type() && t.dim() == x.dim() && t.size(-1) == columns;
    for (int64_t i = 0; same && i < x.dim() - 1; i++) same = t.size(i) == x.size(i);
    FA_CHECK(same, op, ": ", name, " must have the leading dims and dtype of x and ", columns, " columns");
    return array(t, name);
  }
  // A parameter in the dtype of x or float32; absent if t is.
  Array parameter(const Optional& t, const char* name, std::initializer_list<int64_t> sizes) const {
    if (!t) return Array{};
    device(*t, name);
    shape(*t, name, sizes);
    FA_CHECK(t->scalar_type() == x.scalar_type() || t->scalar_type() == ScalarType::Float, op, ": ", name,
        " must have the dtype of ", x_name, " or float32");
    return array(*t, name);
  }
  // The adapters of the rows of a bank of `g`; absent if t is.
  Array adapter_ids(const Optional& t, int64_t g) const {
    if (!t) return Array{};
    FA_CHECK(g < 65536, op, ": a bank holds at most 65535 adapters in the native CUDA kernel, got ", g);
    device(*t, "adapter_ids");
    const Array ids = array(*t, "adapter_ids");
    FA_CHECK(ids.kind >= Kind::int64, op, ": adapter_ids must be an integer tensor");
    const bool a_sequence = x.dim() > 1 && t->dim() == 1;
    FA_CHECK(a_sequence || t->dim() == x.dim() - 1, op, ": adapter_ids must have one id a sequence or one a token");
    for (int64_t i = 0; i < t->dim(); i++)
      FA_CHECK(t->size(i) == x.size(i), op, ": adapter_ids must match the leading dims of x");
    return ids;
  }
  // Where the seed of dropout lies; nullptr without one.
  const int64_t* seed(const Optional& t, double p) const {
    FA_CHECK(p >= 0 && p < 1, op, ": dropout_p must lie in [0, 1), got ", p);
    FA_CHECK(p == 0 || t, op, ": dropout needs a seed");
    if (!t) return nullptr;
    device(*t, "seed");
    FA_CHECK(t->scalar_type() == ScalarType::Long && t->numel() == 1, op, ": seed must be one int64");
    return static_cast<const int64_t*>(elements(op, "seed", *t));
  }
  // Fresh gradients like the inputs where they are wanted, of shape (0,) elsewhere; `arrays` gets those that have elements.
  template <size_t N>
  std::vector<Tensor> gradients(
      const std::vector<bool>& wanted, const Optional (&inputs)[N], Array* const (&arrays)[N]) const {
    FA_CHECK(wanted.size() == N, op, ": output_mask must have ", N, " entries, got ", wanted.size());
    std::vector<Tensor> grads;
    grads.reserve(N);
    const int64_t none[] = {0};
    for (size_t i = 0; i < N; i++) {
      const bool given = wanted[i] && inputs[i];
      const Tensor& like = given ? *inputs[i] : x;
      grads.push_back(given ? torch::stable::new_empty(like, like.sizes()) : torch::stable::new_empty(like, {none, 1}));
      if (given && grads[i].numel() > 0) *arrays[i] = array(grads[i], "gradient");
    }
    return grads;
  }
};

// Runs plan(T{}, device) for the dtype of x, on the device and the current stream of x.
template <class Plan>
void run(const char* op, const Tensor& x, Plan plan) {
  const int32_t index = x.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(index);
  std::deque<Tensor> workspace;  // freed with the call; the allocator keeps the memory until the stream is past it
  const Device device{device_attribute(cudaDevAttrMultiProcessorCount, index),
      device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index), current_stream(index), [&](int64_t bytes) {
        const int64_t size[] = {bytes > 0 ? bytes : 1};
        workspace.push_back(torch::stable::new_empty(x, {size, 1}, ScalarType::Byte));
        return workspace.back().mutable_data_ptr();
      }};
  const char* error = x.scalar_type() == ScalarType::Float  ? plan(float{}, device)
                      : x.scalar_type() == ScalarType::Half ? plan(f16{}, device)
                                                            : plan(bf16{}, device);
  FA_CHECK(!error, op, ": ", error);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace
}  // namespace fastadapt
