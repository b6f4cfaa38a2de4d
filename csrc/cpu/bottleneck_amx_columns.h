// As bottleneck_columns.h on the tiles of AMX: with few rows threads share the columns, so that a packed weight stays in the
// cache of the thread that packs it.
#pragma once
#include "bottleneck_amx.h"
#include "bottleneck_columns.h"

#if FASTADAPT_AMX
namespace fastadapt::FA_TARGET::bottleneck {

template <class W>
struct AmxColumns : AmxReduce<W> {
  using Base = AmxReduce<W>;
  using T = BFloat16;
  using C = float;

  struct Shared {
    Common<C> common;
    typename Base::Weights adapter;  // the biases
    Scratch<C> hidden;            // z, grad_a and a of every row
    C *z_chunks, *grad_a_chunks;  // column_chunks of them
    T* a;                         // the left operand of expand
  };

  struct Local {
    T *tiles, *packed, *x, *residual;
    typename Base::Strip strip;
  };

  static FA_INLINE int64_t chunk_width(const Problem& p) { return round_up(ceil_div(p.d, column_chunks), 32); }
  static FA_INLINE int64_t hidden_size(const Problem& p) { return round_up(p.m, 16) * padded<C>(p.r); }

  static FA_INLINE Shared layout(const Problem& p, Arena& arena) {
    Shared s = {};
    s.common = Base::common(p, arena);
    s.adapter = Base::adapter(p, arena);
    s.a = arena.take<T>(round_up(p.m, 16) * round_up(p.r, 32));
    s.hidden.z = arena.take<C>(hidden_size(p));
    s.z_chunks = arena.take<C>(column_chunks * hidden_size(p));
    if (!p.backward) return s;
    s.hidden.a = arena.take<C>(hidden_size(p));
    s.hidden.grad_a = arena.take<C>(hidden_size(p));
    s.grad_a_chunks = arena.take<C>(column_chunks * hidden_size(p));
    return s;
  }

  static FA_INLINE Local local(const Problem& p, Arena& arena) {
    const int64_t rows = Base::block_rows(p), width = most(chunk_width(p), strip_width);
    Local l = {};
    l.tiles = arena.take<T>(amx::scratch_size(rows, chunk_width(p)));
    l.packed = arena.take<T>(most(amx::packed_size(p.r, chunk_width(p)), amx::packed_size(strip_width, p.r)));
    if (p.x.step != 1 || p.grad_y.step != 1) l.x = arena.take<T>(rows * width);
    if (p.residual.step != 1) l.residual = arena.take<T>(rows * width);
    if (p.backward) l.strip = Base::strip(p, arena);
    return l;
  }

  // z = rows * packed over columns [c, c + n).
  static void product(const Problem& p, const amx::TileScope& scope, const Local& l, const Rows& rows, int64_t c, int64_t n,
                      C* z) {
    const int64_t block = Base::block_rows(p), ldz = padded<C>(p.r);
    const T *from[max_rows], *left[max_rows];
    for (int64_t i = 0; i < p.m; i += block) {
      const int64_t count = least(block, p.m - i);
      locate_rows(rows, p.order, i, count, from);
      contiguous_rows(rows, from, count, c, n, l.x, left);
      amx::down(scope, left, count, n, l.packed, p.r, nullptr, z + i * ldz, ldz);
    }
  }

  static void project(const Problem& p, void* shared_memory, void* thread_memory, int64_t part, int64_t parts) {
    if (!needs_hidden(p)) return;
    Arena shared(shared_memory), thread(thread_memory);
    const Shared s = layout(p, shared);
    const Local l = local(p, thread);
    const amx::TileScope scope(l.tiles, Base::block_rows(p));
    const int64_t size = hidden_size(p), width = chunk_width(p);
    const W *down = Base::element(p.down, 0, 0, 0), *up = Base::element(p.up, 0, 0, 0);
    for (int64_t chunk = column_chunks * part / parts; chunk < column_chunks * (part + 1) / parts; ++chunk) {
      const int64_t c = least(p.d, chunk * width), n = least(p.d, c + width) - c;
      amx::pack_part(l.packed, down + c * p.down.stride_1, p.down.stride_0, p.down.stride_1, nullptr, p.r, n, 0, 1);
      product(p, scope, l, p.x, c, n, s.z_chunks + chunk * size);
      if (!p.backward || !needs_grad_a(p)) continue;
      const C* scale = s.common.scale ? s.common.scale + c : nullptr;
      amx::pack_part(l.packed, up + c * p.up.stride_0, p.up.stride_1, p.up.stride_0, scale, p.r, n, 0, 1);
      product(p, scope, l, p.grad_y, c, n, s.grad_a_chunks + chunk * size);
    }
  }

  static void add_chunks(const Problem& p, const C* chunks, const C* start, C* out) {
    const int64_t size = hidden_size(p), width = padded<C>(p.r);
    for (int64_t i = 0; i < p.m * width; i += width)
      for (int64_t j = 0; j < width; j += lanes<C>) {
        Vec<C> total = start ? load<C>(start + j) : Vec<C>{};
        for (int64_t chunk = 0; chunk < column_chunks; ++chunk) total += load<C>(chunks + chunk * size + i + j);
        store(out + i + j, total);
      }
  }

  static void hidden(const Problem& p, void* shared_memory, void* partial_memory) {
    Arena shared(shared_memory), part(partial_memory);
    const Shared s = layout(p, shared);
    const int64_t width = padded<C>(p.r), lda = round_up(p.m, 32);
    if (needs_hidden(p)) add_chunks(p, s.z_chunks, s.adapter.down_bias, s.hidden.z);
    if (!p.backward) {
      activate(p, p.m * width, s.hidden.z, s.common.hidden_skip);
      return amx::round_rows(s.hidden.z, width, p.m, p.r, s.a);
    }
    const typename Base::Kept k = Base::kept(p, part);
    const Partial<C> q = Base::sums_of(k);
    for (int64_t j = 0; j < width; ++j) q.down_bias[j] = q.hidden_skip[j] = 0;
    if (needs_grad_a(p)) add_chunks(p, s.grad_a_chunks, nullptr, s.hidden.grad_a);
    if (needs_hidden(p)) hidden_gradients(p, p.m, s.hidden, s.common.hidden_skip, q);
    if (k.a) amx::transpose_round(s.hidden.a, width, p.m, Base::kept_rows(p), Base::needs_sums(p), k.a, lda);
    if (k.grad_z) amx::transpose_round(s.hidden.grad_a, width, p.m, p.r, false, k.grad_z, lda);
    if (p.wants[grad_x]) amx::round_rows(s.hidden.grad_a, width, p.m, p.r, s.a);
  }

  // Columns [c, c + width) of y or grad_x.
  static void outputs(const Problem& p, const amx::TileScope& scope, const Shared& s, const Local& l, int64_t c,
                      int64_t width) {
    const Weight& w = p.backward ? p.down : p.up;
    const int64_t stride_n = p.backward ? w.stride_1 : w.stride_0, stride_k = p.backward ? w.stride_0 : w.stride_1;
    amx::pack_part(l.packed, static_cast<const W*>(w.data) + c * stride_n, stride_n, stride_k, nullptr, width, p.r, 0, 1);
    const int64_t block = Base::block_rows(p);
    Block<T> b;
    const T *x[max_rows], *residual[max_rows];
    const T* const* from = p.backward ? b.grad_y : b.x;
    amx::Epilogue e;
    if (!p.backward) e.col_mul = s.common.scale ? s.common.scale + c : nullptr, e.col_add = s.adapter.up_bias + c;
    if (p.add_x || p.residual.data) e.residual = p.add_x ? x : residual;
    if (s.common.skip) e.col_skip = s.common.skip + c, e.skip = x;
    for (int64_t i = 0; i < p.m; i += block) {
      locate(p, i, least(block, p.m - i), b);
      contiguous_rows(p.backward ? p.grad_y : p.x, from, b.n, c, width, l.x, x);
      if (p.residual.data) contiguous_rows(p.residual, b.residual, b.n, c, width, l.residual, residual);
      for (int64_t t = 0; t < b.n; ++t) b.out[t] += c;
      amx::up(scope, s.a + i * round_up(p.r, 32), b.n, p.r, l.packed, width, e, b.out);
    }
  }

  static void expand(const Problem& p, void* shared_memory, void* thread_memory, void* partials, int64_t part, int64_t parts) {
    Arena shared(shared_memory), thread(thread_memory);
    const Shared s = layout(p, shared);
    const Local l = local(p, thread);
    const amx::TileScope scope(l.tiles, Base::block_rows(p));
    const Segment all = {0, 0, p.m};
    const int64_t bytes = Base::sizes(p).partial;
    Base::each_strip(p, part, parts, [&](int64_t c, int64_t width) {
      if (!p.backward || p.wants[grad_x]) outputs(p, scope, s, l, c, width);
      if (p.backward) Base::weight_gradients(p, s.common, scope, l.strip, &all, 1, partials, bytes, c, width);
    });
  }

  static Kernel kernel() {
    Kernel k = column_kernel<AmxColumns>();
    k.most_column_rows = 128;
    return k;
  }
};

}  // namespace fastadapt::FA_TARGET::bottleneck

namespace fastadapt::bottleneck::FA_TARGET {

// For bfloat16 rows.
Kernel amx_kernel(Dtype weight_dtype) {
  using namespace fastadapt::FA_TARGET::bottleneck;
  return weight_dtype == Dtype::float32 ? AmxColumns<float>::kernel() : AmxColumns<BFloat16>::kernel();
}

}  // namespace fastadapt::bottleneck::FA_TARGET
#endif
