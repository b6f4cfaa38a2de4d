// Forward and backward of the bottleneck adapter over the rows of one segment, a block at a time.
#pragma once
#include "bottleneck_prepare.h"

namespace fastadapt::FA_TARGET::bottleneck {

// Where the rows of a block lie, with `order` and the strides of the leading dims resolved.
template <class T>
struct Block {
  int64_t n;
  const T *x[max_rows], *residual[max_rows], *grad_y[max_rows];
  T* out[max_rows];
};

template <class T>
FA_INLINE void locate(const Problem& p, int64_t begin, int64_t n, Block<T>& b) {
  b.n = n;
  if (p.x.data) locate_rows(p.x, p.order, begin, n, b.x);
  if (p.residual.data) locate_rows(p.residual, p.order, begin, n, b.residual);
  if (p.grad_y.data) locate_rows(p.grad_y, p.order, begin, n, b.grad_y);
  Rows out{p.backward ? p.grads[grad_x] : p.y, p.d};
  if (out.data) locate_rows(out, p.order, begin, n, const_cast<const T**>(b.out));
}

// y = residual + product (which carries up_bias) + skip * x, where the residual may be x.
template <class T, class C>
struct UpEpilogue {
  const Block<T>& block;
  const Problem& p;
  const C* skip;
  int64_t first = 0;  // column of the operands' first

  template <int MR, int NV>
  FA_INLINE void operator()(int64_t i, int64_t j, Vec<C> (&acc)[MR][NV]) const {
    constexpr int L = lanes<C>;
    j += first;
    const bool whole = j + NV * L <= p.d && p.x.step == 1 && p.residual.step == 1;
    const T* const* added = p.add_x ? block.x : p.residual.data ? block.residual : nullptr;
    const int64_t step = p.add_x ? p.x.step : p.residual.step;
    if (whole && !skip) {
#pragma GCC unroll 16
      for (int t = 0; t < MR; ++t)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
          Vec<C> y = acc[t][v];
          if (added) y += load<C>(added[i + t] + j + v * L);
          store(block.out[i + t] + j + v * L, y);
        }
      return;
    }
    loop(Spilled<C, MR, NV>(acc).tile[0], MR, NV, i, j, added, step);
  }

  FA_NOINLINE void loop(const Vec<C>* tile, int rows, int vectors, int64_t i, int64_t j, const T* const* added,
                        int64_t step) const {
    for (int t = 0; t < rows; ++t, tile += vectors)
      for (int v = 0; v < vectors; ++v) {
        const int64_t c = j + v * lanes<C>, count = p.d - c;
        if (count <= 0) break;
        Vec<C> y = tile[v];
        if (added) y += load_at<C>(added[i + t], c, count, step);
        if (skip) y += load<C>(skip + c) * load_at<C>(block.x[i + t], c, count, p.x.step);
        store_at<C>(block.out[i + t], c, count, y);
      }
  }
};

// grad_x from grad_n (which carries norm_weight already): through the norm, plus what bypasses the adapter.
template <class T, class C>
struct GradEpilogue {
  const Block<T>& block;
  const Problem& p;
  const C* skip;
  Operand<C> xhat, grad_y;
  const C *rstd, *mean, *mean_x;  // rstd null: no norm
  int64_t first = 0;              // column of the operands' first

  template <int MR, int NV>
  FA_INLINE void operator()(int64_t i, int64_t j, Vec<C> (&acc)[MR][NV]) const {
    constexpr int L = lanes<C>;
    if (first + j + NV * L <= p.d && !rstd && !skip) {
#pragma GCC unroll 16
      for (int t = 0; t < MR; ++t)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
          Vec<C> out = acc[t][v];
          if (p.add_x) out += load<C>(grad_y.data + (i + t) * grad_y.ld + j + v * L);
          store(block.out[i + t] + first + j + v * L, out);
        }
      return;
    }
    loop(Spilled<C, MR, NV>(acc).tile[0], MR, NV, i, j);
  }

  FA_NOINLINE void loop(const Vec<C>* tile, int rows, int vectors, int64_t i, int64_t j) const {
    for (int t = 0; t < rows; ++t, tile += vectors)
      for (int v = 0; v < vectors; ++v) {
        const int64_t c = j + v * lanes<C>, count = p.d - first - c, row = i + t;
        if (count <= 0) break;
        Vec<C> out = tile[v];
        if (rstd) out = rstd[row] * (out - mean[row] - load_at<C>(xhat.data + row * xhat.ld, c, count, 1) * mean_x[row]);
        const Vec<C> g = load_at<C>(grad_y.data + row * grad_y.ld, c, count, 1);
        if (p.add_x) out += g;
        if (skip) out += load<C>(skip + first + c) * g;
        store_at<C>(block.out[row], first + c, count, out);
      }
  }
};

// a = act(z) + hidden_skip * z, in place.
template <class C>
void activate(const Problem& p, int64_t count, C* z, const C* hidden_skip) {
  const int64_t width = padded<C>(p.r);
  with_activation(p.activation, [&](auto code) FA_FORCED {
    for (int64_t i = 0; i < count; i += width)
      for (int64_t j = 0; j < width; j += lanes<C>) {
        const Vec<C> v = load<C>(z + i + j);
        Vec<C> a, slope;
        activate_vector<decltype(code)::value, false>(v, a, slope, C{});
        if (hidden_skip) a += load<C>(hidden_skip + j) * v;
        store(z + i + j, a);
      }
  });
}

// From z and grad_a: a, grad_z (into grad_a), and their sums over the rows.
template <class C>
void hidden_gradients(const Problem& p, int64_t n, const Scratch<C>& s, const C* hidden_skip, const Partial<C>& q) {
  const int64_t width = padded<C>(p.r);
  const bool back = needs_grad_a(p);
  with_activation(p.activation, [&](auto code) FA_FORCED {
    for (int64_t j = 0; j < width; j += lanes<C>) {
      Vec<C> sum_skip[4] = {}, sum_bias[4] = {};
      for (int64_t row = 0; row < n; ++row) {
        const int64_t i = row * width + j;
        const Vec<C> z = load<C>(s.z + i);
        Vec<C> a, slope;
        activate_vector<decltype(code)::value, true>(z, a, slope, C{});
        if (hidden_skip) a += load<C>(hidden_skip + j) * z;
        store(s.a + i, a);
        if (!back) continue;
        const Vec<C> grad_a = load<C>(s.grad_a + i);
        // relu selects: where it is 0, NaN and infinity end, as in PyTorch.
        Vec<C> grad_z = decltype(code)::value == relu ? (z <= 0 ? Vec<C>{} : grad_a) : grad_a * slope;
        if (hidden_skip) grad_z += grad_a * load<C>(hidden_skip + j);
        sum_skip[row % 4] += grad_a * z;
        sum_bias[row % 4] += grad_z;
        store(s.grad_a + i, grad_z);
      }
      store(q.hidden_skip + j, load<C>(q.hidden_skip + j) + ((sum_skip[0] + sum_skip[1]) + (sum_skip[2] + sum_skip[3])));
      store(q.down_bias + j, load<C>(q.down_bias + j) + ((sum_bias[0] + sum_bias[1]) + (sum_bias[2] + sum_bias[3])));
    }
  });
}

template <class T, class W>
struct Pass : Types<T, W> {
  using Base = Types<T, W>;
  using C = Compute<T>;

  // Rows without an adapter: y or grad_x is what is added to the branch.
  static void pass_through(const Problem& p, const Segment& s) {
    Block<T> b;
    const int64_t block = block_rows<C>(p);
    const Rows& rows = p.backward ? p.grad_y : p.add_x ? p.x : p.residual;
    const bool added = p.add_x || (!p.backward && p.residual.data);
    for (int64_t begin = s.begin; begin < s.end; begin += block) {
      locate(p, begin, least(block, s.end - begin), b);
      const T* const* from = p.backward ? b.grad_y : p.add_x ? b.x : b.residual;
      for (int64_t i = 0; i < b.n; ++i)
        for (int64_t j = 0; j < p.d; j += lanes<C>)
          store_at<C>(b.out[i], j, p.d - j, added ? load_at<C>(from[i], j, p.d - j, rows.step) : Vec<C>{});
    }
  }

  static FA_INLINE Operand<C> left(const Problem& p, const Block<T>& b, const Scratch<C>& s) {
    if (s.rstd) return normalize(b.x, b.n, p.d, p.x.step, p.norm_eps, s.x, s.rstd);
    return operand(b.x, b.n, p.d, p.x.step, s.x, p.backward);
  }

  static void forward(const Problem& p, void* shared_memory, void* thread_memory, const Segment& seg) {
    if (seg.adapter < 0) return pass_through(p, seg);
    Arena shared(shared_memory), thread(thread_memory);
    const Common<C> c = Base::common(p, shared);
    const Adapter<C> a = Base::template enter<Base>(p, c, shared, thread, seg);
    const Scratch<C> s = Base::scratch(p, thread);
    const int64_t block = block_rows<C>(p), ldz = padded<C>(p.r);
    Block<T> b;
    for (int64_t begin = seg.begin; begin < seg.end; begin += block) {
      locate(p, begin, least(block, seg.end - begin), b);
      const Operand<C> x = left(p, b, s);
      project_rows(b.n, p.d, p.r, x.data, x.ld, a.down, a.down_bias, s.z);
      activate(p, b.n * ldz, s.z, c.hidden_skip);
      gemm_epilogue(b.n, p.r, p.d, s.z, ldz, a.up, a.up_bias, UpEpilogue<T, C>{b, p, c.skip});
    }
  }

  // The two means of LayerNorm's backward, formed from the r hidden values instead of the d columns.
  template <class Packed>
  static void norm_means(const Problem& p, int64_t n, const Scratch<C>& s, const Adapter<C, Packed>& a) {
    const int64_t width = padded<C>(p.r);
    for (int64_t i = 0; i < n; ++i) {
      Vec<C> mean = {}, mean_x = {};
      for (int64_t j = 0; j < width; j += lanes<C>) {
        const Vec<C> grad_z = load<C>(s.grad_a + i * width + j);
        mean += grad_z * load<C>(a.norm_sum + j);
        mean_x += grad_z * (load<C>(s.z + i * width + j) - load<C>(a.down_bias + j));
      }
      s.mean[i] = sum<C>(mean) / p.d;
      s.mean_x[i] = sum<C>(mean_x) / p.d;
    }
  }

  // sum_g += column sums of grad_y; skip += column sums of grad_y * x. Four sums side by side lose fewer bits than one.
  // The operand begins at column `begin`.
  static void column_sums(const Problem& p, const Block<T>& b, const Operand<C>& g, const Partial<C>& q, int64_t begin,
                          int64_t end) {
    for (int64_t j = begin; j < end; j += lanes<C>) {
      const int64_t count = p.d - j;
      Vec<C> total[4] = {}, product[4] = {};
      for (int64_t i = 0; i < b.n; ++i) {
        const Vec<C> v = load_at<C>(g.data + i * g.ld, j - begin, count, 1);
        total[i % 4] += v;
        if (q.skip) product[i % 4] += v * load_at<C>(b.x[i], j, count, p.x.step);
      }
      if (q.sum_g) store(q.sum_g + j, load<C>(q.sum_g + j) + ((total[0] + total[1]) + (total[2] + total[3])));
      if (q.skip) store(q.skip + j, load<C>(q.skip + j) + ((product[0] + product[1]) + (product[2] + product[3])));
    }
  }

  static void backward(const Problem& p, void* shared_memory, void* thread_memory, const Segment& seg, void* partial_memory) {
    if (seg.adapter < 0) {
      if (p.wants[grad_x]) pass_through(p, seg);
      return;
    }
    Arena shared(shared_memory), thread(thread_memory), part(partial_memory);
    const Common<C> c = Base::common(p, shared);
    const Adapter<C> a = Base::template enter<Base>(p, c, shared, thread, seg);
    const Scratch<C> s = Base::scratch(p, thread);
    const Partial<C> q = Base::partial(p, part);
    const int64_t block = block_rows<C>(p), width = padded<C>(p.r);
    clear(p, q);
    Block<T> b;
    for (int64_t begin = seg.begin; begin < seg.end; begin += block) {
      const bool more = begin > seg.begin;
      locate(p, begin, least(block, seg.end - begin), b);
      const Operand<C> g = operand(b.grad_y, b.n, p.d, p.grad_y.step, s.grad_y, true);
      Operand<C> x = {};
      if (needs_hidden(p)) {
        x = left(p, b, s);
        project_rows(b.n, p.d, p.r, x.data, x.ld, a.down, a.down_bias, s.z);
        if (needs_grad_a(p)) project_rows(b.n, p.d, p.r, g.data, g.ld, a.up_back, static_cast<const C*>(nullptr), s.grad_a);
        hidden_gradients(p, b.n, s, c.hidden_skip, q);
      }
      if (q.sum_g || q.skip) column_sums(p, b, g, q, 0, p.d);
      if (q.up) gemm_transposed(p.r, b.n, p.d, s.a, width, g.data, g.ld, more, q.up, padded<C>(p.d));
      if (q.down) gemm_transposed(p.r, b.n, p.d, s.grad_a, width, x.data, x.ld, more, q.down, padded<C>(p.d));
      if (p.wants[grad_x]) {
        if (s.rstd) norm_means(p, b.n, s, a);
        gemm_epilogue(b.n, p.r, p.d, s.grad_a, width, a.down_back, static_cast<const C*>(nullptr),
                      GradEpilogue<T, C>{b, p, c.skip, x, g, s.rstd, s.mean, s.mean_x});
      }
    }
  }

  static FA_INLINE void clear(const Problem& p, const Partial<C>& q) {
    for (int64_t j = 0; j < padded<C>(p.r); ++j) q.down_bias[j] = q.hidden_skip[j] = 0;
    for (int64_t j = 0; j < padded<C>(p.d); ++j) {
      if (q.sum_g) q.sum_g[j] = 0;
      if (q.skip) q.skip[j] = 0;
    }
  }
};

}  // namespace fastadapt::FA_TARGET::bottleneck
