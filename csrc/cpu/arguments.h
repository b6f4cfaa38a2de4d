// The arguments of a call, read from the stable ABI and checked: everything that would read or write outside of a tensor, or
// that the formulas don't define.
#pragma once
#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../common.h"
#include "pages.h"
#include "views.h"

namespace fastadapt::cpu {

using Optional = std::optional<Tensor>;
using torch::headeronly::toString;

template <class Sizes>
std::string shape_of(const Sizes& sizes) {
  std::string s;
  for (int64_t size : sizes) s += (s.empty() ? "" : ", ") + std::to_string(size);
  return "(" + s + ")";
}

inline Dtype dtype_of(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Half: return Dtype::float16;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    default: return Dtype::float64;
  }
}

inline int64_t item_size(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

// Offsets of every index over the dims [first, first + dims).
inline std::vector<int64_t> index_offsets(const Tensor& t, int64_t dims, int64_t first = 0) {
  std::vector<int64_t> offsets{0};
  for (int64_t i = first; i < first + dims; ++i) {
    std::vector<int64_t> longer;
    longer.reserve(offsets.size() * t.size(i));
    for (int64_t base : offsets)
      for (int64_t j = 0; j < t.size(i); ++j) longer.push_back(base + j * t.stride(i));
    offsets.swap(longer);
  }
  return offsets;
}

// Uninitialised and contiguous, of a dtype of the shim.
inline Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, int32_t dtype) {
  int64_t local[8];
  std::vector<int64_t> many(sizes.size() > 8 ? sizes.size() : 0);
  int64_t *strides = many.empty() ? local : many.data(), stride = 1;
  for (int64_t i = static_cast<int64_t>(sizes.size()) - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= std::max<int64_t>(1, sizes[i]);
  }
  AtenTensorHandle out;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(sizes.size(), sizes.data(), strides, dtype, aoti_torch_device_type_cpu(), -1, &out));
  Tensor t(out);
  prefer_large_pages(t.mutable_data_ptr(), stride * aoti_torch_dtype_element_size(dtype));
  return t;
}

inline Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, const Tensor& like) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return empty(sizes, dtype);
}

// Reads what belongs to x, an activation (..., columns), in a call of `op`.
class Reader {
 public:
  const char* const op;
  const Tensor& x;
  const ScalarType dtype;
  int64_t m = 1, columns = 0;
  bool bank = false;  // set both before reading the parameters of a bank
  int64_t g = 1;

  Reader(const char* op, const Tensor& x) : op(op), x(x), dtype(x.scalar_type()) {
    FA_CHECK(dtype == ScalarType::Double || dtype == ScalarType::Float || narrow(), op,
             ": x must be float16, bfloat16, float32 or float64, got ", toString(dtype));
    FA_CHECK(x.is_cpu(), op, ": x must be on the CPU");
    FA_CHECK(x.dim() >= 1, op, ": x must have at least one dim, got a 0-d tensor");
    const auto sizes = x.sizes();
    columns = sizes[sizes.size() - 1];
    for (size_t i = 0; i + 1 < sizes.size(); ++i) m *= sizes[i];
  }

  // An activation with the leading dims of x and `width` columns. Leading dims become one stride where their strides allow it,
  // and a table of offsets otherwise. With `first` 1 it is the first one of a stack of them.
  Rows rows(const char* name, const Tensor& t, int64_t width, std::vector<int64_t>& offsets, int64_t first = 0) const {
    const auto sizes = t.sizes(), strides = t.strides(), like = x.sizes();
    const int64_t leading = static_cast<int64_t>(like.size()) - 1, last = first + leading;
    const bool fits = sizes.size() == like.size() + first && std::equal(like.begin(), like.end() - 1, sizes.begin() + first);
    FA_CHECK(fits && sizes[last] == width && t.scalar_type() == dtype && t.is_cpu(), op, ": ", name,
             " must have the dtype and the leading dims of x, ", toString(dtype), " ", shape_of(like), ", and ", width,
             " columns, got ", toString(t.scalar_type()), " ", shape_of(sizes));
    Rows out{elements(op, name, t), 0, width > 1 ? strides[last] : 1};
    int64_t span = -1;  // the stride with which the next dim outwards would merge
    bool merged = true;
    for (int64_t i = last - 1; i >= first; --i) {
      if (sizes[i] == 1) continue;
      if (span < 0)
        out.ld = strides[i];
      else
        merged = merged && strides[i] == span;
      span = strides[i] * sizes[i];
    }
    if (!merged) {
      offsets = index_offsets(t, leading, first);
      out.offsets = offsets.data();
    }
    return out;
  }

  // (size,), or (g, size) where `banked` and the call has a bank.
  Parameter parameter(const char* name, const Optional& t, int64_t size, bool banked) const {
    if (!t) return {};
    check(name, *t, banked, {size});
    return {elements(op, name, *t), t->scalar_type() == dtype, banked && bank ? t->stride(0) : 0, t->stride(banked && bank)};
  }

  // (size,), or one number for all.
  Parameter broadcast_parameter(const char* name, const Optional& t, int64_t size) const {
    if (!t || t->dim()) return parameter(name, t, size, false);
    check(name, *t, false, {});
    return {elements(op, name, *t), t->scalar_type() == dtype, 0, 0};
  }

  // (rows, columns), or (g, rows, columns) where `banked` and the call has a bank.
  Weight weight(const char* name, const Tensor& t, int64_t rows, int64_t columns, bool banked) const {
    check(name, t, banked, {rows, columns});
    const auto strides = t.strides();
    const int64_t first = banked && bank;
    return {elements(op, name, t), first ? strides[0] : 0, strides[first], strides[first + 1]};
  }

  // (terms, rows, columns), or (g, terms, rows, columns) where the call has a bank.
  Factor factor(const char* name, const Tensor& t, int64_t terms, int64_t rows, int64_t columns) const {
    check(name, t, true, {terms, rows, columns});
    const auto strides = t.strides();
    return {elements(op, name, t), bank ? strides[0] : 0, strides[bank], strides[bank + 1], strides[bank + 2]};
  }

  // The adapter of every row, from one id a sequence or one a token.
  std::vector<int64_t> adapters(const Tensor& ids) const {
    const auto sizes = ids.sizes(), leading = x.sizes();
    const size_t dims = leading.size() - 1;
    bool fits = ids.is_cpu() && (sizes.size() == dims || (sizes.size() == 1 && dims >= 1));
    for (size_t i = 0; fits && i < sizes.size(); ++i) fits = sizes[i] == leading[i];
    FA_CHECK(fits, op, ": adapter_ids must have one entry a sequence or one a token of x ", shape_of(leading), ", got ",
             shape_of(sizes));
    switch (ids.scalar_type()) {
      case ScalarType::Long: return row_ids<int64_t>(ids);
      case ScalarType::Int: return row_ids<int32_t>(ids);
      case ScalarType::Short: return row_ids<int16_t>(ids);
      case ScalarType::Char: return row_ids<int8_t>(ids);
      case ScalarType::Byte: return row_ids<uint8_t>(ids);
      default: FA_CHECK(false, op, ": adapter_ids must be an integer tensor, got ", toString(ids.scalar_type()));
    }
  }

 private:
  bool narrow() const { return dtype == ScalarType::Half || dtype == ScalarType::BFloat16; }

  void check(const char* name, const Tensor& t, bool banked, std::initializer_list<int64_t> shape) const {
    const auto sizes = t.sizes();
    const size_t first = banked && bank;
    FA_CHECK(t.is_cpu(), op, ": ", name, " must be on the CPU like x");
    const bool fits = sizes.size() == shape.size() + first && (!first || sizes[0] == g) &&
                      std::equal(shape.begin(), shape.end(), sizes.begin() + first);
    FA_CHECK(fits, op, ": ", name, " must be ",
             first ? "a bank of " + std::to_string(g) + " " : "", shape_of(shape), ", got ", shape_of(sizes));
    FA_CHECK(t.scalar_type() == dtype || (narrow() && t.scalar_type() == ScalarType::Float), op, ": ", name,
             " must have the dtype of x, ", toString(dtype), narrow() ? ", or float32" : "", ", got ",
             toString(t.scalar_type()));
  }

  template <class I>
  std::vector<int64_t> row_ids(const Tensor& ids) const {
    std::vector<int64_t> out;
    out.reserve(m);
    const I* data = static_cast<const I*>(elements(op, "adapter_ids", ids));
    const int64_t count = ids.numel(), repeat = count ? m / count : 0;
    for (int64_t offset : index_offsets(ids, ids.dim())) {
      const int64_t id = static_cast<int64_t>(data[offset]);
      FA_CHECK(id >= -1 && id < g, op, ": adapter_ids must lie in [-1, ", g - 1, "] for a bank of ", g, ", got ", id);
      out.insert(out.end(), repeat, id);
    }
    return out;
  }
};

// The gradients of a call: empty where they aren't wanted, zero where no row would write them.
template <size_t N>
std::array<Tensor, N> gradients_of(const char* op, const Tensor& x, const Optional (&inputs)[N],
                                   const std::vector<bool>& output_mask, bool zero, bool* wants, void** data) {
  FA_CHECK(output_mask.size() == N, op, ": output_mask must have ", N, " entries, got ", output_mask.size());
  std::array<Tensor, N> grads;
  const int64_t none = 0;
  for (size_t i = 0; i < N; ++i) {
    wants[i] = output_mask[i];
    FA_CHECK(!wants[i] || inputs[i], op, ": output_mask[", i, "] asks for the gradient of an argument that is None");
    grads[i] = wants[i] ? empty(inputs[i]->sizes(), *inputs[i]) : empty({&none, 1}, x);
    data[i] = grads[i].mutable_data_ptr();
    if (wants[i] && zero && grads[i].numel())
      memset(data[i], 0, grads[i].numel() * item_size(dtype_of(grads[i].scalar_type())));
  }
  return grads;
}

}  // namespace fastadapt::cpu
