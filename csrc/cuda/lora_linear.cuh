// lora_linear on the GPU: the products of both directions by rows.  Free of torch.
//
//   narrow   a wide matrix times the narrow one of the adapter: x @ lora_a.T in forward, grad_y @ lora_b in backward
//   finish   its sums over parts of the depth, and the work rows of the next product
//   extended [rows | work] @ [weight | adapter].T: y in forward, grad_x in backward
#pragma once
#include "dropout.cuh"
#include "rows.cuh"

namespace fastadapt {

// A sum over the depth is one of sums over kChunk of it.  Blocks that share a tile of rows take whole chunks, so that the bits
// of a row don't depend on how many rows there are.
constexpr int kChunk = 512;

struct Narrow {
  int64_t m;
  int k, r;         // depth and columns of the product
  Rows rows;        // (m, k)
  Weight weight;    // (r, k), or (k, r) if the kernel's is transposed
  Dropout dropout;  // of the rows; the scale is left to `finish`
  int64_t splits;   // 1: `planes` is (1, m, r); else blocks over the depth, and planes (chunks, m, r)
  int64_t chunks;
  float* planes;
};

template <class T>
struct NarrowTile {
  static constexpr int kRows = 64, kDepth = Shape<T>::kDepth, kStages = Shape<T>::kStages;
  static constexpr int kRowA = Shape<T>::padded(kDepth), kTileA = kRows * kRowA;
  static constexpr int kRowB = Shape<T>::padded(kN);  // if transposed
  static constexpr int kTileB = kN * kRowA > kDepth * kRowB ? kN * kRowA : kDepth * kRowB;
  static constexpr int kBytes = kStages * (kTileA + kTileB) * sizeof(T) + kRows * sizeof(int64_t);
};

// Where the rows of a block begin, -1 beyond the last one.
__device__ __forceinline__ void row_offsets(int64_t* offsets, int count, const Rows& rows, int64_t row0, int64_t m) {
  for (int i = threadIdx.x; i < count; i += kThreads) offsets[i] = row0 + i < m ? rows.offset(row0 + i) : -1;
  __syncthreads();
}

// One block: 64 rows by 64 columns of one split of the depth.  A warp has 16 rows.
template <class T, bool TRANSPOSED>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 ? 3 : 2)
    lora_linear_narrow_kernel(const __grid_constant__ Narrow p) {
  FA_DYNAMIC_SHARED(shared);
  using N = NarrowTile<T>;
  constexpr int kSteps = kChunk / N::kDepth, kRowB = TRANSPOSED ? N::kRowB : N::kRowA;
  const int64_t tiles = divide_up(p.r, kN), per_split = divide_up(p.chunks, p.splits);
  const int r0 = static_cast<int>(blockIdx.x % tiles) * kN;
  const int64_t chunk0 = blockIdx.x / tiles % p.splits * per_split, row0 = blockIdx.x / tiles / p.splits * N::kRows;
  const int64_t step0 = chunk0 * kSteps, end = least((chunk0 + per_split) * kSteps, divide_up(p.k, N::kDepth));
  int64_t* offsets = reinterpret_cast<int64_t*>(shared);
  T* stages = reinterpret_cast<T*>(offsets + N::kRows);
  row_offsets(offsets, N::kRows, p.rows, row0, p.m);

  const int columns = least(round_up(p.r - r0, 16), kN), live = columns / 8;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  auto first = [&](int64_t step) { return static_cast<int>(step0 + step) * N::kDepth; };
  auto depth = [&](int64_t step) { return least(round_up(p.k - first(step), 16), N::kDepth); };
  auto tile = [&](int stage) { return stages + stage * (N::kTileA + N::kTileB); };
  float acc[8][4] = {}, total[8][4] = {}, unused[4];
  auto store = [&](int64_t plane) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int64_t row = row0 + warp * 16 + lane / 4 + half * 8;
      if (row >= p.m) break;
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const int column = r0 + j * 8 + lane % 4 * 2;
        store_pair(p.planes + (plane * p.m + row) * p.r + column, total[j][half * 2], total[j][half * 2 + 1], p.r % 2 == 0,
            p.r - column);
      }
    }
  };
  pipeline<N::kStages>(
      end - step0,
      [&](int64_t step, int stage) {
        const int k0 = first(step);
        load_tile<N::kDepth>(tile(stage), N::kRows, depth(step), p.k - k0, p.rows.inner, [&](int i) {
          return offsets[i] < 0 ? nullptr : static_cast<const T*>(p.rows.data) + offsets[i] + k0 * p.rows.inner.stride;
        });
        load_weight<TRANSPOSED, kN, N::kDepth>(
            tile(stage) + N::kTileA, p.weight.of<T>(0), p.weight.row, r0, columns, p.r, k0, depth(step), p.k);
      },
      [&](int64_t step, int stage) {
        if (p.dropout.threshold)
          drop_tile<N::kDepth>(tile(stage), N::kRows, depth(step), p.rows.inner, p.dropout, row0, first(step));
      },
      [&](int64_t step, int stage) {
        multiply<8, false, TRANSPOSED, false>(
            acc, unused, tile(stage) + warp * 16 * N::kRowA, N::kRowA, tile(stage) + N::kTileA, kRowB, depth(step), live);
        const bool last = step0 + step + 1 == end;
        if (!last && (step + 1) % kSteps) return;
#pragma unroll
        for (int j = 0; j < 8; j++)
          for (int i = 0; i < 4; i++) total[j][i] += acc[j][i], acc[j][i] = 0.f;
        if (p.splits == 1 && !last) return;
        store(p.splits == 1 ? 0 : chunk0 + step / kSteps);
        for (auto& block : total)
          for (float& v : block) v = 0.f;
      });
}

// sum = factor * (the sum of the planes), rounded to T after a multiplication with scale * diagonal for the work rows.
struct Finish {
  int64_t m, r;
  const float* planes;
  int64_t count, plane, row, column;  // strides
  float factor, scale;
  Vector diagonal;
  float* sum;  // (m, r), may be the only plane; nullptr where not wanted
  void* work;  // (m, work_row); nullptr where not wanted
  int64_t work_row;
};

// A thread an element.
template <class T>
__global__ void __launch_bounds__(kThreads) lora_linear_finish_kernel(const __grid_constant__ Finish p) {
  const int64_t n = p.m * p.r;
  for (int64_t at = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; at < n;
      at += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t row = at / p.r, j = at % p.r;
    const float* from = p.planes + row * p.row + j * p.column;
    float sum = 0.f;
    for (int64_t i = 0; i < p.count; i++) sum += from[i * p.plane];
    sum *= p.factor;
    if (p.sum) p.sum[at] = sum;
    if (!p.work) continue;
    sum *= p.scale;
    if (p.diagonal.data) sum *= p.diagonal.at<T>(j);
    static_cast<T*>(p.work)[row * p.work_row + j] = from_float<T>(sum);
  }
}

struct Extended {
  int64_t m;
  int n, k, r;             // columns of the output, depth of each product
  Rows rows;               // (m, k)
  const void* work;        // (m, work_row), of which r count
  int64_t work_row;
  Weight weight, adapter;  // (n, k) and (n, r), or (k, n) and (r, n) if the kernel's are transposed
  Vector gain, bias;       // (n,)
  Dropout dropout;         // of the adapter's product
  void* out;               // (m, n)
};

template <class T, int BM, int BN>
struct ExtendedTile {
  static constexpr int kDepth = 32, kStages = Shape<T>::kStages;
  static constexpr int kRowA = Shape<T>::padded(kDepth), kTileA = BM * kRowA;
  static constexpr int kRowB = Shape<T>::padded(BN);  // if transposed
  static constexpr int kTileB = BN * kRowA > kDepth * kRowB ? BN * kRowA : kDepth * kRowB;
  static constexpr int kBytes = kStages * (kTileA + kTileB) * sizeof(T) + BM * sizeof(int64_t);
  // Two by two warps, each with MI * 16 rows and NI * 8 columns.
  static constexpr int kBlocksM = BM / 32, kBlocksN = BN / 16;
};
constexpr int kBand = 8;  // rows of tiles that run together, so that they find their columns in the cache

// out = gain * (rows @ weight.T + drop(work @ adapter.T)) + bias.  One block: BM rows by BN columns.  The adapter comes first,
// so that its accumulators can be dropped before the rest is added.  Tiles are padded with zeros, so that all loops are known.
template <class T, int BM, int BN, bool TRANSPOSED>
__global__ void __launch_bounds__(kThreads, 2) lora_linear_extended_kernel(const __grid_constant__ Extended p) {
  FA_DYNAMIC_SHARED(shared);
  using E = ExtendedTile<T, BM, BN>;
  constexpr int kRowB = TRANSPOSED ? E::kRowB : E::kRowA;
  const int64_t tiles_m = divide_up(p.m, BM), band = kBand * divide_up(p.n, BN), first = blockIdx.x / band * kBand;
  const int64_t height = least<int64_t>(tiles_m - first, kBand), row0 = (first + blockIdx.x % band % height) * BM;
  const int n0 = static_cast<int>(blockIdx.x % band / height) * BN;
  int64_t* offsets = reinterpret_cast<int64_t*>(shared);
  T* stages = reinterpret_cast<T*>(offsets + BM);
  row_offsets(offsets, BM, p.rows, row0, p.m);

  const int warp_m = threadIdx.x / 32 % 2 * (BM / 2), warp_n = threadIdx.x / 64 * (BN / 2), lane = threadIdx.x % 32;
  const int steps_r = static_cast<int>(divide_up(p.r, E::kDepth));
  auto tile = [&](int stage) { return stages + stage * (E::kTileA + E::kTileB); };
  auto limit = [&](int64_t step) { return step < steps_r ? p.r : p.k; };
  auto inside = [&](int64_t step) { return static_cast<int>(step < steps_r ? step : step - steps_r) * E::kDepth; };
  float acc[E::kBlocksM][E::kBlocksN][4] = {}, unused[4];
  pipeline<E::kStages>(
      steps_r + divide_up(p.k, E::kDepth),
      [&](int64_t step, int stage) {
        const bool adapter = step < steps_r;
        const int k0 = inside(step);
        const T* data = static_cast<const T*>(adapter ? p.work : p.rows.data);
        const Inner inner = adapter ? Inner{1, 1} : p.rows.inner;
        load_tile<E::kDepth>(tile(stage), BM, E::kDepth, limit(step) - k0, inner, [&](int i) {
          return offsets[i] < 0 ? nullptr : data + (adapter ? (row0 + i) * p.work_row : offsets[i]) + k0 * inner.stride;
        });
        const Weight& weight = adapter ? p.adapter : p.weight;
        load_weight<TRANSPOSED, BN, E::kDepth>(
            tile(stage) + E::kTileA, weight.template of<T>(0), weight.row, n0, BN, p.n, k0, E::kDepth, limit(step));
      },
      [](int64_t, int) {},
      [&](int64_t step, int stage) {
        const T* b = tile(stage) + E::kTileA + (TRANSPOSED ? warp_n : warp_n * kRowB);
        multiply_rows<false, TRANSPOSED, false>(
            acc, unused, tile(stage) + warp_m * E::kRowA, E::kRowA, b, kRowB, E::kDepth, E::kBlocksN);
        if (p.dropout.threshold && step == steps_r - 1) drop_accumulators(acc, p.dropout, row0 + warp_m, n0 + warp_n);
      });

  struct Column {
    float gain, bias;
  };
  auto column_of = [&](int column) {
    return Column{p.gain.data ? p.gain.at<T>(column) : 1.f, p.bias.data ? p.bias.at<T>(column) : 0.f};
  };
#pragma unroll
  for (int j = 0; j < E::kBlocksN; j++) {
    const int column = n0 + warp_n + j * 8 + lane % 4 * 2, left = p.n - column;
    if (left <= 0) break;
    const Column a = column_of(column), b = column_of(column + (left > 1));
#pragma unroll
    for (int i = 0; i < E::kBlocksM; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int64_t row = row0 + warp_m + i * 16 + lane / 4 + half * 8;
        if (row >= p.m) continue;
        const float* v = acc[i][j] + half * 2;
        store_pair(static_cast<T*>(p.out) + row * p.n + column, a.gain * v[0] + a.bias, b.gain * v[1] + b.bias, p.n % 2 == 0,
            left);
      }
  }
}

}  // namespace fastadapt
