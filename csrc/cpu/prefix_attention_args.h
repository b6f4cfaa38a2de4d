// A call of prefix_attention as its kernels see it: plain memory and strides, in elements. Free of PyTorch, see types.h.
#pragma once
#include "types.h"

namespace fastadapt::prefix_attention {

enum Gradient { grad_q, grad_k, grad_v, grad_prefix_k, grad_prefix_v, grad_gate, gradients };

// Element (i, j, l, c) of a 4-D tensor is at data[i * stride[0] + j * stride[1] + l * stride[2] + c * stride[3]].
struct Heads {
  const void* data = nullptr;
  int64_t stride[4] = {};
};

// attn_mask: none, or what its elements are. `like_q` where it has the dtype of q, float32 or float64 too.
enum class Mask { none, boolean, like_q, float32 };

struct Problem {
  int64_t b = 0, h = 0, h_kv = 0, t = 0, t_k = 0, e = 0, p = 0;
  Dtype dtype = Dtype::float32;
  bool wide_parameters = false;  // prefix_k and prefix_v are float32 under a 16-bit q
  bool is_causal = false;
  double scale = 1, kept_scale = 1;  // kept_scale: of what dropout leaves
  uint32_t dropped = 0;              // of 65536 weights
  uint64_t seed = 0;
  Heads q, k, v;               // (b, h, t, e), (b, h_kv, t_k, e) twice
  Heads prefix_k, prefix_v;    // (prefixes, h_kv, p, e) twice
  int64_t prefixes = 1;        // 1: that of the whole batch
  Mask mask_kind = Mask::none;
  Heads mask;                  // (b, h, t, t_k)
  const int64_t* prefix_of = nullptr;    // of each sequence, -1: none; never null
  const int64_t* key_lengths = nullptr;  // of each sequence; never null
  const int64_t* order = nullptr;        // the sequences, those of a prefix one behind the other
  const double* gate = nullptr;          // (h,)
  bool wide_gate = false;                // float32 under a 16-bit q
  void* y = nullptr;    // (b, t, h, e)
  void* lse = nullptr;  // (1 or with a gate 2, b, h, t) of the compute type, by base e; null where forward needn't keep it

  // Forward: a unit is the queries that one thread takes through all keys, `unit_heads` heads of `unit_queries` queries.
  int64_t unit_heads = 1, unit_queries = 1, units = 0;

  // Backward.
  Heads grad_y, saved_y;  // (b, h, t, e)
  const void* saved_lse = nullptr;
  bool wants[gradients] = {};
  void* grads[gradients] = {};  // of q, k, v: (b, t, heads, e); of the parameters: contiguous in their shape and dtype
};

// The entry points of one instruction set and one pair of dtypes. All memory comes from the caller, 64-byte aligned.
struct Kernel {
  int64_t (*thread_bytes)(const Problem&);
  void (*begin)(const Problem&, void* thread);  // before the units of a thread
  void (*forward)(const Problem&, void* thread, int64_t unit);
};

// Backward goes in phases with a barrier between them; each has units that threads take in any order. `shared` is for all
// threads and phases.
constexpr int backward_phases = 3;
struct BackwardKernel {
  int64_t (*shared_bytes)(const Problem&);
  int64_t (*thread_bytes)(const Problem&);
  int64_t (*units)(const Problem&, int phase);
  void (*run)(const Problem&, int phase, void* shared, void* thread, int64_t unit);
};

}  // namespace fastadapt::prefix_attention
