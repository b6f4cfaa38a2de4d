// The rows of a bank: the adapter of each, and all of them sorted by adapter.
#pragma once
#include "rows.cuh"

namespace fastadapt {

// The adapter of every row.  Adapter g stands for "no adapter" (-1) and g + 1 for an id outside the bank.
struct Ids {
  Rows rows;  // data is nullptr without a bank: then every row has adapter 0
  int bytes, is_signed, g;

  __device__ __forceinline__ int adapter(int64_t row) const {
    if (!rows.data) return 0;
    const int64_t id = integer_at(rows.data, rows.offset(row), bytes, is_signed);
    return id == -1 ? g : id >= 0 && id < g ? static_cast<int>(id) : g + 1;
  }
};

// Rows in the order of their adapters.
// Without a bank `order` is nullptr: one adapter, rows as they come.
struct Groups {
  int g;
  int64_t m;
  const int64_t* order;  // position -> row
  const int64_t* begin;  // adapter -> first position, g + 3 entries
  const int64_t* tile;   // adapter -> first tile, g + 3 entries

  __device__ __forceinline__ int64_t row(int64_t position) const { return order ? order[position] : position; }
  __device__ __forceinline__ int64_t first(int adapter) const { return order ? begin[adapter] : adapter ? m : 0; }
};

struct Tile {
  int adapter;
  int64_t begin, end;  // positions
};

// The tile of this block, of at most `rows` rows of one adapter; empty beyond the last one.
__device__ __forceinline__ Tile find_tile(const Groups& groups, int64_t index, int rows) {
  if (!groups.order) return Tile{0, index * rows, least<int64_t>((index + 1) * rows, groups.m)};
  int low = 0, high = groups.g + 2;  // tile[low] <= index < tile[high], if there is such a tile at all
  if (index >= groups.tile[high]) return Tile{0, 0, 0};
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (groups.tile[middle] <= index ? low : high) = middle;
  }
  const int64_t begin = groups.begin[low] + (index - groups.tile[low]) * rows;
  return Tile{low, begin, least<int64_t>(begin + rows, groups.begin[low + 1])};
}

// A stable counting sort of the rows by adapter.  Stable, so that sums over an adapter's rows always run in one order.
struct Sort {
  Ids ids;
  int g, tile_rows;
  int64_t m, chunk, chunks;  // a warp counts and places `chunk` rows
  int64_t* counts;           // (chunks, g + 2)
  int64_t *order, *begin, *tile;
};

// One warp, one chunk of rows.  PLACE: write each row to its position; else only count.
template <bool PLACE>
__global__ void __launch_bounds__(32) sort_rows_kernel(const __grid_constant__ Sort s) {
  const int lane = threadIdx.x;
  int64_t* count = s.counts + blockIdx.x * static_cast<int64_t>(s.g + 2);
  if constexpr (!PLACE) {
    for (int i = lane; i < s.g + 2; i += 32) count[i] = 0;
    __syncwarp();
  }
  const int64_t begin = blockIdx.x * s.chunk, end = least(begin + s.chunk, s.m);
  for (int64_t row = begin + lane; row - lane < end; row += 32) {
    const int adapter = row < end ? s.ids.adapter(row) : -1;
    const unsigned peers = __match_any_sync(0xffffffffu, adapter);
    const int rank = __popc(peers & ((1u << lane) - 1));
    const int64_t before = row < end ? count[adapter] : 0;
    __syncwarp();
    if (row < end) {
      if constexpr (PLACE) s.order[before + rank] = row;
      if (rank == 0) count[adapter] = before + __popc(peers);
    }
    __syncwarp();
  }
}

// One block: where each adapter's rows and tiles begin, and where each chunk places its rows.
static __global__ void __launch_bounds__(kThreads) sort_offsets_kernel(const __grid_constant__ Sort s) {
  const int n = s.g + 2;
  for (int b = threadIdx.x; b < n; b += kThreads) {
    int64_t total = 0;
    for (int64_t c = 0; c < s.chunks; c++) total += s.counts[c * n + b];
    s.begin[b + 1] = total;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    int64_t rows = 0, tiles = 0;
    for (int b = 0; b <= n; b++) {
      const int64_t count = b < n ? s.begin[b + 1] : 0;
      s.begin[b] = rows;
      s.tile[b] = tiles;
      rows += count;
      tiles += divide_up(count, s.tile_rows);
    }
  }
  __syncthreads();
  for (int b = threadIdx.x; b < n; b += kThreads) {
    int64_t position = s.begin[b];
    for (int64_t c = 0; c < s.chunks; c++) {
      const int64_t count = s.counts[c * n + b];
      s.counts[c * n + b] = position;
      position += count;
    }
  }
}

}  // namespace fastadapt
