// Rows of activations, and parameters, of any strides, as operands of the products.
#pragma once
#include "gemm.h"
#include "views.h"

namespace fastadapt::FA_TARGET {

using namespace fastadapt::cpu;

// Rows that a thread works on at once, at most.
constexpr int64_t max_rows = 128;

// Where rows [begin, begin + n) of `order` (null: as they come) begin.
template <class T>
FA_INLINE void locate_rows(const Rows& rows, const int64_t* order, int64_t begin, int64_t n, const T** out) {
  for (int64_t i = 0; i < n; ++i) {
    const int64_t row = order ? order[begin + i] : begin + i;
    out[i] = static_cast<const T*>(rows.data) + (rows.offsets ? rows.offsets[row] : row * rows.ld);
  }
}

// A block of rows as a left operand.
template <class C>
struct Operand {
  const C* data;
  int64_t ld;
};

// Columns [j, j + lanes) of a row whose elements are `step` apart.
template <class C, class T>
FA_INLINE Vec<C> load_at(const T* row, int64_t j, int64_t count, int64_t step) {
  return step == 1 && count >= lanes<C> ? load<C>(row + j) : load_some<C>(row + j * step, least(count, lanes<C>), step);
}

template <class C, class T>
FA_INLINE void store_at(T* row, int64_t j, int64_t count, Vec<C> v) {
  if (count >= lanes<C>)
    store(row + j, v);
  else
    store_some<C>(row + j, v, count);
}

// A tile of accumulators in memory, for a loop that isn't unrolled: an index that isn't constant would push the registers there
// from the start. The loop is out of line, one for tiles of all sizes, which saves a quarter of the time to compile.
template <class C, int MR, int NV>
struct Spilled {
  Vec<C> tile[MR][NV];
  FA_INLINE explicit Spilled(const Vec<C> (&acc)[MR][NV]) {
#pragma GCC unroll 16
    for (int t = 0; t < MR; ++t)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) tile[t][v] = acc[t][v];
  }
};

template <class T, class C>
void copy_rows(const T* const* rows, int64_t n, int64_t d, int64_t step, C* out, int64_t ld) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < d; j += lanes<C>) store(out + i * ld + j, load_at<C>(rows[i], j, d - j, step));
}

// The rows in place if they are evenly spaced and of the compute type, otherwise a copy of the block in scratch. With `whole`,
// vectors may be read beyond column d: then only rows that end with one stay in place.
template <class T, class C>
FA_INLINE Operand<C> operand(const T* const* rows, int64_t n, int64_t d, int64_t step, C* scratch, bool whole = false) {
  if constexpr (sizeof(T) == sizeof(C)) {
    const int64_t ld = n > 1 ? rows[1] - rows[0] : d;
    bool even = step == 1 && !(whole && d % lanes<C>);
    for (int64_t i = 1; even && i < n; ++i) even = rows[i] - rows[i - 1] == ld;
    if (even) return {rows[0], ld};
  }
  copy_rows(rows, n, d, step, scratch, padded<C>(d));
  return {scratch, padded<C>(d)};
}

// (x - mean) * rstd into scratch. The mean is refined by the sum of what it leaves, so that a large one does no harm.
template <class T, class C>
FA_INLINE Operand<C> normalize(const T* const* rows, int64_t n, int64_t d, int64_t step, double eps, C* out, C* rstd) {
  const int64_t ld = padded<C>(d);
  copy_rows(rows, n, d, step, out, ld);
  for (int64_t i = 0; i < n; ++i) {
    C* row = out + i * ld;
    Vec<C> total = {}, rest = {}, square = {};
    for (int64_t j = 0; j < d; j += lanes<C>) total += load<C>(row + j);
    const C mean = sum<C>(total) / d;
    const int64_t whole = d / lanes<C> * lanes<C>;
    for (int64_t j = 0; j < whole; j += lanes<C>) {
      const Vec<C> v = load<C>(row + j) - mean;
      store(row + j, v);
      rest += v;
      square += v * v;
    }
    C tail_rest = 0, tail_square = 0;
    for (int64_t j = whole; j < d; ++j) {
      row[j] -= mean;
      tail_rest += row[j];
      tail_square += row[j] * row[j];
    }
    const C shift = (sum<C>(rest) + tail_rest) / d, variance = (sum<C>(square) + tail_square) / d - shift * shift;
    // A single column has nothing to vary: its gradient is zero, not what rounding leaves of a difference.
    rstd[i] = d == 1 ? 0 : 1 / __builtin_sqrt((variance > 0 || variance != variance ? variance : 0) + static_cast<C>(eps));
    for (int64_t j = 0; j < whole; j += lanes<C>) store(row + j, (load<C>(row + j) - shift) * rstd[i]);
    for (int64_t j = whole; j < d; ++j) row[j] = (row[j] - shift) * rstd[i];
  }
  return {out, ld};
}

// Mean and 1 / deviation of a row. The mean is refined by the sum of what it leaves, so that a large one does no harm.
template <class T, class C>
void moments(const T* row, int64_t d, int64_t step, double eps, C* mean, C* rstd) {
  const int64_t whole = d / lanes<C> * lanes<C>;
  Vec<C> total = {}, rest = {}, square = {};
  for (int64_t j = 0; j < d; j += lanes<C>) total += load_at<C>(row, j, d - j, step);
  const C first = sum<C>(total) / d;
  for (int64_t j = 0; j < d; j += lanes<C>) {
    Vec<C> v = load_at<C>(row, j, d - j, step) - first;
    for (int64_t t = d - j; j == whole && t < lanes<C>; ++t) v[t] = 0;
    rest += v;
    square += v * v;
  }
  const C shift = sum<C>(rest) / d, variance = sum<C>(square) / d - shift * shift;
  *mean = first + shift;
  // A single column has nothing to vary.
  *rstd = d == 1 ? 0 : 1 / __builtin_sqrt((variance < 0 ? 0 : variance) + static_cast<C>(eps));
}

// Columns [c, c + width) of rows, contiguous and in their dtype: in place, or copied and (with mean) normalized.
template <class T, class C>
void contiguous_rows(const Rows& rows, const T* const* from, int64_t n, int64_t c, int64_t width, const C* mean, const C* rstd,
                     T* copy, const T** out) {
  for (int64_t i = 0; i < n; ++i, copy += width) {
    const T* row = from[i] + c * rows.step;
    out[i] = rows.step == 1 && !mean ? row : copy;
    if (out[i] == row) continue;
    for (int64_t j = 0; j < width; j += lanes<C>) {
      const Vec<C> v = load_at<C>(row, j, width - j, rows.step);
      store_at<C>(copy + j, 0, width - j, mean ? (v - mean[i]) * rstd[i] : v);
    }
  }
}

// The same as they are.
template <class T>
FA_INLINE void contiguous_rows(const Rows& rows, const T* const* from, int64_t n, int64_t c, int64_t width, T* copy,
                               const T** out) {
  contiguous_rows<T, Compute<T>>(rows, from, n, c, width, nullptr, nullptr, copy, out);
}

// Reads and writes parameters of a call whose activations are T and whose weights are W.
template <class T, class W>
struct Parameters {
  using C = Compute<T>;

  // Elements [i, i + count).
  static FA_INLINE Vec<C> parameter_at(const Parameter& q, int64_t adapter, int64_t i, int64_t count) {
    const int64_t at = adapter * q.stride_g + i * q.stride;
    if (q.like_x) return load_some<C>(static_cast<const T*>(q.data) + at, count, q.stride);
    if constexpr (sizeof(C) == sizeof(float)) return load_some<C>(static_cast<const float*>(q.data) + at, count, q.stride);
    return Vec<C>{};
  }

  // out[0, n) = q, and zeros up to `room`.
  static void read(const Parameter& q, int64_t adapter, int64_t n, C* out, int64_t room) {
    auto copy = [&](auto* data) FA_FORCED {
      data += adapter * q.stride_g;
      int64_t i = 0;
      if (q.stride == 1)
        for (; i + lanes<C> <= n; i += lanes<C>) store(out + i, load<C>(data + i));
      for (; i < n; ++i) out[i] = load_some<C>(data + i * q.stride, 1)[0];
    };
    if (q.like_x)
      copy(static_cast<const T*>(q.data));
    else if constexpr (sizeof(C) == sizeof(float))
      copy(static_cast<const float*>(q.data));
    for (int64_t i = n; i < room; ++i) out[i] = 0;
  }

  // Elements [at, at + count) of a gradient of q.
  static FA_INLINE void write(const Parameter& q, void* out, int64_t at, Vec<C> v, int64_t count) {
    if (q.like_x)
      store_at<C>(static_cast<T*>(out) + at, 0, count, v);
    else if constexpr (sizeof(C) == sizeof(float))
      store_at<C>(static_cast<float*>(out) + at, 0, count, v);
  }

  static FA_INLINE const W* element(const Weight& w, int64_t id, int64_t i, int64_t j) {
    return static_cast<const W*>(w.data) + id * w.stride_g + i * w.stride_0 + j * w.stride_1;
  }
};

// The kernel of a pair of dtypes, for the table of the instruction set: Pass<T, W>::kernel().
template <template <class, class> class Pass>
auto kernel_of(Dtype dtype, Dtype weight_dtype) {
  const bool wide = weight_dtype != dtype;  // float32 weights of a 16-bit activation
  switch (dtype) {
    case Dtype::float16: return wide ? Pass<Half, float>::kernel() : Pass<Half, Half>::kernel();
    case Dtype::bfloat16: return wide ? Pass<BFloat16, float>::kernel() : Pass<BFloat16, BFloat16>::kernel();
    case Dtype::float64: return Pass<double, double>::kernel();
    default: return Pass<float, float>::kernel();
  }
}

}  // namespace fastadapt::FA_TARGET
