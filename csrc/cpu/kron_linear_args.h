#pragma once
#include "kron_args.h"

namespace fastadapt::kron_linear {

using namespace fastadapt::kron;

enum Gradient { grad_x, grad_a, grad_s, grad_t, grad_bias, gradients };

struct Problem : Call {
  int64_t terms = 0, q = 0;
  Shape in, out;  // (a_in, b_in), (a_out, b_out)
  double scale = 1;
  Rows x, residual, grad_y;
  Factor a, s, t;
  Parameter bias;
  void* y = nullptr;  // (m, a_out * b_out), contiguous
  bool wants[gradients] = {};
  void* grads[gradients] = {};  // contiguous, dtype of the parameter
};

}  // namespace fastadapt::kron_linear
