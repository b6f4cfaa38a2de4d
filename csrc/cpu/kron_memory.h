// The tensors of sums of Kronecker products in the compute type: blocks of rows, factors, parameters. One instantiation serves
// all dtypes of a compute type: what is not of it, or doesn't end with a whole vector, passes through scratch in the cache.
#pragma once
#include "kron_args.h"
#include "rows.h"

namespace fastadapt::FA_TARGET::kron {

using namespace fastadapt::kron;

// Rows that pass from one phase to the next. Between the phases the tokens are the lanes: element (i, token) of such an array
// is at i * block_rows + token.
constexpr int64_t block_rows = 16;

// Columns of a factor that a product takes at once.
constexpr int64_t rank_tile = 4;

template <class T>
struct Type {
  using type = T;
};

// f(Type<T>) for the dtypes whose compute type is C.
template <class C, class F>
FA_INLINE void with_dtype(Dtype dtype, F&& f) {
  if constexpr (sizeof(C) == sizeof(double)) return f(Type<double>{});
  if constexpr (sizeof(C) == sizeof(float)) {
    if (dtype == Dtype::float16) return f(Type<Half>{});
    if (dtype == Dtype::bfloat16) return f(Type<BFloat16>{});
    f(Type<float>{});
  }
}

template <class C>
FA_INLINE bool is_compute(Dtype dtype) { return dtype == (sizeof(C) == sizeof(double) ? Dtype::float64 : Dtype::float32); }

// --- blocks of rows ----------------------------------------------------------------------------------------------------

// A block in the compute type: P is const C* or C*. Chunks begin `chunk` elements apart; those in scratch end with a whole
// vector. Rows past the last repeat it.
template <class P>
struct Block {
  P rows[block_rows];
  int64_t chunk;
};

template <class C>
FA_INLINE bool stays(const Call& call, const Rows& rows, const Shape& s) {
  return is_compute<C>(call.dtype) && rows.step == 1 && s.width % lanes<C> == 0;
}

// Scratch for a block of rows, and for one of an output of that shape: where the rows stay, so does the output.
template <class C>
FA_INLINE int64_t block_size(const Call& call, const Rows& rows, const Shape& s) {
  return stays<C>(call, rows, s) ? 0 : block_rows * s.chunks * padded<C>(s.width);
}

template <class C>
FA_INLINE void in_scratch(C* scratch, int64_t n, const Shape& s, Block<C*>& block) {
  block.chunk = padded<C>(s.width);
  for (int64_t i = 0; i < block_rows; ++i) block.rows[i] = scratch + least(i, n - 1) * s.chunks * block.chunk;
}

template <class T, class C>
void copy_in(const Call& call, const Rows& rows, const Shape& s, int64_t begin, int64_t n, C* out) {
  const T* from[block_rows];
  locate_rows(rows, call.order, begin, n, from);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t c = 0; c < s.chunks; ++c, out += padded<C>(s.width)) {
      const T* chunk = from[i] + c * s.width * rows.step;
      for (int64_t j = 0; j < s.width; j += lanes<C>) store(out + j, load_at<C>(chunk, j, s.width - j, rows.step));
    }
}

template <class T, class C>
void copy_out(const Call& call, const Rows& rows, const Shape& s, int64_t begin, int64_t n, const C* from) {
  const T* to[block_rows];
  locate_rows(rows, call.order, begin, n, to);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t c = 0; c < s.chunks; ++c, from += padded<C>(s.width)) {
      T* chunk = const_cast<T*>(to[i]) + c * s.width;
      for (int64_t j = 0; j < s.width; j += lanes<C>) store_at<C>(chunk, j, s.width - j, load<C>(from + j));
    }
}

// Rows [begin, begin + n) in place, or a copy of them in scratch.
template <class C>
void load_block(const Call& call, const Rows& rows, const Shape& s, int64_t begin, int64_t n, C* scratch,
                Block<const C*>& block) {
  if (stays<C>(call, rows, s)) {
    block.chunk = s.width;
    locate_rows(rows, call.order, begin, n, block.rows);
    for (int64_t i = n; i < block_rows; ++i) block.rows[i] = block.rows[n - 1];
    return;
  }
  with_dtype<C>(call.dtype, [&](auto type) { copy_in<typename decltype(type)::type>(call, rows, s, begin, n, scratch); });
  Block<C*> copy;
  in_scratch(scratch, n, s, copy);
  memcpy(&block, &copy, sizeof block);
}

// Where rows [begin, begin + n) of an output are written: in place, or in scratch until save_block.
template <class C>
void output_block(const Call& call, const Rows& rows, const Shape& s, int64_t begin, int64_t n, C* scratch, Block<C*>& block) {
  if (!stays<C>(call, rows, s)) return in_scratch(scratch, n, s, block);
  block.chunk = s.width;
  locate_rows(rows, call.order, begin, n, const_cast<const C**>(block.rows));
}

template <class C>
void save_block(const Call& call, const Rows& rows, const Shape& s, int64_t begin, int64_t n, const C* scratch) {
  if (stays<C>(call, rows, s)) return;
  with_dtype<C>(call.dtype, [&](auto type) { copy_out<typename decltype(type)::type>(call, rows, s, begin, n, scratch); });
}

// --- parameters --------------------------------------------------------------------------------------------------------

// out[i * ld + j] = factor * element (i, j) of a parameter, and zeros in the columns up to ld.
template <class C>
void read_parameter(const Call& call, const Parameter& q, int64_t adapter, const Shape& s, C factor, C* out, int64_t ld) {
  with_dtype<C>(q.like_x ? call.dtype : Dtype::float32, [&](auto type) {
    const auto* data = static_cast<const typename decltype(type)::type*>(q.data) + adapter * q.stride_g;
    for (int64_t i = 0; i < s.chunks; ++i)
      for (int64_t j = 0; j < ld; j += lanes<C>) {
        const int64_t count = s.width - j;
        store_at<C>(out + i * ld, j, ld - j,
                    count <= 0 ? Vec<C>{} : factor * load_at<C>(data + i * s.width * q.stride, j, count, q.stride));
      }
  });
}

// A small factor as it is indexed.
template <class C>
void read_factor(const Call& call, const Factor& f, int64_t adapter, int64_t terms, int64_t rows, int64_t columns, C* out) {
  with_dtype<C>(call.weight_dtype, [&](auto type) {
    const auto* data = static_cast<const typename decltype(type)::type*>(f.data) + adapter * f.stride_g;
    for (int64_t i = 0; i < terms; ++i)
      for (int64_t j = 0; j < rows; ++j, out += columns) {
        const auto* row = data + i * f.stride_0 + j * f.stride_1;
        for (int64_t k = 0; k < columns; k += lanes<C>)
          store_at<C>(out, k, columns - k, load_at<C>(row, k, columns - k, f.stride_2));
      }
  });
}

// A factor as the streaming phases take it: a row for each (term, rank), padded to whole tiles, of whole vectors.
template <class C>
struct Matrix {
  const C* data;
  int64_t ld;
};

// An odd number of vectors: rows a power of two apart would fall on the same lines of the cache.
template <class C>
FA_INLINE int64_t matrix_stride(int64_t width) { return (ceil_div(width, lanes<C>) | 1) * lanes<C>; }
template <class C>
FA_INLINE int64_t matrix_size(int64_t ranks, int64_t width) { return round_up(ranks, rank_tile) * matrix_stride<C>(width); }

// Element (term, rank, column) of f at term * stride_0 + rank * rank_stride + column * column_stride; in place if it lies so.
template <class C>
Matrix<C> read_matrix(const Call& call, const Factor& f, int64_t rank_stride, int64_t column_stride, int64_t adapter,
                      int64_t terms, int64_t q, int64_t width, C* out) {
  const int64_t ranks = terms * q, ld = matrix_stride<C>(width), step = q == 1 ? f.stride_0 : rank_stride;
  if (is_compute<C>(call.weight_dtype) && column_stride == 1 && width % lanes<C> == 0 && ranks == rank_tile &&
      (q == 1 || terms == 1 || f.stride_0 == q * step))
    return {static_cast<const C*>(f.data) + adapter * f.stride_g, step};
  with_dtype<C>(call.weight_dtype, [&](auto type) {
    using W = typename decltype(type)::type;
    const W* data = static_cast<const W*>(f.data) + adapter * f.stride_g;
    for (int64_t i = 0; i < terms; ++i) {
      const Source<C, W> source{data + i * f.stride_0, q == 1 ? 0 : rank_stride, column_stride, q, width, nullptr, nullptr};
      for (int64_t j = 0; j < width; j += lanes<C>) pack_vector(source, j, 0, q, out + i * q * ld + j, ld);
    }
  });
  memset(out + ranks * ld, 0, (round_up(ranks, rank_tile) - ranks) * ld * sizeof(C));
  return {out, ld};
}

// Elements [at, at + n) of a gradient.
template <class C>
void write_gradient(Dtype dtype, void* out, int64_t at, int64_t n, const C* values) {
  with_dtype<C>(dtype, [&](auto type) {
    auto* to = static_cast<typename decltype(type)::type*>(out) + at;
    for (int64_t j = 0; j < n; j += lanes<C>) store_at<C>(to, j, n - j, load_at<C>(values, j, n - j, 1));
  });
}

}  // namespace fastadapt::FA_TARGET::kron
