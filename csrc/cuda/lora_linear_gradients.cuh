// lora_linear backward by columns: what adds over rows.
#pragma once
#include "lora_linear.cuh"
#include "planes.cuh"

namespace fastadapt {

// out = gain * rows, with 16-byte aligned rows.
struct Gained {
  int64_t m, n;
  Rows rows;
  Vector gain;
  void* out;
  int64_t out_row;
};

// A thread a column of some rows.
template <class T>
__global__ void __launch_bounds__(kThreads) lora_linear_gain_kernel(const __grid_constant__ Gained p) {
  const int64_t tiles = divide_up(p.n, kThreads), column = blockIdx.x % tiles * kThreads + threadIdx.x;
  if (column >= p.n) return;
  const float gain = p.gain.at<T>(column);
  const T* from = static_cast<const T*>(p.rows.data) + column * p.rows.inner.stride;
  for (int64_t row = blockIdx.x / tiles; row < p.m; row += gridDim.x / tiles)
    static_cast<T*>(p.out)[row * p.out_row + column] = from_float<T>(gain * to_float(from[p.rows.offset(row)]));
}

// rows.T @ work over the rows of each adapter, for the gradient of one of its matrices.
struct Product {
  int columns;      // of `rows`; 0: not wanted
  Rows rows;        // (m, columns)
  const void* work;  // (m, work_row), of which r count
  Dropout dropout;  // of `rows`; the scale is left to the reduction
  int64_t splits;
  float* planes;    // (splits, g, columns, r)
};
struct Products {
  Groups groups;
  int r;
  int64_t work_row;
  int64_t blocks_a;  // of lora_a; those of lora_b follow
  Product a, b;
};

// One block: 64 columns by 64 ranks of an adapter's part of one plane.
template <class T>
__global__ void __launch_bounds__(kThreads, 3) lora_linear_products_kernel(const __grid_constant__ Products q) {
  FA_DYNAMIC_SHARED(shared);
  const bool is_a = blockIdx.x < q.blocks_a;
  const Product& p = is_a ? q.a : q.b;
  const int64_t index = blockIdx.x - (is_a ? 0 : q.blocks_a), tiles = divide_up(p.columns, kN), tiles_r = divide_up(q.r, kN);
  const int c0 = static_cast<int>(index % tiles) * kN, r0 = static_cast<int>(index / tiles % tiles_r) * kN;
  const int64_t split = index / tiles / tiles_r % p.splits;
  const int adapter = static_cast<int>(index / tiles / tiles_r / p.splits);
  const Span span = split_rows(q.groups, adapter, split, p.splits, Outer<T>::kDepth);
  const T *data = static_cast<const T*>(p.rows.data) + c0 * p.rows.inner.stride, *work = static_cast<const T*>(p.work) + r0;
  const auto rows = columns(p.rows.inner, p.columns - c0,
      [&](int64_t position) { return data + p.rows.offset(q.groups.row(position)); });
  float acc[8][4] = {}, unused[4];
  outer_product<false>(
      acc, unused, reinterpret_cast<T*>(shared), span, rows,
      columns(Inner{1, 1}, q.r - r0, [&](int64_t position) { return work + q.groups.row(position) * q.work_row; }), false,
      [&](T* tile, int64_t begin, int depth) {
        if (!p.dropout.threshold) return;
        auto row_of = [&](int i) { return begin + i < span.end ? q.groups.row(begin + i) : 0; };
        drop_tile<kN>(tile, depth, rows.extent(), rows.inner, p.dropout, row_of, c0);
      });
  float* plane = p.planes + ((split * q.groups.g + adapter) * p.columns + c0) * q.r + r0;
  outer_elements(acc, [&](int c, int j, float v) {
    if (c0 + c < p.columns && r0 + j < q.r) plane[static_cast<int64_t>(c) * q.r + j] = v;
  });
}

// grad_weight = grad_y.T @ x.
struct WeightGradient {
  int64_t m;
  int n, k;
  Rows grad_y, x;
  void* out;  // (n, k)
};

// One block: 64 rows by 64 columns of grad_weight.
template <class T>
__global__ void __launch_bounds__(kThreads, 3) lora_linear_weight_kernel(const __grid_constant__ WeightGradient p) {
  FA_DYNAMIC_SHARED(shared);
  const int64_t tiles = divide_up(p.k, kN);
  const int k0 = static_cast<int>(blockIdx.x % tiles) * kN, n0 = static_cast<int>(blockIdx.x / tiles) * kN;
  const T* grad_y = static_cast<const T*>(p.grad_y.data) + n0 * p.grad_y.inner.stride;
  const T* x = static_cast<const T*>(p.x.data) + k0 * p.x.inner.stride;
  float acc[8][4] = {}, unused[4];
  outer_product<false>(
      acc, unused, reinterpret_cast<T*>(shared), Span{0, p.m},
      columns(p.grad_y.inner, p.n - n0, [&](int64_t row) { return grad_y + p.grad_y.offset(row); }),
      columns(p.x.inner, p.k - k0, [&](int64_t row) { return x + p.x.offset(row); }), false, [](T*, int64_t, int) {});
  outer_elements(acc, [&](int i, int j, float v) {
    if (n0 + i < p.n && k0 + j < p.k) static_cast<T*>(p.out)[static_cast<int64_t>(n0 + i) * p.k + k0 + j] = from_float<T>(v);
  });
}

// The sums over the rows of each adapter of a, or of a * b, for each column.
struct Sum {
  Groups groups;
  int64_t columns, splits;
  Rows a, b;
  int is_float;  // instead of T
  float* planes;  // (splits, g, columns)
};
constexpr int kSums = 3;
struct Sums {
  int count;
  Sum of[kSums];
};

template <class E>
__device__ __forceinline__ float sum_of(const Sum& p, Span span, int64_t column) {
  const E *a = static_cast<const E*>(p.a.data) + column * p.a.inner.stride,
          *b = static_cast<const E*>(p.b.data) + column * p.b.inner.stride;
  return sum_rows(span, [&](int64_t position) {
    const int64_t row = p.groups.row(position);
    const float v = to_float(a[p.a.offset(row)]);
    return float2{p.b.data ? v * to_float(b[p.b.offset(row)]) : v, 0.f};
  }).x;
}

// A row of blocks for each sum, a thread for each of its columns in a split of an adapter's rows.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) lora_linear_sums_kernel(const __grid_constant__ Sums q) {
  const Sum& p = q.of[blockIdx.y];
  const int64_t tiles = divide_up(p.columns, kThreads), column = blockIdx.x % tiles * kThreads + threadIdx.x;
  const int64_t split = blockIdx.x / tiles % p.splits, adapter = blockIdx.x / tiles / p.splits;
  if (column >= p.columns || adapter >= p.groups.g) return;
  const Span span = split_rows(p.groups, static_cast<int>(adapter), split, p.splits, 1);
  float* plane = p.planes + (split * p.groups.g + adapter) * p.columns;
  plane[column] = p.is_float ? sum_of<float>(p, span, column) : sum_of<T>(p, span, column);
}

// A gradient from its planes: out[a, i, j] = factor * the sum of planes[s, a, i * row + j * column].
struct Reduction {
  int64_t groups, rows, columns, row, column;
  const float* planes;
  int64_t splits, plane;
  float factor;
  int is_float;
  void* out;
};
constexpr int kReductions = 5;
struct Reductions {
  int count;
  Reduction of[kReductions];
};

// A row of blocks for each gradient, a thread for each element.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) lora_linear_reduce_kernel(const __grid_constant__ Reductions q) {
  const Reduction& p = q.of[blockIdx.y];
  const int64_t at = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  const int64_t size = p.rows * p.columns;
  if (at >= p.groups * size) return;
  const int64_t group = at / size, i = at % size / p.columns, j = at % p.columns;
  const float v = p.factor * add_planes(p.planes + group * size + i * p.row + j * p.column, p.splits, p.plane);
  store_gradient<T>(p.out, p.is_float, at, v);
}

}  // namespace fastadapt
