#pragma once
#include "views.h"

namespace fastadapt::bottleneck {

using namespace fastadapt::cpu;

enum Gradient {
  grad_x, grad_down, grad_up, grad_down_bias, grad_up_bias, grad_scale, grad_norm_weight, grad_norm_bias, grad_skip,
  grad_hidden_skip, gradients
};

struct Problem {
  int64_t m = 0, d = 0, r = 0, g = 1;
  int64_t segment_rows = 0;  // at most, in backward
  Dtype dtype = Dtype::float32, weight_dtype = Dtype::float32;
  int64_t activation = 0;
  bool add_x = false, bank = false, backward = false, by_columns = false;
  bool own_weights = false;  // each thread packs the weights of its segments for itself
  bool scale_varies = false;  // it is a vector, though its stride may be 0
  double scale_value = 1, norm_eps = 0;
  Rows x, residual, grad_y;
  Weight down, up;
  Parameter down_bias, up_bias, scale, norm_weight, norm_bias, skip, hidden_skip;
  const int64_t* order = nullptr;  // the rows sorted by adapter; null: as they come
  void* y = nullptr;               // (m, d), contiguous
  bool wants[gradients] = {};
  void* grads[gradients] = {};     // contiguous, dtype of the parameter
  void* scale_columns = nullptr;   // (d,) of the compute type, where grad_scale is wanted
};

struct Sizes {
  int64_t shared, thread, partial;  // bytes; one `partial` a segment
};

// The entry points of one instruction set and one pair of dtypes. All memory comes from the caller, 64-byte aligned.
struct Kernel {
  Sizes (*sizes)(const Problem&);
  // Reads the small parameters; then, without own_weights, packs the weights: part `part` of `parts`.
  void (*read_parameters)(const Problem&, void* shared);
  void (*pack)(const Problem&, void* shared, int64_t part, int64_t parts);
  void (*forward)(const Problem&, void* shared, void* thread, const Segment&);
  void (*backward)(const Problem&, void* shared, void* thread, const Segment&, void* partial);
  // Adds what the segments left, in order, and writes the gradients of the weights.
  void (*reduce)(const Problem&, void* shared, void* thread, const Segment*, int64_t segments, void* partials, int64_t part,
                 int64_t parts);
  // After every part of reduce.
  void (*finish)(const Problem&, const Segment*, int64_t segments, void* partials);
  int64_t chunk_rows;  // fewer rows are not worth a segment of their own in backward
  // With by_columns, after read_parameters and in place of pack, forward or backward, and reduce; null where there is no such
  // way. `hidden` runs alone between the parts of the others.
  void (*project)(const Problem&, void* shared, void* thread, int64_t part, int64_t parts);
  void (*hidden)(const Problem&, void* shared, void* partial);
  void (*expand)(const Problem&, void* shared, void* thread, void* partial, int64_t part, int64_t parts);
  int64_t most_column_rows;  // for by_columns; 0 is no limit
};

}  // namespace fastadapt::bottleneck
