// The host side of a bank: from ids to what kernels see of them.
#pragma once
#include "bank.cuh"
#include "plan.cuh"

namespace fastadapt {

// Ids as one for each row of `x`; false if they have too many dims.  Absent ones are no bank.
inline bool as_ids(Ids& ids, const Array& array, const Array& x, int g) {
  ids = Ids{};
  ids.g = g;
  if (!array.data) return true;
  int64_t stride[64];
  // One id a sequence: its tokens share it.
  for (int i = 0; i < x.dims - 1; i++) stride[i] = i < array.dims ? array.stride[i] : 0;
  if (!join_dims(ids.rows, x.dims - 1, x.size, stride)) return false;
  ids.rows.data = array.data;
  ids.bytes = integer_bytes(array.kind);
  ids.is_signed = array.kind != Kind::uint8;
  return true;
}

// Sorts the rows by adapter on the device; the host learns nothing and waits for nothing.
inline void sort_rows(Groups& groups, const Ids& ids, int tile_rows, const Device& device) {
  Sort s{ids, groups.g, tile_rows, groups.m, 0, 0, nullptr, nullptr, nullptr, nullptr};
  s.chunk = divide_up(s.m, 1024) < 1024 ? 1024 : divide_up(s.m, 1024);
  s.chunks = divide_up(s.m, s.chunk);
  auto numbers = [&](int64_t n) { return static_cast<int64_t*>(device.allocate(n * sizeof(int64_t))); };
  s.counts = numbers(s.chunks * (s.g + 2));
  s.order = numbers(s.m);
  s.begin = numbers(s.g + 3);
  s.tile = numbers(s.g + 3);
  const dim3 grid(static_cast<unsigned>(s.chunks));
  if (s.m) launch(sort_rows_kernel<false>, grid, 32, 0, device.stream, s);
  launch(sort_offsets_kernel, dim3(1), kThreads, 0, device.stream, s);
  if (s.m) launch(sort_rows_kernel<true>, grid, 32, 0, device.stream, s);
  groups.order = s.order, groups.begin = s.begin, groups.tile = s.tile;
}

}  // namespace fastadapt
