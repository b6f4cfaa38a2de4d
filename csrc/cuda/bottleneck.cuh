// bottleneck on the GPU: what forward and backward share, and the forward kernel.  Free of torch.
#pragma once
#include "activation.cuh"
#include "bank.cuh"

namespace fastadapt {

struct Bottleneck {
  int64_t m;
  int d, r;
  Rows x, other;  // other: the residual in forward, grad_y in backward; data is nullptr where there is none
  Weight down, up;
  Vector down_bias, up_bias, scale, norm_weight, norm_bias, skip, hidden_skip;
  float scale_value, norm_eps;
  int activation, add_x;
  Groups groups;
  void* out;  // y or grad_x, contiguous rows; nullptr if grad_x isn't wanted

  template <class T>
  __device__ __forceinline__ float scale_at(int64_t column) const {
    return scale.data ? scale.at<T>(column) : scale_value;
  }
  __device__ __forceinline__ bool scale_varies() const { return scale.data && scale.stride; }
};

// What a block of BM rows keeps in shared memory: a table of its rows, a ring of stages, the hidden tile, and for each warp a
// part of the output.  A stage holds a tile of rows (A, or E in the epilogue) and a tile of weights (B).
template <class T, int BM>
struct Block {
  static constexpr int kDepth = Shape<T>::kDepth, kStages = Shape<T>::kStages;
  static constexpr int kRowA = Shape<T>::padded(kDepth), kRowE = Shape<T>::padded(kN);
  static constexpr int kTileA = BM * (kRowA > kRowE ? kRowA : kRowE);
  static constexpr int kTileB = kN * kRowA > kDepth * kRowE ? kN * kRowA : kDepth * kRowE;
  static constexpr int kStage = kTileA + kTileB;
  // Blocks at once: left alone, the compiler spills to save registers.
  static constexpr int kPerMultiprocessor = BM < 64 ? 4 : sizeof(T) == 2 ? 3 : 2;
  static constexpr int kWarpsM = BM / 16, kWarpsN = kWarps / kWarpsM, kBlocks = kN / 8 / kWarpsN;
  // Products leave the registers through float32 tiles, so that one lane owns two columns and code isn't repeated for each
  // accumulator.  Half of a warp's columns at a time: a third block then fits into the shared memory of sm_90.
  static constexpr int kRowF = kN + 8, kPart = kBlocks < 4 ? kBlocks : 4, kRowPart = kPart * 8 + 4;

  struct Table {
    int64_t row[BM], x[BM], other[BM];  // row number, or -1; where the row begins
    float mean[BM], rstd[BM];           // of the LayerNorm in front
    float sum[BM], sum_xhat[BM];        // backward's sums of grad_n, and of grad_n * xhat
  };
  static constexpr int64_t kTable = (sizeof(Table) + 127) / 128 * 128;
  static constexpr int64_t kParts = kWarps * 16 * kRowPart * sizeof(float);

  static constexpr __host__ __device__ int hidden_row(int r) { return round_up(r > 0 ? r : 1, kDepth) + Shape<T>::kVector; }
  static constexpr __host__ __device__ int64_t bytes(int r) {
    return kTable + kParts + (static_cast<int64_t>(kStages) * kStage + static_cast<int64_t>(BM) * hidden_row(r)) * sizeof(T);
  }

  Table* table;
  float* part;
  T *stages, *hidden;
  int row_h, warp, warp_m, warp_n, lane;

  __device__ __forceinline__ Block(unsigned char* shared, int r) : table(reinterpret_cast<Table*>(shared)) {
    warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    warp_m = warp % kWarpsM, warp_n = warp / kWarpsM;
    part = reinterpret_cast<float*>(shared + kTable) + warp * 16 * kRowPart;
    stages = reinterpret_cast<T*>(shared + kTable + kParts);
    hidden = stages + kStages * kStage;
    row_h = hidden_row(r);
  }
  __device__ __forceinline__ T* tile_a(int stage) const { return stages + stage * kStage; }
  __device__ __forceinline__ T* tile_b(int stage) const { return stages + stage * kStage + kTileA; }
  // A (BM, 64) tile of float32 in the memory of the stages, while no copy is in flight.
  __device__ __forceinline__ float* tile_f(int i) const { return reinterpret_cast<float*>(stages) + i * BM * kRowF; }
  // How many blocks of 8 columns of this warp lie within `columns`.
  __device__ __forceinline__ int live(int columns) const {
    const int left = (columns - warp_n * kBlocks * 8 + 7) / 8;
    return left < 0 ? 0 : least(left, kBlocks);
  }
};

// Writes the accumulators of blocks FIRST .. FIRST + COUNT - 1 of a warp to a float32 tile at its first row and column.
template <int FIRST, int COUNT, int NI>
__device__ __forceinline__ void write_blocks(float* tile, int row, const float (&acc)[NI][4]) {
  const int lane = threadIdx.x % 32;
  float* to = tile + lane / 4 * row + lane % 4 * 2;
#pragma unroll
  for (int j = 0; j < COUNT; j++) {
    *reinterpret_cast<float2*>(to + j * 8) = float2{acc[FIRST + j][0], acc[FIRST + j][1]};
    *reinterpret_cast<float2*>(to + 8 * row + j * 8) = float2{acc[FIRST + j][2], acc[FIRST + j][3]};
  }
}

template <class T, int BM>
__device__ void fill_table(const Block<T, BM>& b, const Bottleneck& p, const Tile& tile) {
  for (int i = threadIdx.x; i < BM; i += kThreads) {
    const bool valid = tile.begin + i < tile.end;
    const int64_t row = valid ? p.groups.row(tile.begin + i) : -1;
    b.table->row[i] = row;
    b.table->x[i] = valid ? p.x.offset(row) : 0;
    b.table->other[i] = valid && p.other.data ? p.other.offset(row) : 0;
    b.table->mean[i] = b.table->rstd[i] = b.table->sum[i] = b.table->sum_xhat[i] = 0.f;
  }
  __syncthreads();
}

// Mean and rstd of every row of the tile, a row a warp; the second pass keeps the variance exact and finds x in the cache.
template <class T, int BM>
__device__ void row_statistics(const Block<T, BM>& b, const Bottleneck& p) {
  for (int i = b.warp; i < BM; i += kWarps) {
    if (b.table->row[i] < 0) continue;
    const T* x = static_cast<const T*>(p.x.data) + b.table->x[i];
    float mean = 0.f, square = 0.f;
    for (int c = b.lane; c < p.d; c += 32) mean += to_float(x[c * p.x.inner.stride]);
    for (int o = 16; o; o /= 2) mean += __shfl_xor_sync(0xffffffffu, mean, o);
    mean /= p.d;
    for (int c = b.lane; c < p.d; c += 32) {
      const float v = to_float(x[c * p.x.inner.stride]) - mean;
      square += v * v;
    }
    for (int o = 16; o; o /= 2) square += __shfl_xor_sync(0xffffffffu, square, o);
    if (b.lane == 0) {
      b.table->mean[i] = mean;
      b.table->rstd[i] = 1.f / sqrtf(square / p.d + p.norm_eps);
    }
  }
  __syncthreads();
}

// acc = f(rows) @ weight.T for the 64 columns of rank r0.. : streams the whole width.  The weight is (r, d), or (d, r) if
// TRANSPOSED; f, applied where `changed`, maps an element (value, row, column) of the rows before the product.
template <bool TRANSPOSED, class T, int BM, class F>
__device__ __forceinline__ void project(float (&acc)[Block<T, BM>::kBlocks][4], const Block<T, BM>& b, const Rows& rows,
    const int64_t* offsets, const Weight& weight, int adapter, int d, int r, int r0, bool changed, F f) {
  using B = Block<T, BM>;
  constexpr int kDepth = B::kDepth, kRowB = TRANSPOSED ? B::kRowE : B::kRowA;
  const T* data = static_cast<const T*>(rows.data);
  const T* w = weight.of<T>(adapter);
  const int columns = least(round_up(r - r0, 16), kN), live = b.live(columns);
  auto depth = [&](int k0) { return least(round_up(d - k0, 16), kDepth); };
  for (auto& block : acc)
    for (float& v : block) v = 0.f;
  pipeline<B::kStages>(
      divide_up(d, kDepth),
      [&](int64_t step, int stage) {
        const int k0 = static_cast<int>(step) * kDepth;
        load_tile<kDepth>(b.tile_a(stage), BM, depth(k0), d - k0, rows.inner,
            [&](int i) { return b.table->row[i] < 0 ? nullptr : data + offsets[i] + k0 * rows.inner.stride; });
        load_weight<TRANSPOSED, kN, kDepth>(b.tile_b(stage), w, weight.row, r0, columns, r, k0, depth(k0), d);
      },
      [&](int64_t step, int stage) {
        if (!changed) return;
        const int k0 = static_cast<int>(step) * kDepth;
        change_tile<kDepth>(b.tile_a(stage), BM, depth(k0), d - k0, rows.inner,
            [&](float v, int row, int column) { return f(v, row, k0 + column); });
      },
      [&](int64_t step, int stage) {
        float unused[4];
        const int n = b.warp_n * B::kBlocks * 8;
        multiply<B::kBlocks, false, TRANSPOSED, false>(acc, unused, b.tile_a(stage) + b.warp_m * 16 * B::kRowA, B::kRowA,
            b.tile_b(stage) + (TRANSPOSED ? n : n * kRowB), kRowB, depth(static_cast<int>(step) * kDepth), live);
      });
}

// What the activation needs of a column of rank.
struct HiddenColumn {
  float bias, skip;
  bool live, skips;  // without a skip an infinite z must not meet a zero

  __device__ __forceinline__ float hidden(int activation, float z) const {
    const float a = activate(activation, z);
    return skips ? a + skip * z : a;
  }
};
template <class T>
__device__ __forceinline__ HiddenColumn hidden_column(const Bottleneck& p, int adapter, int column) {
  if (column >= p.r) return HiddenColumn{0.f, 0.f, false, false};
  return HiddenColumn{p.down_bias.data ? p.down_bias.at<T>(adapter, column) : 0.f,
      p.hidden_skip.data ? p.hidden_skip.at<T>(column) : 0.f, true, p.hidden_skip.data != nullptr};
}

// z without its bias, for the 64 columns of rank r0.. .
template <class T, int BM>
__device__ __forceinline__ void project_down(
    float (&acc)[Block<T, BM>::kBlocks][4], const Block<T, BM>& b, const Bottleneck& p, int adapter, int r0) {
  project<false>(acc, b, p.x, b.table->x, p.down, adapter, p.d, p.r, r0, p.norm_weight.data, [&](float v, int row, int column) {
    v = (v - b.table->mean[row]) * b.table->rstd[row] * p.norm_weight.at<T>(column);
    return p.norm_bias.data ? v + p.norm_bias.at<T>(column) : v;
  });
}

// The epilogue of one output tile: a warp passes its 16 rows through its float32 part, a lane keeps two columns.
template <class T, int BM, class Prepare, class F>
__device__ __forceinline__ void write_output(const Block<T, BM>& b, const Bottleneck& p, const T* e, int n0,
    const float (&acc)[Block<T, BM>::kBlocks][4], Prepare prepare, F f) {
  using B = Block<T, BM>;
  constexpr int kLanes = B::kPart * 4;  // lanes a row
  const bool together = p.d % 2 == 0;
  auto half = [&](int first) {
    __syncwarp();
    const int column = (b.warp_n * B::kBlocks + first) * 8 + b.lane % kLanes * 2, left = p.d - n0 - column;
    if (left > 0) {
      const auto at_first = prepare(n0 + column), at_second = prepare(n0 + column + (left > 1));
#pragma unroll 4
      for (int i = b.lane / kLanes; i < 16; i += 32 / kLanes) {
        const int row = b.warp_m * 16 + i;
        if (b.table->row[row] < 0) break;
        const float2 v = *reinterpret_cast<const float2*>(b.part + i * B::kRowPart + b.lane % kLanes * 2);
        const T* extra = e ? e + row * B::kRowE + column : nullptr;
        store_pair(static_cast<T*>(p.out) + b.table->row[row] * p.d + n0 + column,
            f(v.x, at_first, row, n0 + column, extra ? to_float(extra[0]) : 0.f),
            f(v.y, at_second, row, n0 + column + (left > 1), extra ? to_float(extra[1]) : 0.f), together, left);
      }
    }
    __syncwarp();
  };
  write_blocks<0, B::kPart>(b.part, B::kRowPart, acc);
  half(0);
  if constexpr (B::kBlocks > B::kPart) {
    write_blocks<B::kBlocks - B::kPart, B::kPart>(b.part, B::kRowPart, acc);
    half(B::kPart);
  }
}

// out = f(hidden @ weight.T) for the whole width: streams the weight, (d, r) or (r, d) if TRANSPOSED, in tiles of 64 columns.
// prepare(column) collects what f needs of a column; f(product, prepared, row, column, e) returns an element of the output,
// with e that of `extra`, or 0 if `extra` is nullptr.
template <bool TRANSPOSED, class T, int BM, class Prepare, class F>
__device__ __forceinline__ void expand(const Block<T, BM>& b, const Bottleneck& p, const Weight& weight, int adapter,
    const Rows* extra, const int64_t* offsets, Prepare prepare, F f) {
  using B = Block<T, BM>;
  constexpr int kDepth = B::kDepth, kRowB = TRANSPOSED ? B::kRowE : B::kRowA;
  const int d = p.d, r = p.r, parts = p.r > 0 ? static_cast<int>(divide_up(r, kDepth)) : 1;
  const T* w = weight.of<T>(adapter);
  auto depth = [&](int part) { return least(round_up(r - part * kDepth, 16), kDepth); };
  auto columns = [&](int n0) { return least(round_up(d - n0, 16), kN); };
  float acc[B::kBlocks][4] = {};
  pipeline<B::kStages>(
      divide_up(d, kN) * parts,
      [&](int64_t step, int stage) {
        const int n0 = static_cast<int>(step / parts) * kN, part = static_cast<int>(step % parts);
        load_weight<TRANSPOSED, kN, kDepth>(b.tile_b(stage), w, weight.row, n0, columns(n0), d, part * kDepth, depth(part), r);
        if (extra && part == parts - 1)
          load_tile<kN>(b.tile_a(stage), BM, columns(n0), d - n0, extra->inner, [&](int i) {
            return b.table->row[i] < 0 ? nullptr : static_cast<const T*>(extra->data) + offsets[i] + n0 * extra->inner.stride;
          });
      },
      [](int64_t, int) {},
      [&](int64_t step, int stage) {
        const int n0 = static_cast<int>(step / parts) * kN, part = static_cast<int>(step % parts);
        const int n = b.warp_n * B::kBlocks * 8;
        float unused[4];
        multiply<B::kBlocks, false, TRANSPOSED, false>(acc, unused, b.hidden + b.warp_m * 16 * b.row_h + part * kDepth, b.row_h,
            b.tile_b(stage) + (TRANSPOSED ? n : n * kRowB), kRowB, depth(part), b.live(columns(n0)));
        if (part < parts - 1) return;
        write_output(b, p, extra ? b.tile_a(stage) : nullptr, n0, acc, prepare, f);
        for (auto& block : acc)
          for (float& v : block) v = 0.f;
      });
}

// Rows without an adapter pass `source` through, or become zero; rows of an id outside the bank become NaN.
template <class T, int BM>
__device__ void pass_rows(
    const Block<T, BM>& b, const Bottleneck& p, bool invalid, const Rows* source, const int64_t* offsets) {
  T* out = static_cast<T*>(p.out);
  for (int i = 0; i < BM; i++) {
    if (b.table->row[i] < 0) break;
    for (int c = threadIdx.x; c < p.d; c += kThreads)
      out[b.table->row[i] * p.d + c] = invalid  ? from_float<T>(nanf(""))
                                       : source ? static_cast<const T*>(source->data)[offsets[i] + c * source->inner.stride]
                                                : from_float<T>(0.f);
  }
}

// One block computes BM rows of y.  The hidden tile stays in shared memory; x is read twice, the second time from the cache.
template <class T, int BM>
__global__ void __launch_bounds__(kThreads, Block<T, BM>::kPerMultiprocessor)
    bottleneck_fwd_kernel(const __grid_constant__ Bottleneck p) {
  FA_DYNAMIC_SHARED(shared);
  using B = Block<T, BM>;
  const B b(shared, p.r);
  const Tile tile = find_tile(p.groups, blockIdx.x, BM);
  if (tile.begin >= tile.end) return;
  fill_table(b, p, tile);
  const Rows* residual = p.other.data ? &p.other : p.add_x ? &p.x : nullptr;
  if (tile.adapter >= p.groups.g)
    return pass_rows(b, p, tile.adapter > p.groups.g, residual, p.other.data ? b.table->other : b.table->x);
  if (p.norm_weight.data) row_statistics(b, p);

  for (int r0 = 0; r0 < p.r; r0 += kN) {
    float acc[B::kBlocks][4];
    project_down(acc, b, p, tile.adapter, r0);
    write_blocks<0, B::kBlocks>(b.tile_f(0) + b.warp_m * 16 * B::kRowF + b.warp_n * B::kBlocks * 8, B::kRowF, acc);
    __syncthreads();
    const int column = r0 + b.lane * 2;
    if (column < round_up(p.r, 16)) {
      const auto at_first = hidden_column<T>(p, tile.adapter, column),
                 at_second = hidden_column<T>(p, tile.adapter, column + 1);
#pragma unroll 1
      for (int row = b.warp; row < BM; row += kWarps) {
        float2 z = *reinterpret_cast<float2*>(b.tile_f(0) + row * B::kRowF + b.lane * 2);
        z.x += at_first.bias, z.y += at_second.bias;
        // Padding must be a zero, whatever infinities x holds.
        store_pair(b.hidden + row * b.row_h + column, at_first.live ? at_first.hidden(p.activation, z.x) : 0.f,
            at_second.live ? at_second.hidden(p.activation, z.y) : 0.f, true, 2);
      }
    }
    __syncthreads();
  }

  const bool from_other = p.other.data, add = from_other || p.add_x;
  const Rows* extra = add ? residual : p.skip.data ? &p.x : nullptr;
  struct Column {
    float bias, scale, skip;
  };
  expand<false>(
      b, p, p.up, tile.adapter, extra, from_other ? b.table->other : b.table->x,
      [&](int column) {
        return Column{p.up_bias.data ? p.up_bias.at<T>(tile.adapter, column) : 0.f, p.scale_at<T>(column),
            p.skip.data ? p.skip.at<T>(column) : 0.f};
      },
      [&](float u, const Column& at, int row, int column, float e) {
        float y = at.scale * (u + at.bias);
        if (add) y += e;
        if (!p.skip.data) return y;
        return y +
               at.skip *
                   (from_other ? to_float(static_cast<const T*>(p.x.data)[b.table->x[row] + column * p.x.inner.stride]) : e);
      });
}

}  // namespace fastadapt
