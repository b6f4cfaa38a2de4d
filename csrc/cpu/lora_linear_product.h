// The frozen product where it is not the vendor library's. The branch is part of its sums: the inner dimension is longer by the
// rank, and no pass over the result comes before or after.
#pragma once
#include "lora_linear_columns.h"

namespace fastadapt::FA_TARGET::lora_linear {

// Inner indices of the weight that are packed at once, and their columns take streamed_bytes at most.
constexpr int64_t product_inner = 1024;

// Ends a tile of the product. The bias comes last: sums that begin with it would round more.
template <class C>
struct Finish {
  int64_t r;           // of the branch's part, or 0
  const C *left, *up;  // the rows' ranks, and the packed weight that takes them to the columns
  C *z, *y;            // z is the product, added to what is there with `add`; y = gain * z + bias, or in the same memory
  int64_t ld, columns;
  bool add;
  const C *gain, *bias;  // or null

  template <int MR, int NV>
  FA_INLINE void operator()(int64_t i, int64_t j, Vec<C> (&acc)[MR][NV]) const {
    constexpr int L = lanes<C>;
    multiply<C, MR, NV, false>(r, left + i * r, r, up + j * r, NV * L, acc);
    if (j + NV * L <= columns) {
#pragma GCC unroll 16
      for (int t = 0; t < MR; ++t)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) finish(i + t, j + v * L, acc[t][v], L);
      return;
    }
    loop(Spilled<C, MR, NV>(acc).tile[0], MR, NV, i, j);
  }

  FA_NOINLINE void loop(const Vec<C>* tile, int rows, int vectors, int64_t i, int64_t j) const {
    for (int t = 0; t < rows; ++t, tile += vectors)
      for (int64_t c = j; c < columns; c += lanes<C>) finish(i + t, c, tile[(c - j) / lanes<C>], columns - c);
  }

  FA_INLINE void finish(int64_t row, int64_t c, Vec<C> v, int64_t count) const {
    const int64_t at = row * ld + c;
    if (add) v += load_at<C>(z + at, 0, count, 1);
    if (y != z) store_at<C>(z + at, 0, count, v);
    if (gain) v *= load<C>(gain + c);
    if (bias) v += load<C>(bias + c);
    store_at<C>(y + at, 0, count, v);
  }
};

template <class T, class W>
struct Product : Pass<T, W> {
  using Base = Pass<T, W>;
  using C = typename Base::C;
  using Base::element, Base::ranks;

  // Memory of a thread: the packed weights, scale * diagonal, gain and bias, and a block of rows.
  struct Memory {
    C *weight, *up, *factor, *gain, *bias, *copy;
    int64_t depth, width;  // of the packed weight, at most
  };

  static FA_INLINE Memory memory_of(const Problem& p, Arena& arena) {
    const int64_t inner = most(1, p.backward ? p.n : p.k), panel_bytes = panel_width<C> * static_cast<int64_t>(sizeof(C));
    Memory t = {};
    t.depth = ceil_div(inner, ceil_div(inner, product_inner));
    t.width = panel_width<C> * most(1, streamed_bytes / panel_bytes / t.depth);
    t.weight = arena.take<C>(t.depth * t.width);
    t.up = arena.take<C>(p.joined ? p.r * t.width : 0);
    t.factor = arena.take<C>(padded<C>(p.r));
    t.gain = arena.take<C>(padded<C>(p.n) + panel_width<C>);
    t.bias = arena.take<C>(p.backward ? 0 : padded<C>(p.n) + panel_width<C>);
    t.copy = arena.take<C>(wide_rows * padded<C>(t.depth));
    return t;
  }

  static int64_t thread_bytes(const Problem& p) {
    Arena arena(nullptr);
    memory_of(p, arena);
    return most(arena.used(), Base::thread_bytes(p));
  }

  // How many shares of the columns there are; the others are of rows. Each packs the weight of its columns, which costs as
  // much as that many more rows.
  static int64_t shares_of_columns(const Problem& p, int64_t columns, int64_t parts) {
    constexpr int64_t packing_rows = 16;
    int64_t best = 1, best_cost = INT64_MAX;
    for (int64_t shares = 1; shares <= parts; ++shares) {
      const int64_t panels = ceil_div(ceil_div(columns, panel_width<C>), shares);
      const int64_t cost = panels * (ceil_div(p.m * shares, parts) + packing_rows);
      if (parts % shares == 0 && cost < best_cost) best = shares, best_cost = cost;
    }
    return best;
  }

  // Packs b; where its rows lie as they will be used, one after the other, each asked for ahead: they may lie a page apart.
  static void pack_weight(const Source<C, T>& b, C* packed) {
    constexpr int64_t width = panel_width<C>, ahead = 16;
    if (b.n_stride != 1 || b.n % width) return pack_part(b, packed, 0, 1);
    for (int64_t i = 0; i < b.k; ++i, packed += width) {
      const T* row = b.data + i * b.k_stride;
      const C factor = b.k_factor ? b.k_factor[i] : 1;
      for (int64_t j = 0; j < b.n; j += lanes<C>) {
        __builtin_prefetch(row + ahead * b.k_stride + j);
        store(packed + j / width * width * b.k + j % width, load<C>(row + j) * factor);
      }
    }
  }

  // The share `part` of `parts` of z and y, or of grad_x.
  static void product(const Problem& p, void* memory, int64_t part, int64_t parts) {
    Arena arena(memory);
    const Memory t = memory_of(p, arena);
    const bool back = p.backward;
    const int64_t inner = back ? p.n : p.k, columns = back ? p.k : p.n, r = p.joined ? p.r : 0;
    const int64_t shares = shares_of_columns(p, columns, parts), panels = ceil_div(columns, panel_width<C>);
    const int64_t across = part % shares, down = part / shares, rows = ceil_div(p.m, tile_rows<max_vectors>);
    const int64_t c_end = least(columns, panels * (across + 1) / shares * panel_width<C>);
    const int64_t first = rows * down * shares / parts * tile_rows<max_vectors>;
    const int64_t last = least(p.m, rows * (down + 1) * shares / parts * tile_rows<max_vectors>);
    const Rows& from = back ? p.grad_y : p.x;
    const T* at[wide_rows];
    const Weight& w = p.weight;
    const int64_t k_stride = back ? w.stride_0 : w.stride_1, n_stride = back ? w.stride_1 : w.stride_0;
    Base::read_columns(p.gain, 0, p.n, t.gain, padded<C>(p.n));
    if (!back) Base::read_columns(p.bias, 0, p.n, t.bias, padded<C>(p.n) + panel_width<C>);
    if (r) Base::read_factor(p, t.factor, 0);
    for (int64_t c = panels * across / shares * panel_width<C>; c < c_end; c += t.width) {
      const int64_t n = least(t.width, c_end - c);
      const Source<C, W> up = back ? Source<C, W>{element(p.a, 0, 0, c), p.a.stride_0, p.a.stride_1, r, n, t.factor, nullptr}
                                   : Source<C, W>{element(p.b, 0, c, 0), p.b.stride_1, p.b.stride_0, r, n, t.factor, nullptr};
      pack_part(up, r ? t.up : nullptr, 0, 1);
      for (int64_t k = 0; k < inner; k += t.depth) {
        const int64_t depth = least(t.depth, inner - k);
        const bool ends = k + depth == inner;
        const T* weight = static_cast<const T*>(w.data) + k * k_stride + c * n_stride;
        pack_weight({weight, k_stride, n_stride, depth, n, back && p.gain.data ? t.gain + k : nullptr, nullptr}, t.weight);
        const bool gained = ends && !back && p.gain.data, biased = ends && !back && p.bias.data && (gained || p.joined);
        for (int64_t i = first; i < last; i += wide_rows) {
          const int64_t count = least(wide_rows, last - i);
          locate_rows(from, nullptr, i, count, at);
          const Operand<C> left = Base::columns(at, count, k, depth, from.step, t.copy, false);
          C* const z = static_cast<C*>(back ? p.grads[grad_x] : p.z) + i * columns + c;
          C* const y = gained ? static_cast<C*>(p.y) + i * columns + c : z;
          const Finish<C> finish{ends ? r : 0, ranks(p, back ? p.t : p.u, i), t.up, z, y, columns, n, k > 0 || !p.joined,
                                 gained ? t.gain + c : nullptr, biased ? t.bias + c : nullptr};
          gemm_epilogue(count, depth, n, left.data, left.ld, t.weight, static_cast<const C*>(nullptr), finish);
        }
      }
    }
  }
};

}  // namespace fastadapt::FA_TARGET::lora_linear
