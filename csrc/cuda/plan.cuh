// The host side that ops share: from arrays to what kernels see.  Free of torch, so that the CPU emulation runs the very same
// plans.
#pragma once
#include <functional>
#include <utility>

#include "rows.cuh"

namespace fastadapt {

enum class Kind { float32, float16, bfloat16, int64, int32, int16, int8, uint8 };

// A tensor as its metadata; sizes and strides are borrowed, data is nullptr for an absent argument.
struct Array {
  void* data = nullptr;
  Kind kind = Kind::float32;
  int dims = 0;
  const int64_t *size = nullptr, *stride = nullptr;
};

// A matrix, or a bank of them, that can be looked at the other way round.
struct Matrix {
  void* data;
  Kind kind;
  int dims;
  int64_t size[3], stride[3];

  explicit Matrix(const Array& a) : data(a.data), kind(a.kind), dims(a.dims) {
    for (int i = 0; i < dims; i++) size[i] = a.size[i], stride[i] = a.stride[i];
  }
  Matrix transposed() const {
    Matrix other = *this;
    std::swap(other.size[dims - 2], other.size[dims - 1]);
    std::swap(other.stride[dims - 2], other.stride[dims - 1]);
    return other;
  }
  Array array() const { return Array{data, kind, dims, size, stride}; }
};

struct Device {
  int multiprocessors;
  int shared_limit;  // most dynamic shared memory that a block can ask for
  cudaStream_t stream;
  std::function<void*(int64_t)> allocate;  // any size, 16-byte aligned, lives until the plan ends
};

template <class T>
constexpr Kind kind_of() {
  return std::is_same_v<T, bf16> ? Kind::bfloat16 : std::is_same_v<T, f16> ? Kind::float16 : Kind::float32;
}

inline int integer_bytes(Kind kind) {
  return kind == Kind::int64 ? 8 : kind == Kind::int32 ? 4 : kind == Kind::int16 ? 2 : 1;
}

// Leading sizes `size` with strides `stride`, joined where they lie behind one another.  False if more than kMaxDims remain.
inline bool join_dims(Rows& rows, int dims, const int64_t* size, const int64_t* stride) {
  rows.dims = 0;
  for (int i = 0; i < dims; i++) {
    if (size[i] == 1) continue;
    if (rows.dims && rows.stride[rows.dims - 1] == size[i] * stride[i]) {
      rows.size[rows.dims - 1] *= size[i];
      rows.stride[rows.dims - 1] = stride[i];
      continue;
    }
    if (rows.dims == kMaxDims) return false;
    rows.size[rows.dims] = size[i];
    rows.stride[rows.dims++] = stride[i];
  }
  if (rows.dims == 0) rows.size[0] = 1, rows.stride[0] = 0, rows.dims = 1;
  return true;
}

// Whether rows of `array` can be copied 16 bytes at a time.
inline bool aligned(const Array& array, int element) {
  bool yes = reinterpret_cast<uintptr_t>(array.data) % 16 == 0 &&
             (array.stride[array.dims - 1] == 1 || array.size[array.dims - 1] == 1);
  for (int i = 0; i < array.dims - 1; i++) yes &= array.size[i] == 1 || array.stride[i] * element % 16 == 0;
  return yes;
}

template <class T>
bool as_rows(Rows& rows, const Array& array) {
  rows = Rows{};
  if (!array.data) return true;
  rows.data = array.data;
  rows.inner = Inner{array.stride[array.dims - 1], aligned(array, sizeof(T))};
  return join_dims(rows, array.dims - 1, array.size, array.stride);
}

inline Vector as_vector(const Array& array) {
  if (!array.data) return Vector{};
  return Vector{array.data, array.dims ? array.stride[array.dims - 1] : 0, array.dims > 1 ? array.stride[0] : 0,
      array.kind == Kind::float32};
}

struct Pack {
  const void* from;
  void* to;
  int is_float;
  int64_t groups, rows, columns, from_group, from_row, from_column, to_row;
};

template <class T>
__global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ Pack p) {
  const int64_t n = p.groups * p.rows * p.columns;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < n;
      i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t line = i / p.columns, column = i % p.columns;
    const int64_t from = line / p.rows * p.from_group + line % p.rows * p.from_row + column * p.from_column;
    static_cast<T*>(p.to)[line * p.to_row + column] =
        p.is_float ? from_float<T>(static_cast<const float*>(p.from)[from]) : static_cast<const T*>(p.from)[from];
  }
}

// The weight itself where the kernels can read it, else a packed copy in T (small beside the activations).
template <class T>
Weight as_weight(const Array& array, const Device& device) {
  const int dims = array.dims;
  const int64_t rows = array.size[dims - 2], columns = array.size[dims - 1], groups = dims == 3 ? array.size[0] : 1;
  const int64_t row = array.stride[dims - 2], group = dims == 3 ? array.stride[0] : 0;
  if (array.kind == kind_of<T>() && aligned(array, sizeof(T))) return Weight{array.data, row, group};
  const int64_t to_row = divide_up(columns, Shape<T>::kVector) * Shape<T>::kVector, n = groups * rows * columns;
  const Pack pack{array.data, device.allocate(groups * rows * to_row * sizeof(T)), array.kind == Kind::float32, groups, rows,
      columns, group, row, array.stride[dims - 1], to_row};
  if (n)
    launch(pack_kernel<T>, dim3(static_cast<unsigned>(least<int64_t>(divide_up(n, kThreads), 4096))), kThreads, 0,
        device.stream, pack);
  return Weight{pack.to, to_row, rows * to_row};
}

// Enough blocks for three on each multiprocessor, but at least `rows` rows a split.
inline int64_t split_count(int64_t blocks, int64_t m, int64_t rows, const Device& device) {
  const int64_t most = divide_up(m, rows), splits = divide_up(3 * device.multiprocessors, blocks > 0 ? blocks : 1);
  return most < 1 ? 1 : least(splits, most);
}

template <class K, class... A>
void launch_over(int64_t blocks, K kernel, size_t shared, const Device& device, const A&... arguments) {
  if (blocks > 0) launch(kernel, dim3(static_cast<unsigned>(blocks)), kThreads, shared, device.stream, arguments...);
}

}  // namespace fastadapt
