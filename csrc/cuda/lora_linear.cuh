// lora_linear on the GPU: the products of both directions by rows.  Free of torch.
//
//   narrow   a wide matrix times the narrow one of the adapter: x @ lora_a.T in forward, grad_y @ lora_b in backward
//   finish   its sums over parts of the depth, and the work rows of the next product
//   extended [rows | work] @ [weight | adapter].T: y in forward, grad_x in backward
//
// An adapter outside of a bank is a bank of one.
#pragma once
#include "dropout.cuh"
#include "lora_linear_bank.cuh"

namespace fastadapt {

// A sum over the depth is one of sums over kChunk of it.  Blocks that share a tile of rows take whole chunks, so that the bits
// of a row don't depend on how many rows there are.
constexpr int kChunk = 512;

struct Narrow {
  Bank bank;
  int64_t m;
  int k, tiles;     // depth of the product; blocks over the ranks of the bank, or those of an adapter if it is sorted
  Rows rows;        // (m, k)
  Weight weight;    // (g, r, k), or (g, k, r) if the kernel's is transposed
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
  struct Table {
    const T* line[kN];  // where the weight's lines of each rank begin, unless it is transposed
    RowTable<kRows> rows;
  };
  static constexpr int kBytes = kStages * (kTileA + kTileB) * sizeof(T) + sizeof(Table);
  static_assert(sizeof(Table) % 16 == 0);
};

// One block: 64 rows by 64 ranks of one split of the depth.  A warp has 16 rows.  Each row stores the ranks of its own adapter;
// where they are sorted, a block has rows of one adapter.
template <class T, bool TRANSPOSED>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 ? 3 : 2)
    lora_linear_narrow_kernel(const __grid_constant__ Narrow p) {
  FA_DYNAMIC_SHARED(shared);
  using N = NarrowTile<T>;
  constexpr int kSteps = kChunk / N::kDepth, kRowB = TRANSPOSED ? N::kRowB : N::kRowA;
  const Bank& bank = p.bank;
  const Tile rows = find_tile(bank.groups, blockIdx.x / p.tiles / p.splits, N::kRows);
  if (rows.begin >= rows.end || rows.adapter >= bank.groups.g) return;
  const int end_r = bank.groups.order ? (rows.adapter + 1) * bank.width : bank.ranks();
  const int r0 = rows.adapter * bank.width + static_cast<int>(blockIdx.x % p.tiles) * kN;
  const int64_t per_split = divide_up(p.chunks, p.splits), chunk0 = blockIdx.x / p.tiles % p.splits * per_split;
  const int64_t step0 = chunk0 * kSteps, end = least((chunk0 + per_split) * kSteps, divide_up(p.k, N::kDepth));
  typename N::Table& table = *reinterpret_cast<typename N::Table*>(shared);
  T* stages = reinterpret_cast<T*>(shared + sizeof(typename N::Table));
  if constexpr (!TRANSPOSED)
    for (int i = threadIdx.x; i < kN; i += kThreads) table.line[i] = bank.line<T>(p.weight, r0 + i);
  table.rows.fill(bank, p.rows, rows.begin, rows.end);
  if (table.rows.next(bank, r0) >= r0 + kN) return;  // no row has one of these ranks

  const int columns = least(round_up(end_r - r0, 16), kN), live = columns / 8;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  auto first = [&](int64_t step) { return static_cast<int>(step0 + step) * N::kDepth; };
  auto depth = [&](int64_t step) { return least(round_up(p.k - first(step), 16), N::kDepth); };
  auto tile = [&](int stage) { return stages + stage * (N::kTileA + N::kTileB); };
  float acc[8][4] = {}, total[8][4] = {}, unused[4];
  auto store = [&](int64_t plane) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int i = warp * 16 + lane / 4 + half * 8;
      if (table.rows.offset[i] < 0) break;
      float* to = p.planes + (plane * p.m + table.rows.row[i]) * bank.r;
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const int rank = r0 + j * 8 + lane % 4 * 2 - table.rows.slot[i];
        if (rank >= 0 && rank < bank.r)
          store_pair(to + rank, total[j][half * 2], total[j][half * 2 + 1], bank.r % 2 == 0, bank.r - rank);
      }
    }
  };
  pipeline<N::kStages>(
      end - step0,
      [&](int64_t step, int stage) {
        const int k0 = first(step);
        load_tile<N::kDepth>(tile(stage), N::kRows, depth(step), p.k - k0, p.rows.inner, [&](int i) {
          const int64_t offset = table.rows.offset[i];
          return offset < 0 ? nullptr : static_cast<const T*>(p.rows.data) + offset + k0 * p.rows.inner.stride;
        });
        T* b = tile(stage) + N::kTileA;
        if constexpr (TRANSPOSED)
          load_pieces<kN>(b, depth(step), columns, [&](int i, int column) {
            return k0 + i < p.k ? bank.piece<T>(p.weight, k0 + i, r0 + column) : Piece<T>{nullptr, 0};
          });
        else
          load_tile<N::kDepth>(b, columns, depth(step), p.k - k0, Inner{1, 1},
              [&](int i) { return table.line[i] ? table.line[i] + k0 : nullptr; });
      },
      [&](int64_t step, int stage) {
        if (p.dropout.threshold)
          drop_tile<N::kDepth>(tile(stage), N::kRows, depth(step), p.rows.inner, p.dropout,
              [&](int i) { return table.rows.row[i]; }, first(step));
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

// sum = factor * (the sum of the planes), rounded to T after a multiplication with scale * diagonal for the work rows.  A row
// without an adapter gets 0, one whose id lies outside the bank NaN; no plane holds either.
struct Finish {
  Ids ids;
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
    const int adapter = p.ids.adapter(row);
    const bool has_one = adapter < p.ids.g;
    const float* from = p.planes + row * p.row + j * p.column;
    float sum = adapter > p.ids.g ? nanf("") : 0.f;
    for (int64_t i = 0; has_one && i < p.count; i++) sum += from[i * p.plane];
    sum *= p.factor;
    if (p.sum) p.sum[at] = sum;
    if (!p.work) continue;
    sum *= p.scale;
    if (has_one && p.diagonal.data) sum *= p.diagonal.at<T>(adapter, j);
    static_cast<T*>(p.work)[row * p.work_row + j] = from_float<T>(sum);
  }
}

struct Extended {
  Bank bank;
  int64_t m;
  int n, k;                // columns of the output, depth of the frozen product
  Rows rows;               // (m, k)
  const void* work;        // (m, width), of which the r of the row's adapter count
  Weight weight, adapter;  // (n, k) and (g, n, r), or (k, n) and (g, r, n) if the kernel's are transposed
  Vector gain, bias;       // (n,)
  Dropout dropout;         // of the adapter's product
  void *z, *out;           // (m, n): what gain multiplies, nullptr where not kept; and the output
};

template <class T, int BM, int BN>
struct ExtendedTile {
  static constexpr int kDepth = kRankStep, kStages = Shape<T>::kStages;
  static constexpr int kRowA = Shape<T>::padded(kDepth), kTileA = BM * kRowA;
  static constexpr int kRowB = Shape<T>::padded(BN);  // if transposed
  static constexpr int kTileB = BN * kRowA > kDepth * kRowB ? BN * kRowA : kDepth * kRowB;
  static constexpr int kBytes = kStages * (kTileA + kTileB) * sizeof(T) + sizeof(RowTable<BM>);
  static_assert(sizeof(RowTable<BM>) % 16 == 0);
  // Two by two warps, each with MI * 16 rows and NI * 8 columns.
  static constexpr int kBlocksM = BM / 32, kBlocksN = BN / 16;
};
constexpr int kBand = 8;  // rows of tiles that run together, so that they find their columns in the cache

// out = gain * (rows @ weight.T + drop(work @ adapter.T)) + bias.  One block: BM rows by BN columns.  The adapter comes first,
// so that its accumulators can be dropped before the rest is added: of a bank the steps of ranks that a row of the tile has.
// They begin where they always do, so that no other row changes the bits of a row.  Tiles are padded with zeros, so that all
// loops are known.
template <class T, int BM, int BN, bool TRANSPOSED>
__global__ void __launch_bounds__(kThreads, 2) lora_linear_extended_kernel(const __grid_constant__ Extended p) {
  FA_DYNAMIC_SHARED(shared);
  using E = ExtendedTile<T, BM, BN>;
  constexpr int kRowB = TRANSPOSED ? E::kRowB : E::kRowA;
  const int64_t tiles_m = divide_up(p.m, BM), band = kBand * divide_up(p.n, BN), first = blockIdx.x / band * kBand;
  const int64_t height = least<int64_t>(tiles_m - first, kBand), row0 = (first + blockIdx.x % band % height) * BM;
  const int n0 = static_cast<int>(blockIdx.x % band / height) * BN;
  const Bank& bank = p.bank;
  RowTable<BM>& table = *reinterpret_cast<RowTable<BM>*>(shared);
  T* stages = reinterpret_cast<T*>(shared + sizeof(RowTable<BM>));
  table.fill(bank, p.rows, row0, p.m);
  int next_r = table.next(bank, 0), steps_r = 0;
  for (int rank = next_r; rank < kNoRank; rank = table.next(bank, rank + kRankStep)) steps_r++;

  const int warp_m = threadIdx.x / 32 % 2 * (BM / 2), warp_n = threadIdx.x / 64 * (BN / 2), lane = threadIdx.x % 32;
  auto tile = [&](int stage) { return stages + stage * (E::kTileA + E::kTileB); };
  float acc[E::kBlocksM][E::kBlocksN][4] = {}, unused[4];
  pipeline<E::kStages>(
      steps_r + divide_up(p.k, E::kDepth),
      [&](int64_t step, int stage) {
        T *a = tile(stage), *b = a + E::kTileA;
        if (step < steps_r) {
          const int r0 = next_r;
          next_r = table.next(bank, r0 + kRankStep);
          load_pieces<E::kDepth>(a, BM, E::kDepth, [&](int i, int column) {
            const int rank = r0 + column - table.slot[i];
            if (rank < 0 || rank >= bank.width) return Piece<T>{nullptr, 0};
            return Piece<T>{static_cast<const T*>(p.work) + table.row[i] * bank.width + rank, bank.r - rank};
          });
          if constexpr (TRANSPOSED)
            load_tile<BN>(b, E::kDepth, BN, p.n - n0, Inner{1, 1}, [&](int i) {
              const T* line = bank.line<T>(p.adapter, r0 + i);
              return line ? line + n0 : nullptr;
            });
          else
            load_pieces<E::kDepth>(b, BN, E::kDepth, [&](int i, int column) {
              return n0 + i < p.n ? bank.piece<T>(p.adapter, n0 + i, r0 + column) : Piece<T>{nullptr, 0};
            });
        } else {
          const int k0 = static_cast<int>(step - steps_r) * E::kDepth;
          load_tile<E::kDepth>(a, BM, E::kDepth, p.k - k0, p.rows.inner, [&](int i) {
            const int64_t offset = table.offset[i];
            return offset < 0 ? nullptr : static_cast<const T*>(p.rows.data) + offset + k0 * p.rows.inner.stride;
          });
          load_weight<TRANSPOSED, BN, E::kDepth>(
              b, p.weight.of<T>(0), p.weight.row, n0, BN, p.n, k0, E::kDepth, p.k);
        }
      },
      [](int64_t, int) {},
      [&](int64_t step, int stage) {
        const T* b = tile(stage) + E::kTileA + (TRANSPOSED ? warp_n : warp_n * kRowB);
        multiply_rows<false, TRANSPOSED, false>(
            acc, unused, tile(stage) + warp_m * E::kRowA, E::kRowA, b, kRowB, E::kDepth, E::kBlocksN);
        if (p.dropout.threshold && step == steps_r - 1) drop_accumulators(acc, p.dropout, table.row + warp_m, n0 + warp_n);
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
        const int at = warp_m + i * 16 + lane / 4 + half * 8;
        if (table.offset[at] < 0) continue;
        const bool outside = bank.outside(table.slot[at]);
        const float* v = acc[i][j] + half * 2;
        const float first = outside ? nanf("") : a.gain * v[0] + a.bias, second = outside ? nanf("") : b.gain * v[1] + b.bias;
        const int64_t place = table.row[at] * p.n + column;
        if (p.z) store_pair(static_cast<T*>(p.z) + place, v[0], v[1], p.n % 2 == 0, left);
        store_pair(static_cast<T*>(p.out) + place, first, second, p.n % 2 == 0, left);
      }
  }
}

}  // namespace fastadapt
