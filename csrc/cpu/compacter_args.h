#pragma once
#include "kron_args.h"

namespace fastadapt::compacter {

using namespace fastadapt::kron;

enum Gradient {
  grad_x, grad_down_a, grad_down_s, grad_down_t, grad_up_a, grad_up_s, grad_up_t, grad_down_bias, grad_up_bias, grad_scale,
  gradients
};

struct Problem : Call {
  int64_t d = 0, r = 0, n = 0, q = 0;
  int64_t activation = 0;
  bool add_x = false;
  double scale_value = 1;
  Rows x, residual, grad_y;
  Factor down_a, down_s, down_t, up_a, up_s, up_t;
  Parameter down_bias, up_bias, scale;
  void* y = nullptr;  // (m, d), contiguous
  bool wants[gradients] = {};
  void* grads[gradients] = {};  // contiguous, dtype of the parameter
};

}  // namespace fastadapt::compacter
