// The host side of lora_linear: which kernels run.
#pragma once
#include <cmath>

#include "bank_plan.cuh"
#include "lora_linear_gradients.cuh"

namespace fastadapt {

// u is read in backward, written in forward; so is z, for the gradient of gain.  grad_y is absent in forward.
struct LoraArguments {
  Array x, grad_y, z, u, weight, bias, lora_a, lora_b, diagonal, gain, ids;
  const int64_t* seed;
  float scale;
  double dropout_p;
};

// Contiguous outputs; data is nullptr where a gradient isn't wanted.
struct LoraGradients {
  Array x, weight, bias, lora_a, lora_b, diagonal, gain;
};

// Ranks of a bank that are multiplied whole, for rows as they come: it costs less than to sort them.
constexpr int kMostRanks = 192;

// What every step needs of a call.
template <class T>
struct LoraPlan {
  const LoraArguments& a;
  const Device& device;
  int64_t m = 1;
  int n, k, r;
  Bank bank{};
  Rows x, grad_y;
  Dropout dropout{};
  Vector diagonal;
  const char* error = nullptr;

  // `by_adapter` asks for sorted rows, as sums over those of an adapter need them.
  LoraPlan(const LoraArguments& arguments, const Device& on, bool by_adapter) : a(arguments), device(on) {
    for (int i = 0; i < a.x.dims - 1; i++) m *= a.x.size[i];
    n = static_cast<int>(a.weight.size[0]), k = static_cast<int>(a.weight.size[1]);
    r = static_cast<int>(a.lora_a.size[a.lora_a.dims - 2]);
    bank.r = r, bank.width = round_up(r, Shape<T>::kVector);
    bank.groups.g = a.ids.data ? static_cast<int>(a.lora_a.size[0]) : 1, bank.groups.m = m;
    if (!as_rows<T>(x, a.x) || !as_rows<T>(grad_y, a.grad_y)) error = "more than 8 leading dims that can't be joined";
    if (!as_ids(bank.ids, a.ids, a.x, bank.groups.g)) error = "adapter_ids has more than 8 dims that can't be joined";
    diagonal = as_vector(a.diagonal);
    const double threshold = std::nearbyint(a.dropout_p * 65536);
    if (threshold > 0)
      dropout = Dropout{a.seed, static_cast<uint32_t>(threshold), static_cast<float>(65536 / (65536 - threshold))};
    if (a.ids.data && !error && (by_adapter || bank.ranks() > kMostRanks))
      sort_rows(bank.groups, bank.ids, NarrowTile<T>::kRows, device);
  }
  float* floats(int64_t count) const { return static_cast<float*>(device.allocate(count * sizeof(float))); }
  void* work() const { return device.allocate(m * bank.width * sizeof(T)); }

  // sum = factor * the sum of planes (count, m, r); work = scale * diagonal * sum.
  void finish(const float* planes, int64_t count, int64_t row, int64_t column, float factor, float* sum, void* work) const {
    const Finish f{bank.ids, m, r, planes, count, m * r, row, column, factor, a.scale, diagonal, sum, work, bank.width};
    launch_over(least<int64_t>(divide_up(m * r, kThreads), 4096), lora_linear_finish_kernel<T>, 0, device, f);
  }

  // sum = drop(rows) @ weight.T of each row's adapter, (m, r); work = scale * diagonal * sum.  The weight is (g, r, depth), or
  // (g, depth, r) if TRANSPOSED.
  template <bool TRANSPOSED>
  void narrow(const Rows& rows, int depth, const Array& weight, const Dropout& drop, float* sum, void* work) const {
    const bool sorted = bank.groups.order;  // each adapter, and each kind of row without one, can add a tile
    const int tiles_r = static_cast<int>(divide_up(sorted ? bank.width : bank.ranks(), kN));
    const int64_t tiles_m = divide_up(m, NarrowTile<T>::kRows) + (sorted ? bank.groups.g + 2 : 0), tiles = tiles_m * tiles_r;
    const int64_t chunks = divide_up(depth, kChunk);
    Narrow p{bank, m, depth, tiles_r, rows, as_weight<T>(weight, device), drop, 1, chunks, sum};
    if (chunks > 1 && tiles > 0) p.splits = least(chunks, divide_up(2 * device.multiprocessors, tiles));
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

  // Fills the weights of p, (n, k) and (g, n, r), and runs it.  A layer that keeps its weight the other way round has the
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
  const LoraPlan<T> plan(a, device, false);
  if (plan.error) return plan.error;
  void* work = plan.work();
  plan.template narrow<false>(plan.x, plan.k, a.lora_a, plan.dropout, static_cast<float*>(a.u.data), work);
  Extended p{plan.bank, plan.m, plan.n, plan.k, plan.x, work, {}, {}, as_vector(a.gain), as_vector(a.bias), {}, a.z.data, y};
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
    products.groups = plan.bank.groups, products.r = plan.r, products.work_row = plan.bank.width;
  }
  void reduce(const Array& out, Reduction reduction) {
    reduction.is_float = out.kind == Kind::float32, reduction.out = out.data;
    reduce_blocks = std::max(reduce_blocks, divide_up(reduction.groups * reduction.rows * reduction.columns, kThreads));
    reductions.of[reductions.count++] = reduction;
  }
  // out = factor * the sums of a, or of a * b, over the rows of each of the groups.
  void sum(const Array& out, const Groups& groups, int64_t columns, const Rows& a, const Rows& b, int is_float,
      float factor) {
    const int64_t blocks = divide_up(columns, kThreads) * groups.g, splits = split_count(blocks, plan.m, 64, plan.device);
    sum_blocks = std::max(sum_blocks, blocks * splits);
    const int64_t plane = groups.g * columns;
    float* planes = plan.floats(splits * plane);
    sums.of[sums.count++] = Sum{groups, columns, splits, a, b, is_float, planes};
    reduce(out, Reduction{groups.g, columns, 1, 1, 0, planes, splits, plane, factor, 0, nullptr});
  }
  // out = drop(rows).T @ work for each adapter, or its transpose.  Returns how many blocks that takes.
  int64_t product(Product& p, const Array& out, int columns, const Rows& rows, const void* work, const Dropout& drop,
      bool transposed) {
    const int64_t g = products.groups.g, blocks = g * divide_up(columns, kN) * divide_up(plan.r, kN);
    p = Product{columns, rows, work, drop, split_count(blocks, plan.m, 4 * Shape<T>::kDepth, plan.device), nullptr};
    const float factor = drop.threshold ? drop.scale : 1.f;
    const int64_t plane = g * columns * plan.r;
    p.planes = plan.floats(p.splits * plane);
    if (transposed) reduce(out, Reduction{g, plan.r, columns, 1, plan.r, p.planes, p.splits, plane, factor, 0, nullptr});
    else reduce(out, Reduction{g, columns, plan.r, plan.r, 1, p.planes, p.splits, plane, factor, 0, nullptr});
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
  const LoraPlan<T> plan(a, device, o.lora_a.data || o.lora_b.data || o.diagonal.data);
  Rows z, u;
  if (plan.error) return plan.error;
  if (!as_rows<T>(z, a.z) || !as_rows<float>(u, a.u)) return "more than 8 leading dims that can't be joined";
  const bool needs_t = o.x.data || o.lora_a.data || o.diagonal.data;
  const Rows grad = needs_t || o.weight.data || o.lora_b.data ? gained(plan) : plan.grad_y;
  LoraReduction<T> sums(plan);
  int64_t blocks = 0;
  if (needs_t) {
    float* t = plan.floats(plan.m * plan.r);
    void* grad_u = o.x.data || o.lora_a.data ? plan.work() : nullptr;
    plan.template narrow<true>(grad, plan.n, a.lora_b, Dropout{}, t, grad_u);
    if (o.x.data) {
      Extended p{plan.bank, plan.m, plan.k, plan.n, grad, grad_u, {}, {}, {}, {}, plan.dropout, nullptr, o.x.data};
      plan.extended(p, Matrix(a.weight).transposed(), Matrix(a.lora_a).transposed());
    }
    if (o.lora_a.data)
      sums.products.blocks_a = blocks = sums.product(sums.products.a, o.lora_a, plan.k, plan.x, grad_u, plan.dropout, true);
    if (o.diagonal.data) {
      Rows rows{t, Inner{1, 0}, 1, {}, {}};
      rows.size[0] = plan.m, rows.stride[0] = plan.r;
      sums.sum(o.diagonal, plan.bank.groups, plan.r, rows, u, true, a.scale);
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
  const Groups all{1, plan.m, nullptr, nullptr, nullptr};
  if (o.bias.data) sums.sum(o.bias, all, plan.n, plan.grad_y, Rows{}, false, 1.f);
  if (o.gain.data) sums.sum(o.gain, all, plan.n, plan.grad_y, z, false, 1.f);
  sums.run(blocks);
  return nullptr;
}

}  // namespace fastadapt
