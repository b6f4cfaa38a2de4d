// Parameters of kron.cuh as float32 copies, and their gradients from planes in the same layout.
#pragma once
#include "kron.cuh"
#include "planes.cuh"

namespace fastadapt {

// A parameter for each adapter, (lines, terms, columns) in some order of its dims, and its copy: lines of `width` numbers, of
// which terms * columns count.
struct Layout {
  int64_t groups, lines, terms, columns;
  int64_t group, line, term, column;  // strides of the parameter
  int64_t width;
  int placed;  // lines as in Placed, else in order

  __host__ __device__ __forceinline__ int64_t size() const { return (placed ? divide_up(lines, 4) * 4 : lines) * width; }
  // Where in the parameter of an adapter number `at` of its copy is; -1 for padding.
  __device__ __forceinline__ int64_t find(int64_t at) const {
    const int64_t column_at = at % width;
    int64_t i = at / width;
    if (placed) i = Placed(static_cast<int>(i), static_cast<int>(lines)).feature(static_cast<int>(i));
    if (i >= lines || column_at >= terms * columns) return -1;
    return i * line + column_at / columns * term + column_at % columns * column;
  }
};

struct Packing {
  Layout layout;
  const void* from;
  int is_float;
  float* to;
};
constexpr int kPackings = 8;
struct Packings {
  int count;
  int64_t parts;  // blocks for each adapter
  Packing of[kPackings];
};

template <class T>
__global__ void __launch_bounds__(kThreads) kron_pack_kernel(const __grid_constant__ Packings q) {
  const int64_t adapter = blockIdx.x / q.parts, part = blockIdx.x % q.parts;
#pragma unroll 1
  for (int i = 0; i < q.count; i++) {
    const Packing& p = q.of[i];
    const int64_t size = p.layout.size();
    for (int64_t at = part * kThreads + threadIdx.x; at < size; at += q.parts * kThreads) {
      const int64_t inside = p.layout.find(at), from = adapter * p.layout.group + inside;
      float v = 0.f;
      if (inside >= 0)
        v = p.is_float ? static_cast<const float*>(p.from)[from] : to_float(static_cast<const T*>(p.from)[from]);
      p.to[adapter * size + at] = v;
    }
  }
}

// A gradient from its planes (splits, groups, size).
struct KronReduction {
  Layout layout;
  const float* planes;
  int64_t splits;
  Vector scale;  // the gradient is as many times the sum
  float scale_value;
  int is_float;
  void* out;
};
constexpr int kKronReductions = 9;
struct KronReductions {
  KronReduction of[kKronReductions];
};

// A row of blocks for each gradient, a block for 32 numbers of an adapter's planes: each warp adds every fourth plane.
template <class T>
__global__ void __launch_bounds__(kThreads) kron_reduce_kernel(const __grid_constant__ KronReductions q) {
  FA_DYNAMIC_SHARED(shared);
  float* sums = reinterpret_cast<float*>(shared);  // (warps, 32)
  const KronReduction& p = q.of[blockIdx.y];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t size = p.layout.size(), blocks = divide_up(size, 32), adapter = blockIdx.x / blocks;
  const int64_t at = blockIdx.x % blocks * 32 + lane, plane = p.layout.groups * size;
  if (adapter >= p.layout.groups) return;
  const int64_t mine = p.splits > warp ? divide_up(p.splits - warp, kWarps) : 0;
  sums[threadIdx.x] =
      at < size ? add_planes(p.planes + warp * plane + adapter * size + at, mine, kWarps * plane) : 0.f;
  __syncthreads();
  const int64_t inside = at < size && warp == 0 ? p.layout.find(at) : -1;
  if (inside < 0) return;
  float sum = 0.f;
  for (int i = 0; i < kWarps; i++) sum += sums[i * 32 + lane];
  sum *= p.scale.data ? p.scale.at<T>(0) : p.scale_value;
  store_gradient<T>(p.out, p.is_float, adapter * p.layout.group + inside, sum);
}

}  // namespace fastadapt
