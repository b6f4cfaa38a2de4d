// The kernels of both ops for one instruction set, in one translation unit, since they share their products.
#pragma once
#include "compacter_reduce.h"
#include "kron_linear_rows.h"

namespace fastadapt::compacter::FA_TARGET {
Kernel<Problem> kernel(Dtype dtype) {
  using namespace fastadapt::FA_TARGET::compacter;
  return dtype == Dtype::float64 ? Reduce<double>::kernel() : Reduce<float>::kernel();
}
}  // namespace fastadapt::compacter::FA_TARGET

namespace fastadapt::kron_linear::FA_TARGET {
Kernel<Problem> kernel(Dtype dtype) {
  using namespace fastadapt::FA_TARGET::kron_linear;
  return dtype == Dtype::float64 ? Pass<double>::kernel() : Pass<float>::kernel();
}
}  // namespace fastadapt::kron_linear::FA_TARGET
