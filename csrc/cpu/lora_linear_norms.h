// The norms of the rows of a frozen weight and its update, of which nothing is written but these.
#pragma once
#include "lora_linear_rows.h"

namespace fastadapt::FA_TARGET::lora_linear {

// Adds the squares of a tile of weight + update to the sums of its rows.
template <class T, class C>
struct Squares {
  const T* const* rows;
  int64_t columns;
  Vec<C>* sums;

  template <int MR, int NV>
  FA_INLINE void operator()(int64_t i, int64_t j, Vec<C> (&acc)[MR][NV]) const {
    constexpr int L = lanes<C>;
    if (j + NV * L <= columns) {
#pragma GCC unroll 16
      for (int t = 0; t < MR; ++t) {
        Vec<C> sum = sums[i + t];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
          const Vec<C> value = acc[t][v] + load<C>(rows[i + t] + j + v * L);
          sum += value * value;
        }
        sums[i + t] = sum;
      }
      return;
    }
    loop(Spilled<C, MR, NV>(acc).tile[0], MR, NV, i, j);
  }

  FA_NOINLINE void loop(const Vec<C>* tile, int count, int vectors, int64_t i, int64_t j) const {
    for (int t = 0; t < count; ++t, tile += vectors)
      for (int64_t c = j; c < columns; c += lanes<C>) {
        const Vec<C> value = tile[(c - j) / lanes<C>] + load_at<C>(rows[i + t], c, columns - c, 1);
        sums[i + t] += value * value;
      }
  }
};

template <class T, class W>
struct Norms : RowPass<T, W> {
  using Base = RowPass<T, W>;
  using C = typename Base::C;

  static int64_t thread_bytes(const Problem& p) { return round_up(packed_size<C>(p.r, p.k) * sizeof(C), 64); }

  // Rows [begin, end).
  static void norms(const Problem& p, void* memory, int64_t begin, int64_t end) {
    C* const packed = static_cast<C*>(memory);
    pack_part(Source<C, W>{Base::element(p.a, 0, 0, 0), p.a.stride_0, p.a.stride_1, p.r, p.k, nullptr, nullptr}, packed, 0, 1);
    const T* rows[wide_rows];
    for (int64_t i = begin; i < end; i += wide_rows) {
      const int64_t count = least(wide_rows, end - i);
      locate_rows(p.x, nullptr, i, count, rows);
      Vec<C> sums[wide_rows] = {};
      gemm_epilogue(count, p.r, p.k, static_cast<const C*>(p.b.data) + i * p.r, p.r, packed, static_cast<const C*>(nullptr),
                    Squares<T, C>{rows, p.k, sums});
      for (int64_t t = 0; t < count; ++t) static_cast<C*>(p.y)[i + t] = __builtin_sqrt(sum<C>(sums[t]));
    }
  }
};

}  // namespace fastadapt::FA_TARGET::lora_linear
