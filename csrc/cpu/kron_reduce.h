// The end of backward, of sums of Kronecker products: partial sums of the segments, added in their order.
#pragma once
#include "kron_products.h"

namespace fastadapt::FA_TARGET::kron {

// f(adapter, number of its first segment, end of its segments) for each that has rows.
template <class F>
FA_INLINE void for_adapters(const Segment* segments, int64_t count, const F& f) {
  for (int64_t first = 0, last; first < count; first = last) {
    for (last = first; last < count && segments[last].adapter == segments[first].adapter;) ++last;
    if (segments[first].adapter >= 0) f(segments[first].adapter, first, last);
  }
}

template <class C, class Problem, class Pass>
void reduce(const Problem& p, const Segment* segments, int64_t count, void* partials, int64_t part, int64_t parts) {
  const int64_t size = Pass::partial_bytes(p) / static_cast<int64_t>(sizeof(C)), blocks = size / lanes<C>;
  const int64_t begin = blocks * part / parts * lanes<C>, end = blocks * (part + 1) / parts * lanes<C>;
  for_adapters(segments, count, [&](int64_t, int64_t first, int64_t last) {
    C* sums = static_cast<C*>(partials) + first * size;
    for (int64_t j = begin; j < end; j += lanes<C>) {
      Vec<C> total = load<C>(sums + j);
      for (int64_t s = 1; s < last - first; ++s) total += load<C>(sums + s * size + j);
      store(sums + j, total);
    }
  });
}

// Writes sums[(term, rank)][column] as the gradient of a factor (terms, columns, q), or with `by_rank` (terms, q, columns).
// `scratch` has columns * q elements.
template <class C>
void write_matrix(Dtype dtype, void* out, int64_t adapter, int64_t terms, int64_t q, int64_t width, const C* sums,
                  bool by_rank, C* scratch) {
  const int64_t ld = matrix_stride<C>(width), size = q * width;
  for (int64_t i = 0; i < terms; ++i) {
    const int64_t at = (adapter * terms + i) * size;
    if (by_rank || q == 1) {
      for (int64_t k = 0; k < q; ++k) write_gradient(dtype, out, at + k * width, width, sums + (i * q + k) * ld);
      continue;
    }
    for (int64_t k = 0; k < q; ++k)
      for (int64_t j = 0; j < width; ++j) scratch[j * q + k] = sums[(i * q + k) * ld + j];
    write_gradient(dtype, out, at, size, scratch);
  }
}

// Chunks whose memory is padded, as one gradient.
template <class C>
void write_chunks(Dtype dtype, void* out, int64_t adapter, const Shape& s, const C* sums) {
  for (int64_t c = 0; c < s.chunks; ++c)
    write_gradient(dtype, out, (adapter * s.chunks + c) * s.width, s.width, sums + c * padded<C>(s.width));
}

}  // namespace fastadapt::FA_TARGET::kron
