// The host side of bottleneck's backward: which gradients need which kernels.
#pragma once
#include "bottleneck_gradients.cuh"
#include "bottleneck_plan.cuh"

namespace fastadapt {

// Contiguous outputs; data is nullptr where a gradient isn't wanted.
struct Outputs {
  Array x, down_weight, up_weight, down_bias, up_bias, scale, norm_weight, norm_bias, skip, hidden_skip;
};

// What the wanted gradients ask for.  A gradient that isn't wanted costs no product and no pass.
struct Needs {
  bool up, down;           // the products grad_y.T @ hidden and x.T @ grad_z
  bool grad_y, grad_skip;  // the sums of grad_y and of grad_y * x
  bool grad_z_sum, hidden_sums, grad_z, z, rows, norm_products;

  Needs(const Outputs& o, const Bottleneck& p) {
    const bool norm = p.norm_weight.data;
    up = o.up_weight.data || o.scale.data;
    down = o.down_weight.data || o.norm_weight.data;
    grad_y = o.up_bias.data || (o.scale.data && p.up_bias.data);
    grad_skip = o.skip.data;
    grad_z_sum = o.down_bias.data || o.norm_bias.data || (o.down_weight.data && p.norm_bias.data);
    hidden_sums = grad_z_sum || o.hidden_skip.data;
    grad_z = o.x.data || down || hidden_sums;
    z = up || o.hidden_skip.data || (grad_z && p.activation != kIdentity) || (o.x.data && norm);
    rows = z || grad_z;
    norm_products = o.x.data && norm;
  }
};

template <class T>
void launch_rows(const Backward& q, int64_t tiles, int tile_rows, const Device& device) {
  if (tile_rows == 64) launch_over(tiles, bottleneck_bwd_rows_kernel<T, 64>, Block<T, 64>::bytes(q.p.r), device, q);
  else launch_over(tiles, bottleneck_bwd_rows_kernel<T, 16>, Block<T, 16>::bytes(q.p.r), device, q);
}

// Everything that adds over rows: the planes of the weights' gradients, the sums, and their reduction.
template <class T>
Gradients launch_planes(const Backward& q, const Needs& needs, const Outputs& o, int64_t tiles, const Device& device) {
  const Bottleneck& p = q.p;
  const int64_t g = p.groups.g, gd = g * p.d;
  auto floats = [&](bool wanted, int64_t n) {
    return wanted ? static_cast<float*>(device.allocate(n * sizeof(float))) : nullptr;
  };
  Gradients w{};
  w.q = q;
  const int64_t blocks = divide_up(p.d, kN) * (p.r > 0 ? divide_up(p.r, kN) : 1) * g * (needs.up + needs.down);
  w.splits = split_count(blocks, p.m, 4 * Shape<T>::kDepth, device);
  w.sum_splits = split_count(divide_up(p.d, kThreads) * g, p.m, 64, device);
  w.up = floats(needs.up, w.splits * gd * p.r);
  w.down = floats(needs.down, w.splits * gd * p.r);
  w.grad_y = floats(needs.grad_y, (needs.up ? w.splits : w.sum_splits) * gd);
  w.grad_skip = floats(needs.grad_skip, w.sum_splits * gd);
  w.grad_scale = floats(o.scale.data, gd);
  w.grad_norm_weight = floats(o.norm_weight.data, gd);
  w.grad_norm_bias = floats(o.norm_bias.data, gd);
  w.grad_up = o.up_weight.data, w.grad_down = o.down_weight.data;
  w.weight_is_float = (o.up_weight.data ? o.up_weight : o.down_weight).kind == Kind::float32;
  if (needs.hidden_sums) {
    float* sums = floats(true, 2 * g * p.r);
    w.hidden_sums = sums;
    launch_over(divide_up(p.r, 32) * g, bottleneck_bwd_hidden_sums_kernel, kThreads * sizeof(float), device, q, tiles, sums);
  }
  if (needs.up || needs.down) launch_over(blocks * w.splits, bottleneck_bwd_weights_kernel<T>, Outer<T>::kBytes, device, w);
  if (needs.grad_skip || (needs.grad_y && !needs.up))
    launch_over(divide_up(p.d, kThreads) * g * w.sum_splits, bottleneck_bwd_sums_kernel<T>, 0, device, w);
  const int64_t reduce_blocks = divide_up(p.d, kReduceTile) * g;
  if (needs.up) launch_over(reduce_blocks, bottleneck_bwd_reduce_up_kernel<T>, 0, device, w);
  if (needs.down || o.norm_bias.data)
    launch_over(
        reduce_blocks, bottleneck_bwd_reduce_down_kernel<T>, kReduceTile * (kReduceTile + 1) * sizeof(float), device, w);
  return w;
}

template <class T>
void launch_vectors(const Gradients& w, const Needs& needs, const Outputs& o, const Device& device) {
  const Bottleneck& p = w.q.p;
  const int64_t g = p.groups.g;
  VectorGradients v{p, 0, {}};
  int64_t most = 0;
  auto add = [&](const Array& out, const float* parts, int64_t splits, int64_t n, Extent extent, bool scaled = false) {
    if (!out.data) return;
    v.of[v.count++] = VectorGradient{parts, splits, n, extent, scaled, out.kind == Kind::float32, out.data};
    const int64_t threads = extent == Extent::total ? 1 : extent == Extent::adapter ? g * n : n;
    if (threads > most) most = threads;
  };
  add(o.down_bias, w.hidden_sums, 1, p.r, Extent::adapter);
  add(o.up_bias, w.grad_y, needs.up ? w.splits : w.sum_splits, p.d, Extent::adapter, true);
  add(o.scale, w.grad_scale, 1, p.d, o.scale.dims ? Extent::all : Extent::total);
  add(o.norm_weight, w.grad_norm_weight, 1, p.d, Extent::all);
  add(o.norm_bias, w.grad_norm_bias, 1, p.d, Extent::all);
  add(o.skip, w.grad_skip, w.sum_splits, p.d, Extent::all);
  if (o.hidden_skip.data) add(o.hidden_skip, w.hidden_sums + g * p.r, 1, p.r, Extent::all);
  if (most == 0) return;
  const dim3 grid(static_cast<unsigned>(divide_up(most, kThreads)), v.count);
  launch(bottleneck_bwd_vectors_kernel<T>, grid, kThreads, kThreads * sizeof(float), device.stream, v);
}

template <class T>
const char* bottleneck_backward(const Arguments& a, const Outputs& o, const Device& device) {
  Backward q{};
  int rows;
  if (const char* error = describe<T>(q.p, rows, a, device)) return error;
  const Bottleneck& p = q.p;
  q.p.out = o.x.data;
  const Needs needs(o, p);
  const int64_t tiles = tile_count(p, rows), g = p.groups.g;
  auto allocate = [&](int64_t n, int64_t element) { return device.allocate(n * element); };
  q.needs_z = needs.z, q.needs_grad_z = needs.grad_z;
  q.work_row = divide_up(p.r, Shape<T>::kVector) * Shape<T>::kVector;
  if (needs.up) q.hidden = allocate(p.m * q.work_row, sizeof(T));
  if (needs.down) q.grad_z = allocate(p.m * q.work_row, sizeof(T));
  if (needs.down && p.norm_weight.data) q.statistics = static_cast<float*>(allocate(p.m * 2, sizeof(float)));
  if (needs.hidden_sums) q.hidden_sums = static_cast<float*>(allocate(tiles * 2 * p.r, sizeof(float)));
  if (needs.norm_products) {
    q.norm_products = static_cast<float*>(allocate(g * 2 * p.r, sizeof(float)));
    launch_over(divide_up(g * p.r, kWarps), bottleneck_norm_products_kernel<T>, 0, device, q);
  }
  if (needs.rows) launch_rows<T>(q, tiles, rows, device);
  const Gradients w = launch_planes<T>(q, needs, o, tiles, device);
  launch_vectors<T>(w, needs, o, device);
  return nullptr;
}

}  // namespace fastadapt
