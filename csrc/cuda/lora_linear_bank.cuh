// A bank of LoRA's adapters as one adapter: their ranks stand side by side, and a row takes only those of its own.
#pragma once
#include "bank.cuh"

namespace fastadapt {

// Ranks are multiplied in steps that begin at multiples of this.
constexpr int kRankStep = 32, kNoRank = 1 << 30;

struct Bank {
  Ids ids;
  Groups groups;  // order is nullptr where rows are taken as they come
  int r, width;   // ranks of an adapter; adapter a begins at rank a * width, so that no 16 bytes hold ranks of two

  __host__ __device__ __forceinline__ int ranks() const { return groups.g * width; }
  // The first rank of a row: -width for a row without an adapter, less for an id outside the bank.
  __device__ __forceinline__ int slot(int64_t row) const {
    const int adapter = ids.adapter(row);
    return adapter < groups.g ? adapter * width : groups.g - width - adapter;
  }
  __device__ __forceinline__ bool outside(int slot) const { return slot < -width; }
  __device__ __forceinline__ int adapter_of(int rank) const {
    return static_cast<int>(static_cast<unsigned>(rank) / static_cast<unsigned>(width));
  }
  // What begins at `rank` in a line of (g, lines, r).
  template <class T>
  __device__ __forceinline__ Piece<T> piece(const Weight& weight, int64_t line, int rank) const {
    const int adapter = adapter_of(rank), j = rank - adapter * width;
    return Piece<T>{weight.of<T>(adapter) + line * weight.row + j, adapter < groups.g ? r - j : 0};
  }
  // The line of `rank` in (g, r, columns), nullptr where there is none.
  template <class T>
  __device__ __forceinline__ const T* line(const Weight& weight, int rank) const {
    const int adapter = adapter_of(rank), j = rank - adapter * width;
    return adapter < groups.g && j < r ? weight.of<T>(adapter) + j * weight.row : nullptr;
  }
};

// The rows of a tile, in shared memory.
template <int ROWS>
struct RowTable {
  int64_t row[ROWS], offset[ROWS];  // number of a row, and where it begins; 0 and -1 beyond the last one
  int slot[ROWS];

  __device__ __forceinline__ void fill(const Bank& bank, const Rows& rows, int64_t begin, int64_t end) {
    for (int i = threadIdx.x; i < ROWS; i += kThreads) {
      const bool valid = begin + i < end;
      const int64_t number = valid ? bank.groups.row(begin + i) : 0;
      row[i] = number;
      offset[i] = valid ? rows.offset(number) : -1;
      slot[i] = valid ? bank.slot(number) : -bank.width;
    }
    __syncthreads();
  }
  // Where the step begins of the first rank, from `from` on, that a row of the tile has; kNoRank if there is none.  All threads
  // of a warp ask together.
  __device__ __forceinline__ int next(const Bank& bank, int from) const {
    int found = kNoRank;
    for (int i = threadIdx.x % 32; i < ROWS; i += 32)
      if (slot[i] >= 0 && slot[i] + bank.width > from) found = least(found, slot[i] > from ? slot[i] : from);
    for (int o = 16; o; o /= 2) found = least(found, __shfl_xor_sync(0xffffffffu, found, o));
    return found / kRankStep * kRankStep;
  }
};

}  // namespace fastadapt
