// The vendor library's products that the CPU sources call, element by element: here it matters where they read and write.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <stdexcept>

#include "stable_runtime.h"

namespace {

// out = added + left @ right, rounded once.
template <class T>
void multiply(const AtenTensorOpaque& out, const AtenTensorOpaque* added, const AtenTensorOpaque& left,
              const AtenTensorOpaque& right) {
  auto at = [](const AtenTensorOpaque& t, int64_t i, int64_t j) -> T& {
    return static_cast<T*>(t.data)[i * t.strides[0] + j * t.strides[1]];
  };
  for (int64_t i = 0; i < out.sizes[0]; i++)
    for (int64_t j = 0; j < out.sizes[1]; j++) {
      double sum = added ? static_cast<double>(at(*added, i, j)) : 0;
      for (int64_t p = 0; p < left.sizes[1]; p++)
        sum += static_cast<double>(at(left, i, p)) * static_cast<double>(at(right, p, j));
      at(out, i, j) = static_cast<T>(sum);
    }
}

void multiply(const AtenTensorOpaque& out, const AtenTensorOpaque* added, const AtenTensorOpaque& left,
              const AtenTensorOpaque& right) {
  for (const AtenTensorOpaque* t : {&out, added ? added : &out, &left, &right})
    if (t->sizes.size() != 2 || t->dtype != out.dtype) throw std::runtime_error("a product of no matrices of one dtype");
  if (left.sizes[1] != right.sizes[0] || out.sizes[0] != left.sizes[0] || out.sizes[1] != right.sizes[1] ||
      (added && added->sizes != out.sizes))
    throw std::runtime_error("a product of matrices that don't fit");
  if (out.dtype == aoti_torch_dtype_float64()) return multiply<double>(out, added, left, right);
  if (out.dtype == aoti_torch_dtype_float32()) return multiply<float>(out, added, left, right);
  if (out.dtype == aoti_torch_dtype_float16()) return multiply<c10::Half>(out, added, left, right);
  if (out.dtype == aoti_torch_dtype_bfloat16()) return multiply<c10::BFloat16>(out, added, left, right);
  throw std::runtime_error("a product of dtype " + std::to_string(out.dtype));
}

}  // namespace

extern "C" {

AOTITorchError aoti_torch_cpu_mm_out(AtenTensorHandle out, AtenTensorHandle left, AtenTensorHandle right) {
  multiply(*out, nullptr, *left, *right);
  return 0;
}
AOTITorchError aoti_torch_cpu_addmm_out(
    AtenTensorHandle out, AtenTensorHandle added, AtenTensorHandle left, AtenTensorHandle right, double beta, double alpha) {
  if (beta != 1 || alpha != 1) throw std::runtime_error("aoti_torch_cpu_addmm_out: only factors of 1 are known here");
  multiply(*out, added, *left, *right);
  return 0;
}
}
