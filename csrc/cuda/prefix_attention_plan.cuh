// The host side of prefix_attention: from arrays to kernel parameters, and which kernels run.
#pragma once
#include <cmath>

#include "plan.cuh"
#include "prefix_attention.cuh"

namespace fastadapt {

// A shared prefix has three dims, the others have four.  The mask is (b, h, t, t_k); a boolean one has the kind uint8.
struct PrefixArguments {
  Array q, k, v, prefix_k, prefix_v, gate, lengths, mask, ids;
  const int64_t* seed;
  float scale;
  double dropout_p;
  int causal;
};

template <class T>
Heads as_heads(const Array& a) {
  const int64_t* stride = a.stride + a.dims - 3;
  const bool is_float = sizeof(T) == 2 && a.kind == Kind::float32;
  return Heads{a.data, a.dims == 4 ? a.stride[0] : 0, stride[0], stride[1],
      Inner{stride[2], !is_float && aligned(a, sizeof(T))}, is_float};
}

inline Integers as_integers(const Array& a) {
  return a.data ? Integers{a.data, a.stride[0], integer_bytes(a.kind), a.kind != Kind::uint8} : Integers{};
}

template <class T>
PrefixAttention describe(const PrefixArguments& a) {
  PrefixAttention p{};
  p.b = a.q.size[0], p.h = static_cast<int>(a.q.size[1]), p.t = static_cast<int>(a.q.size[2]);
  p.h_kv = static_cast<int>(a.k.size[1]), p.t_k = static_cast<int>(a.k.size[2]), p.group = p.h_kv ? p.h / p.h_kv : 1;
  p.e = static_cast<int>(a.q.size[3]), p.p = static_cast<int>(a.prefix_k.size[a.prefix_k.dims - 2]);
  p.q = as_heads<T>(a.q), p.k = as_heads<T>(a.k), p.v = as_heads<T>(a.v);
  p.prefix_k = as_heads<T>(a.prefix_k), p.prefix_v = as_heads<T>(a.prefix_v);
  p.gate = as_vector(a.gate);
  if (a.mask.data) {
    const int64_t* stride = a.mask.stride;
    const MaskKind kind = a.mask.kind == Kind::uint8        ? MaskKind::boolean
                          : a.mask.kind == kind_of<T>() ? MaskKind::same
                                                        : MaskKind::float32;
    p.mask = Mask{a.mask.data, kind, stride[0], stride[1], stride[2], stride[3]};
  }
  p.lengths = as_integers(a.lengths), p.ids = as_integers(a.ids);
  p.g = a.ids.data ? a.prefix_k.size[0] : 0;
  const double threshold = std::nearbyint(a.dropout_p * 65536);
  if (threshold > 0)
    p.dropout = Dropout{a.seed, static_cast<uint32_t>(threshold), static_cast<float>(65536 / (65536 - threshold))};
  p.own_column = round_up(p.p, 8), p.scale = a.scale, p.causal = a.causal;
  return p;
}

// Calls launch(width) with the narrowest width of tiles that holds a head, as a constant.
template <class F>
void by_width(int e, F launch) {
  if (e <= 64) launch(std::integral_constant<int, 64>{});
  else if (e <= 128) launch(std::integral_constant<int, 128>{});
  else launch(std::integral_constant<int, 256>{});
}

template <class T>
const char* prefix_attention_forward(const PrefixArguments& a, void* y, float* lse, const Device& device) {
  const PrefixAttention p = describe<T>(a);
  by_width(p.e, [&](auto width) {
    using Tile = ForwardTile<T, width()>;
    const int64_t blocks = p.b * p.h_kv * divide_up(p.group * p.t, Tile::kRows);
    launch_over(
        blocks, prefix_attention_fwd_kernel<T, width()>, Tile::kBytes, device, p, static_cast<T*>(y), lse);
  });
  return nullptr;
}

}  // namespace fastadapt
