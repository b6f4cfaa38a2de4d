// The host side of lora_linear: which kernels run.
#pragma once
#include <cmath>

#include "lora_linear_gradients.cuh"
#include "plan.cuh"

namespace fastadapt {

// u is read in backward, written in forward; y is read for the gradient of gain.  grad_y is absent in forward.
struct LoraArguments {
  Array x, grad_y, y, u, weight, bias, lora_a, lora_b, diagonal, gain;
  const int64_t* seed;
  float scale;
  double dropout_p;
};

// Contiguous outputs; data is nullptr where a gradient isn't wanted.
struct LoraGradients {
  Array x, weight, bias, lora_a, lora_b, diagonal, gain;
};

// What every step needs of a call.
template <class T>
struct LoraPlan {
  const LoraArguments& a;
  const Device& device;
  int64_t m = 1, work_row;
  int n, k, r;
  Rows x, grad_y;
  Dropout dropout{};
  Vector diagonal;
  const char* error = nullptr;

  LoraPlan(const LoraArguments& arguments, const Device& on) : a(arguments), device(on) {
    for (int i = 0; i < a.x.dims - 1; i++) m *= a.x.size[i];
    n = static_cast<int>(a.weight.size[0]), k = static_cast<int>(a.weight.size[1]), r = static_cast<int>(a.lora_a.size[0]);
    work_row = divide_up(r, Shape<T>::kVector) * Shape<T>::kVector;
    if (!as_rows<T>(x, a.x) || !as_rows<T>(grad_y, a.grad_y)) error = "more than 8 leading dims that can't be joined";
    diagonal = as_vector(a.diagonal);
    const double threshold = std::nearbyint(a.dropout_p * 65536);
    if (threshold > 0)
      dropout = Dropout{a.seed, static_cast<uint32_t>(threshold), static_cast<float>(65536 / (65536 - threshold))};
  }
  float* floats(int64_t count) const { return static_cast<float*>(device.allocate(count * sizeof(float))); }
  void* work() const { return device.allocate(m * work_row * sizeof(T)); }

  // sum = factor * the sum of planes (count, m, r); work = scale * diagonal * sum.
  void finish(const float* planes, int64_t count, int64_t row, int64_t column, float factor, float* sum, void* work) const {
    const Finish f{m, r, planes, count, m * r, row, column, factor, a.scale, diagonal, sum, work, work_row};
    launch_over(least<int64_t>(divide_up(m * r, kThreads), 4096), lora_linear_finish_kernel<T>, 0, device, f);
  }

  // sum = drop(rows) @ weight.T, (m, r); work = scale * diagonal * sum.  The weight is (r, depth), or (depth, r) if TRANSPOSED.
  template <bool TRANSPOSED>
  void narrow(const Rows& rows, int depth, const Array& weight, const Dropout& drop, float* sum, void* work) const {
    const int64_t chunks = divide_up(depth, kChunk), tiles = divide_up(m, NarrowTile<T>::kRows) * divide_up(r, kN);
    Narrow p{m, depth, r, rows, as_weight<T>(weight, device), drop, 1, chunks, sum};
    if (chunks > 1 && m > 0) p.splits = least(chunks, divide_up(2 * device.multiprocessors, tiles));
    if (p.splits > 1) p.planes = floats(chunks * m * r);
    if (chunks) launch_over(tiles * p.splits, lora_linear_narrow_kernel<T, TRANSPOSED>, NarrowTile<T>::kBytes, device, p);
    const float factor = drop.threshold ? drop.scale : 1.f;
    finish(p.planes, p.splits > 1 ? chunks : least<int64_t>(chunks, 1), r, 1, factor, sum, work);
  }

  template <int BM, int BN, bool TRANSPOSED>
  void launch_extended(const Extended& p) const {
    launch_over(divide_up(p.m, BM) * divide_up(p.n, BN), lora_linear_extended_kernel<T, BM, BN, TRANSPOSED>,
        ExtendedTile<T, BM, BN>::kBytes, device, p);
  }
  template <bool TRANSPOSED>
  void launch_tiles(const Extended& p) const {
    // Tall tiles read each operand half as often, once there are enough of them.
    if constexpr (sizeof(T) == 2)
      if (divide_up(p.m, 128) * divide_up(p.n, 128) >= device.multiprocessors)
        return launch_extended<128, 128, TRANSPOSED>(p);
    launch_extended<64, 64, TRANSPOSED>(p);
  }

  // Fills the weights of p, (n, k) and (n, r), and runs it.  A layer that keeps its weight the other way round has the
  // adapter's repacked, which is small.
  void extended(Extended& p, const Matrix& weight, const Matrix& adapter) const {
    const bool transposed = !aligned(weight.array(), sizeof(T)) && aligned(weight.transposed().array(), sizeof(T));
    p.weight = as_weight<T>(transposed ? weight.transposed().array() : weight.array(), device);
    p.adapter = as_weight<T>(transposed ? adapter.transposed().array() : adapter.array(), device);
    if (transposed) launch_tiles<true>(p);
    else launch_tiles<false>(p);
  }
};

template <class T>
const char* lora_linear_forward(const LoraArguments& a, void* y, const Device& device) {
  const LoraPlan<T> plan(a, device);
  if (plan.error) return plan.error;
  void* work = plan.work();
  plan.template narrow<false>(plan.x, plan.k, a.lora_a, plan.dropout, static_cast<float*>(a.u.data), work);
  Extended p{plan.m, plan.n, plan.k, plan.r, plan.x, work, plan.work_row, {}, {}, as_vector(a.gain), as_vector(a.bias), {}, y};
  plan.extended(p, Matrix(a.weight), Matrix(a.lora_b));
  return nullptr;
}

// gain * grad_y, or grad_y itself without a gain.
template <class T>
Rows gained(const LoraPlan<T>& plan) {
  if (!plan.a.gain.data) return plan.grad_y;
  const int64_t row = divide_up(plan.n, Shape<T>::kVector) * Shape<T>::kVector;
  const Gained p{plan.m, plan.n, plan.grad_y, as_vector(plan.a.gain), plan.device.allocate(plan.m * row * sizeof(T)), row};
  launch_over(divide_up(p.n, kThreads) * least<int64_t>(p.m, 4096), lora_linear_gain_kernel<T>, 0, plan.device, p);
  Rows rows{p.out, Inner{1, 1}, 1, {}, {}};
  rows.size[0] = p.m, rows.stride[0] = row;
  return rows;
}

// The sums over rows and the planes, and what becomes of them.
template <class T>
struct LoraReduction {
  const LoraPlan<T>& plan;
  Products products{};
  Sums sums{};
  Reductions reductions{};
  int64_t sum_blocks = 0, reduce_blocks = 0;

  explicit LoraReduction(const LoraPlan<T>& of) : plan(of) {
    products.m = sums.m = plan.m, products.r = plan.r, products.work_row = plan.work_row;
  }
  void reduce(const Array& out, Reduction reduction) {
    reduction.is_float = out.kind == Kind::float32, reduction.out = out.data;
    reduce_blocks = std::max(reduce_blocks, divide_up(reduction.rows * reduction.columns, kThreads));
    reductions.of[reductions.count++] = reduction;
  }
  // out = factor / divisor * the sums of a, or of a * (b - minus).
  void sum(const Array& out, int64_t columns, const Rows& a, const Rows& b, int is_float, Vector minus, float factor,
      Vector divisor) {
    const int64_t tiles = divide_up(columns, kThreads), splits = split_count(tiles, plan.m, 64, plan.device);
    sum_blocks = std::max(sum_blocks, tiles * splits);
    float* planes = plan.floats(splits * columns);
    sums.of[sums.count++] = Sum{columns, splits, a, b, is_float, minus, planes};
    reduce(out, Reduction{columns, 1, 1, 0, planes, splits, columns, factor, divisor, 0, nullptr});
  }
  // out = drop(rows).T @ work, or its transpose.  Returns how many blocks that takes.
  int64_t product(Product& p, const Array& out, int columns, const Rows& rows, const void* work, const Dropout& drop,
      bool transposed) {
    const int64_t blocks = divide_up(columns, kN) * divide_up(plan.r, kN);
    p = Product{columns, rows, work, drop, split_count(blocks, plan.m, 4 * Shape<T>::kDepth, plan.device), nullptr};
    p.planes = plan.floats(p.splits * columns * plan.r);
    const float factor = drop.threshold ? drop.scale : 1.f;
    const int64_t plane = static_cast<int64_t>(columns) * plan.r;
    if (transposed) reduce(out, Reduction{plan.r, columns, 1, plan.r, p.planes, p.splits, plane, factor, {}, 0, nullptr});
    else reduce(out, Reduction{columns, plan.r, plan.r, 1, p.planes, p.splits, plane, factor, {}, 0, nullptr});
    return blocks * p.splits;
  }
  void run(int64_t product_blocks) const {
    launch_over(product_blocks, lora_linear_products_kernel<T>, Outer<T>::kBytes, plan.device, products);
    auto rows_of_blocks = [&](int64_t blocks, int count, auto kernel, const auto& p) {
      const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(count));
      if (count) launch(kernel, grid, kThreads, 0, plan.device.stream, p);
    };
    rows_of_blocks(sum_blocks, sums.count, lora_linear_sums_kernel<T>, sums);
    rows_of_blocks(reduce_blocks, reductions.count, lora_linear_reduce_kernel<T>, reductions);
  }
};

// A gradient that isn't wanted costs no product and no pass.
template <class T>
const char* lora_linear_backward(const LoraArguments& a, const LoraGradients& o, const Device& device) {
  const LoraPlan<T> plan(a, device);
  Rows y, u;
  if (plan.error || !as_rows<T>(y, a.y) || !as_rows<float>(u, a.u)) return "more than 8 leading dims that can't be joined";
  const bool needs_t = o.x.data || o.lora_a.data || o.diagonal.data;
  const Rows grad = needs_t || o.weight.data || o.lora_b.data ? gained(plan) : plan.grad_y;
  LoraReduction<T> sums(plan);
  int64_t blocks = 0;
  if (needs_t) {
    float* t = plan.floats(plan.m * plan.r);
    void* grad_u = o.x.data || o.lora_a.data ? plan.work() : nullptr;
    plan.template narrow<true>(grad, plan.n, a.lora_b, Dropout{}, t, grad_u);
    if (o.x.data) {
      Extended p{plan.m, plan.k, plan.n, plan.r, grad, grad_u, plan.work_row, {}, {}, {}, {}, plan.dropout, o.x.data};
      plan.extended(p, Matrix(a.weight).transposed(), Matrix(a.lora_a).transposed());
    }
    if (o.lora_a.data)
      sums.products.blocks_a = blocks = sums.product(sums.products.a, o.lora_a, plan.k, plan.x, grad_u, plan.dropout, true);
    if (o.diagonal.data) {
      Rows rows{t, Inner{1, 0}, 1, {}, {}};
      rows.size[0] = plan.m, rows.stride[0] = plan.r;
      sums.sum(o.diagonal, plan.r, rows, u, true, {}, a.scale, {});
    }
  }
  if (o.lora_b.data) {
    void* work = plan.work();
    plan.finish(static_cast<const float*>(a.u.data), 1, a.u.stride[0], a.u.stride[1], 1.f, nullptr, work);
    blocks += sums.product(sums.products.b, o.lora_b, plan.n, grad, work, Dropout{}, false);
  }
  if (o.weight.data) {
    const WeightGradient p{plan.m, plan.n, plan.k, grad, plan.x, o.weight.data};
    launch_over(divide_up(p.n, kN) * divide_up(p.k, kN), lora_linear_weight_kernel<T>, Outer<T>::kBytes, device, p);
  }
  if (o.bias.data) sums.sum(o.bias, plan.n, plan.grad_y, Rows{}, false, {}, 1.f, {});
  if (o.gain.data) sums.sum(o.gain, plan.n, plan.grad_y, y, false, as_vector(a.bias), 1.f, as_vector(a.gain));
  sums.run(blocks);
  return nullptr;
}

}  // namespace fastadapt
