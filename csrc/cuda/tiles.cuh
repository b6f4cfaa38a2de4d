// Tiles in shared memory: loading, changing, multiplying.  A block has 128 threads, four warps.
//
// 16-bit types go through the tensor cores.  float32 must stay float32: tf32 keeps 10 bits of mantissa and three tf32
// products still round differently from float32, so float32 uses plain FMA in the same layout of accumulators.
#pragma once
#include "hardware.cuh"

namespace fastadapt {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kN = 64;  // columns of an output tile

template <class T>
struct Shape {
  static constexpr int kVector = 16 / sizeof(T);          // elements of one 16-byte copy
  static constexpr int kDepth = 128 / sizeof(T);          // inner dimension of a tile
  static constexpr int kStages = sizeof(T) == 2 ? 3 : 2;  // float32 tiles are twice as large; 99 KiB must do
  // The leading dimension of a tile: eight rows then start in eight different banks.
  static constexpr __host__ __device__ int padded(int columns) { return columns + kVector; }
};

constexpr __host__ __device__ int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr __host__ __device__ int round_up(int a, int b) { return (a + b - 1) / b * b; }
template <class I>
constexpr __host__ __device__ I least(I a, I b) {
  return a < b ? a : b;
}

// Calls f(row, column) for the parts of a tile that belong to this thread: groups of V columns, the same in every call with
// the same arguments.
template <int COLUMNS, int V, class F>
__device__ __forceinline__ void own_vectors(int rows, int columns, F f) {
  constexpr int kPerRow = COLUMNS / V;
  const int column = threadIdx.x % kPerRow * V;  // kPerRow divides kThreads
  if (column < columns)
    for (int row = threadIdx.x / kPerRow; row < rows; row += kThreads / kPerRow) f(row, column);
}

// The same for single elements.  `down` lets neighbouring threads go down a column, as memory with an inner stride likes it.
template <int COLUMNS, class F>
__device__ __forceinline__ void own_elements(int rows, int columns, bool down, F f) {
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * COLUMNS; i += kThreads) {
    const int row = down ? i % rows : i / COLUMNS, column = down ? i / rows : i % COLUMNS;
    if (column < columns) f(row, column);
  }
}

// How the elements of a row lie in memory.
struct Inner {
  int64_t stride;  // between columns
  int vector;      // rows are 16-byte aligned and their columns adjacent
};

// Elements that lie side by side, of which `valid` exist.
template <class T>
struct Piece {
  const T* from;
  int valid;
};

// Starts to fill tile[rows][columns] from source(row, column), the piece of a row that begins at the column, on 16 bytes.  What
// doesn't exist becomes zero.
template <int COLUMNS, class T, class Source>
__device__ __forceinline__ void load_pieces(T* tile, int rows, int columns, Source source) {
  constexpr int kVector = Shape<T>::kVector, kRow = Shape<T>::padded(COLUMNS);
  own_vectors<COLUMNS, kVector>(rows, columns, [&](int row, int column) {
    const Piece<T> piece = source(row, column);
    T* to = tile + row * kRow + column;
    if (piece.valid > 0) cp_async16(to, piece.from, least<int>(piece.valid * sizeof(T), 16));
    else *reinterpret_cast<uint4*>(to) = uint4{0, 0, 0, 0};
  });
}

// Starts to fill tile[rows][columns] from source(row), the address of a row's first column, or nullptr for a row of zeros.
// Columns from `valid` on become zero.
template <int COLUMNS, class T, class Source>
__device__ __forceinline__ void load_tile(T* tile, int rows, int columns, int valid, Inner inner, Source source) {
  constexpr int kRow = Shape<T>::padded(COLUMNS);
  if (inner.vector) {
    load_pieces<COLUMNS>(tile, rows, columns, [&](int row, int column) {
      const T* from = source(row);
      return from ? Piece<T>{from + column, valid - column} : Piece<T>{nullptr, 0};
    });
  } else {
    own_elements<COLUMNS>(rows, columns, inner.stride != 1, [&](int row, int column) {
      const T* from = source(row);
      tile[row * kRow + column] = from && column < valid ? from[column * inner.stride] : from_float<T>(0.f);
    });
  }
}

// Replaces the valid elements that this thread loaded by f(value, row, column).
template <int COLUMNS, class T, class F>
__device__ __forceinline__ void change_tile(T* tile, int rows, int columns, int valid, Inner inner, F f) {
  constexpr int kVector = Shape<T>::kVector, kRow = Shape<T>::padded(COLUMNS);
  auto change = [&](int row, int column) {
    T& v = tile[row * kRow + column];
    if (column < valid) v = from_float<T>(f(to_float(v), row, column));
  };
  if (inner.vector)
    own_vectors<COLUMNS, kVector>(rows, columns, [&](int row, int column) {
      for (int i = 0; i < kVector; i++) change(row, column + i);
    });
  else own_elements<COLUMNS>(rows, columns, inner.stride != 1, change);
}

// Loads a weight tile for columns n0.. of the output and depth k0.. of the product, at most N by DEPTH.  The matrix is stored
// (n, k), or (k, n) if TRANSPOSED; `row` is its leading dimension.  Weights are always 16-byte aligned.
template <bool TRANSPOSED, int N, int DEPTH, class T>
__device__ __forceinline__ void load_weight(
    T* tile, const T* weight, int64_t row, int n0, int n_extent, int n, int k0, int k_extent, int k) {
  const Inner inner{1, 1};
  if constexpr (TRANSPOSED)
    load_tile<N>(
        tile, k_extent, n_extent, n - n0, inner, [&](int i) { return k0 + i < k ? weight + (k0 + i) * row + n0 : nullptr; });
  else
    load_tile<DEPTH>(
        tile, n_extent, k_extent, k - k0, inner, [&](int i) { return n0 + i < n ? weight + (n0 + i) * row + k0 : nullptr; });
}

// Four values along the depth of row or column i of a float32 operand.
template <bool TRANSPOSED>
__device__ __forceinline__ void load_four(float (&v)[4], const float* tile, int row, int i, int k) {
  if constexpr (TRANSPOSED) {
    for (int n = 0; n < 4; n++) v[n] = tile[(k + n) * row + i];
  } else {
    const float4 four = *reinterpret_cast<const float4*>(tile + i * row + k);
    v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
  }
}

__device__ __forceinline__ float dot_four(const float (&a)[4], const float (&b)[4]) {
  float sum = a[0] * b[0];
  for (int i = 1; i < 4; i++) sum += a[i] * b[i];
  return sum;
}

// acc += a @ b over `depth`, for MI * 16 rows and NI * 8 columns of one warp, of which the first `live` blocks of 8 columns are
// wanted.  a is stored (m, k), or (k, m) if TRANS_A; b is stored (n, k), or (k, n) if TRANS_B.  With SUM and `sums`, a further
// product with ones adds the sum of a over the depth to every column of `sum`.  Lane 4*g + t holds rows g and g + 8 of 16,
// columns 2*t and 2*t + 1 of each block.
template <bool TRANS_A, bool TRANS_B, bool SUM, class T, int MI, int NI>
__device__ __forceinline__ void multiply_rows(float (&acc)[MI][NI][4], float (&sum)[4], const T* a, int row_a, const T* b,
    int row_b, int depth, int live, bool sums = true) {
  static_assert(MI == 1 || !SUM);
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) {
    constexpr uint32_t kOnes = std::is_same_v<T, bf16> ? 0x3f803f80u : 0x3c003c00u;
    for (int k = 0; k < depth; k += 16) {
      uint32_t fa[MI][4];
#pragma unroll
      for (int i = 0; i < MI; i++)
        ldmatrix_x4<TRANS_A>(fa[i],
            TRANS_A ? a + (k + lane / 16 * 8 + lane % 8) * row_a + i * 16 + lane / 8 % 2 * 8
                    : a + (i * 16 + lane % 16) * row_a + k + lane / 16 * 8);
#pragma unroll
      for (int j = 0; j < NI; j += 2) {
        if (j >= live) break;
        uint32_t fb[4];
        ldmatrix_x4<TRANS_B>(fb, TRANS_B ? b + (k + lane % 16) * row_b + j * 8 + lane / 16 * 8
                                         : b + (j * 8 + lane / 16 * 8 + lane % 8) * row_b + k + lane / 8 % 2 * 8);
#pragma unroll
        for (int i = 0; i < MI; i++) {
          mma_m16n8k16<T>(acc[i][j], fa[i], fb[0], fb[1]);
          mma_m16n8k16<T>(acc[i][j + 1], fa[i], fb[2], fb[3]);
        }
      }
      if constexpr (SUM)
        if (sums) mma_m16n8k16<T>(sum, fa[0], kOnes, kOnes);
    }
  } else {
    // Sums of sums of four: one float32 sum over the whole depth would err more than PyTorch's.  The extra additions are free,
    // this loop waits for shared memory.
    const int g = lane / 4, t = lane % 4 * 2;
    float part[MI][NI][4] = {}, sums_upper[4] = {}, sums_lower[4] = {};
    for (int k = 0; k < depth; k += 4) {
      float upper[MI][4], lower[MI][4];
#pragma unroll
      for (int i = 0; i < MI; i++) {
        load_four<TRANS_A>(upper[i], a, row_a, i * 16 + g, k);
        load_four<TRANS_A>(lower[i], a, row_a, i * 16 + g + 8, k);
      }
#pragma unroll
      for (int j = 0; j < NI; j++) {
        if (j >= live) break;
        float left[4], right[4];
        load_four<TRANS_B>(left, b, row_b, j * 8 + t, k);
        load_four<TRANS_B>(right, b, row_b, j * 8 + t + 1, k);
#pragma unroll
        for (int i = 0; i < MI; i++) {
          part[i][j][0] += dot_four(upper[i], left);
          part[i][j][1] += dot_four(upper[i], right);
          part[i][j][2] += dot_four(lower[i], left);
          part[i][j][3] += dot_four(lower[i], right);
        }
      }
      if constexpr (SUM)
        for (int i = 0; i < 4; i++) {
          sums_upper[i] += upper[0][i];
          sums_lower[i] += lower[0][i];
        }
    }
#pragma unroll
    for (int i = 0; i < MI; i++)
#pragma unroll
      for (int j = 0; j < NI; j++)
        for (int e = 0; e < 4; e++) acc[i][j][e] += part[i][j][e];
    if constexpr (SUM) {
      sum[0] += (sums_upper[0] + sums_upper[1]) + (sums_upper[2] + sums_upper[3]);
      sum[2] += (sums_lower[0] + sums_lower[1]) + (sums_lower[2] + sums_lower[3]);
    }
  }
}

// The same for 16 rows.
template <int NI, bool TRANS_A, bool TRANS_B, bool SUM, class T>
__device__ __forceinline__ void multiply(
    float (&acc)[NI][4], float (&sum)[4], const T* a, int row_a, const T* b, int row_b, int depth, int live, bool sums = true) {
  multiply_rows<TRANS_A, TRANS_B, SUM>(
      reinterpret_cast<float (&)[1][NI][4]>(acc), sum, a, row_a, b, row_b, depth, live, sums);
}

// Two neighbours of one row, stored at once where `both` says that they exist and lie on an even element.
template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T first, second;
};

template <class T>
__device__ __forceinline__ void store_pair(T* to, float first, float second, bool together, int64_t left) {
  const Pair<T> pair{from_float<T>(first), from_float<T>(second)};
  if (together && left > 1) {
    *reinterpret_cast<Pair<T>*>(to) = pair;
  } else {
    if (left > 0) to[0] = pair.first;
    if (left > 1) to[1] = pair.second;
  }
}

// Steps 0 .. steps-1 over a ring of stages: load(step, stage) starts copies, own(step, stage) sees what this thread copied,
// use(step, stage) what all did.  Ends with every stage free again.
template <int STAGES, class Load, class Own, class Use>
__device__ __forceinline__ void pipeline(int64_t steps, Load load, Own own, Use use) {
  int stage = 0, next = 0;
  // The steps before 0 only fill the ring: one loop, because the code of load is long.
#pragma unroll 1
  for (int64_t step = 1 - STAGES; step < steps; step++) {
    if (step >= 0) {
      cp_async_wait<STAGES - 2>();
      own(step, stage);
      __syncthreads();
    }
    // The stage filled now was used in the step before; the barrier has just shown that all threads left it.
    if (step + STAGES - 1 < steps) load(step + STAGES - 1, next);
    cp_async_commit();
    next = next + 1 == STAGES ? 0 : next + 1;
    if (step >= 0) {
      use(step, stage);
      stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
  }
  cp_async_wait<0>();
  __syncthreads();
}

}  // namespace fastadapt
