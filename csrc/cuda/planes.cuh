// Sums over rows, as the gradients of parameters need them: partial sums over splits of the rows ("planes"), which a second
// kernel adds in a fixed order.  No atomics.
#pragma once
#include "bank.cuh"
#include "sums.cuh"

namespace fastadapt {

// The positions of one split of an adapter's rows.
__device__ __forceinline__ Span split_rows(const Groups& groups, int adapter, int64_t split, int64_t splits, int step) {
  return split_span(groups.first(adapter), groups.first(adapter + 1), split, splits, step);
}

// The stages of a product over rows: a tile of each operand.
template <class T>
struct Outer {
  static constexpr int kDepth = Shape<T>::kDepth, kRow = Shape<T>::padded(kN), kTile = kDepth * kRow;
  static constexpr int kBytes = Shape<T>::kStages * 2 * kTile * sizeof(T);
};

// What a block reads of an operand: at(position) is the first of its columns, of which `valid` exist.
template <class At>
struct Columns {
  Inner inner;
  int64_t valid;
  At at;

  __device__ __forceinline__ int extent() const { return static_cast<int>(least<int64_t>((valid + 15) / 16 * 16, kN)); }
};
template <class At>
__device__ __forceinline__ Columns<At> columns(Inner inner, int64_t valid, At at) {
  return Columns<At>{inner, valid, at};
}

// acc = a.T @ b over the rows of the span, for 64 columns of each; a warp has 16 of a's.  change(tile, step_begin, depth) may
// change what this thread loaded of a.  With `sums`, the columns of `sum` hold the sums of a.
template <bool SUM, class T, class AtA, class AtB, class Change>
__device__ __forceinline__ void outer_product(float (&acc)[8][4], float (&sum)[4], T* stages, Span span, const Columns<AtA>& a,
    const Columns<AtB>& b, bool sums, Change change) {
  using O = Outer<T>;
  const int live = (b.extent() + 7) / 8;
  auto depth = [&](int64_t step) {
    return static_cast<int>(least<int64_t>(divide_up(span.end - span.begin - step * O::kDepth, 16) * 16, O::kDepth));
  };
  pipeline<Shape<T>::kStages>(
      divide_up(span.end - span.begin, O::kDepth),
      [&](int64_t step, int stage) {
        const int64_t begin = span.begin + step * O::kDepth;
        T* tile = stages + stage * 2 * O::kTile;
        load_tile<kN>(tile, depth(step), a.extent(), a.valid, a.inner,
            [&](int i) { return begin + i < span.end ? a.at(begin + i) : nullptr; });
        load_tile<kN>(tile + O::kTile, depth(step), b.extent(), b.valid, b.inner,
            [&](int i) { return begin + i < span.end ? b.at(begin + i) : nullptr; });
      },
      [&](int64_t step, int stage) { change(stages + stage * 2 * O::kTile, span.begin + step * O::kDepth, depth(step)); },
      [&](int64_t step, int stage) {
        const T* tile = stages + stage * 2 * O::kTile;
        multiply<8, true, true, SUM>(
            acc, sum, tile + threadIdx.x / 32 * 16, O::kRow, tile + O::kTile, O::kRow, depth(step), live, sums);
      });
}

// Calls f(i, j, value) for the elements of acc: column i of a and j of b.
template <class F>
__device__ __forceinline__ void outer_elements(const float (&acc)[8][4], F f) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
      for (int i = 0; i < 2; i++) f(warp * 16 + lane / 4 + half * 8, j * 8 + lane % 4 * 2 + i, acc[j][half * 2 + i]);
}

}  // namespace fastadapt
