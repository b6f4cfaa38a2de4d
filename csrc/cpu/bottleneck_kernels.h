// The kernels for one instruction set but those of AMX, which a translation unit of its own compiles meanwhile.
#pragma once
#include "bottleneck_columns.h"

namespace fastadapt::bottleneck::FA_TARGET {

Kernel kernel(Dtype dtype, Dtype weight_dtype) {
  return fastadapt::FA_TARGET::kernel_of<fastadapt::FA_TARGET::bottleneck::Columns>(dtype, weight_dtype);
}

}  // namespace fastadapt::bottleneck::FA_TARGET
