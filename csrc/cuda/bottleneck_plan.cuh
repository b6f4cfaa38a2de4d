// The host side of bottleneck: from arrays to kernel parameters, and which kernels run.  Free of torch, so that the CPU
// emulation runs the very same plan.
#pragma once
#include "bank_plan.cuh"
#include "bottleneck.cuh"

namespace fastadapt {

// The largest rank: its hidden tile of 16 rows fits beside the ring into the 99 KiB of the smallest devices.
constexpr int kMaxRank = 1024;
static_assert(Block<float, 16>::bytes(kMaxRank) <= 99 * 1024 && Block<bf16, 16>::bytes(kMaxRank) <= 99 * 1024);

struct Arguments {
  Array x, other, down_weight, up_weight, down_bias, up_bias, scale, norm_weight, norm_bias, skip, hidden_skip, ids;
  float scale_value, norm_eps;
  int activation, add_x;
};

// Rows a block: 64, or 16 where 64 would leave multiprocessors idle, push x out of the cache before its second reading, or
// need too much shared memory.
template <class T>
int rows_per_block(int64_t m, int d, int r, const Device& device) {
  const bool wide = divide_up(m, 64) >= device.multiprocessors && d <= 2048 && Block<T, 64>::bytes(r) <= device.shared_limit;
  return wide ? 64 : 16;
}

// Fills the parameters that both directions share; an error message, or nullptr.
template <class T>
const char* describe(Bottleneck& p, int& tile_rows, const Arguments& a, const Device& device) {
  p = Bottleneck{};
  p.m = 1;
  for (int i = 0; i < a.x.dims - 1; i++) p.m *= a.x.size[i];
  const int64_t d = a.x.size[a.x.dims - 1], r = a.down_weight.size[a.down_weight.dims - 2];
  p.d = static_cast<int>(d), p.r = static_cast<int>(r);
  if (!as_rows<T>(p.x, a.x) || !as_rows<T>(p.other, a.other)) return "more than 8 leading dims that can't be joined";
  p.down_bias = as_vector(a.down_bias), p.up_bias = as_vector(a.up_bias), p.scale = as_vector(a.scale);
  p.norm_weight = as_vector(a.norm_weight), p.norm_bias = as_vector(a.norm_bias);
  p.skip = as_vector(a.skip), p.hidden_skip = as_vector(a.hidden_skip);
  p.scale_value = a.scale_value, p.norm_eps = a.norm_eps, p.activation = a.activation, p.add_x = a.add_x;
  p.groups.g = a.ids.data ? static_cast<int>(a.down_weight.size[0]) : 1;
  p.groups.m = p.m;
  tile_rows = rows_per_block<T>(p.m, p.d, p.r, device);
  Ids ids;
  if (!as_ids(ids, a.ids, a.x, p.groups.g)) return "adapter_ids has more than 8 dims that can't be joined";
  if (a.ids.data) sort_rows(p.groups, ids, tile_rows, device);
  p.down = as_weight<T>(a.down_weight, device);
  p.up = as_weight<T>(a.up_weight, device);
  return nullptr;
}

// Without a bank the number of tiles is known; in a bank each adapter, and each kind of row without one, can add one.
inline int64_t tile_count(const Bottleneck& p, int tile_rows) {
  return divide_up(p.m, tile_rows) + (p.groups.order ? p.groups.g + 2 : 0);
}

template <class T>
const char* bottleneck_forward(const Arguments& a, void* y, const Device& device) {
  Bottleneck p;
  int rows;
  if (const char* error = describe<T>(p, rows, a, device)) return error;
  p.out = y;
  const dim3 grid(static_cast<unsigned>(tile_count(p, rows)));
  if (grid.x == 0) return nullptr;
  if (rows == 64) launch(bottleneck_fwd_kernel<T, 64>, grid, kThreads, Block<T, 64>::bytes(p.r), device.stream, p);
  else launch(bottleneck_fwd_kernel<T, 16>, grid, kThreads, Block<T, 16>::bytes(p.r), device.stream, p);
  return nullptr;
}

}  // namespace fastadapt
