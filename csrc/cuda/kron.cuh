// What compacter and kron_linear share on the GPU: rows that pass through a few numbers in "rank space".
//
// A row is cut into chunks ("lines").  `project` takes each line to the columns of a narrow factor, `mix` adds chunks with the
// weights of a rule, `expand` takes each line through the other factor back to full width, and `add_outer` sums the gradient of
// a factor.  All numbers between are float32 and stay in shared memory; factors are float32 copies (kron_pack.cuh), read
// through the L1 cache, which all blocks of a multiprocessor share.
#pragma once
#include "bank.cuh"

namespace fastadapt {

constexpr int kLines = 8;     // a warp works on eight lines at once, so that what it reads of a factor serves eight times
constexpr int kSpan = 128;  // features that a warp takes in one step, four a lane

// Four neighbours, in memory as one vector.
template <class T>
struct alignas(4 * sizeof(T)) Quad {
  T at[4];
};

// Four elements, of which `left` exist; the others are zero.
template <class T>
__device__ __forceinline__ void load_quad(float (&v)[4], const T* from, Inner inner, int left) {
  if (inner.vector) {
    const Quad<T> quad = *reinterpret_cast<const Quad<T>*>(from);
#pragma unroll
    for (int e = 0; e < 4; e++) v[e] = to_float(quad.at[e]);
  } else {
#pragma unroll
    for (int e = 0; e < 4; e++) v[e] = e < left ? to_float(from[e * inner.stride]) : 0.f;
  }
}

template <class T>
__device__ __forceinline__ void store_quad(T* to, const float (&v)[4], bool together, int left) {
  if (together) {
    Quad<T> quad;
#pragma unroll
    for (int e = 0; e < 4; e++) quad.at[e] = from_float<T>(v[e]);
    *reinterpret_cast<Quad<T>*>(to) = quad;
  } else {
#pragma unroll
    for (int e = 0; e < 4; e++)
      if (e < left) to[e] = from_float<T>(v[e]);
  }
}

// The line of a factor's copy that holds a feature: lanes that own four features each then read neighbouring lines.
struct Placed {
  int block, lanes;  // the first feature of its 128, and how many lanes have some of those

  __host__ __device__ __forceinline__ Placed(int at, int features)
      : block(at / kSpan * kSpan), lanes(least(32, (features - block + 3) / 4)) {}
  __host__ __device__ __forceinline__ int line(int lane, int e) const { return block + e * lanes + lane; }
  __host__ __device__ __forceinline__ int feature(int line) const {
    return block + (line - block) % lanes * 4 + (line - block) / lanes;
  }
};

// A factor for each adapter: (features, width) in float32, lines as in Placed; columns beyond the factor's own are zero.
struct Factor {
  const float* data;
  int64_t group;
  int features, width;  // width is a multiple of four

  __device__ __forceinline__ const float* of(int adapter) const { return data + adapter * group; }
};

// Hands out parts of a block's shared memory, each on 16 bytes.
struct Shared {
  unsigned char* next;

  __device__ __forceinline__ float* floats(int count) {
    float* part = reinterpret_cast<float*>(next);
    next += round_up(count, 4) * static_cast<int>(sizeof(float));
    return part;
  }
};

// Rows of a tile in shared memory: where each begins in the activations.
struct KronTable {
  static constexpr int64_t kBytes = 3 * sizeof(int64_t);  // a row
  int64_t *row, *x, *other;

  __device__ __forceinline__ KronTable(Shared& shared, int rows)
      : row(reinterpret_cast<int64_t*>(shared.floats(2 * rows))), x(reinterpret_cast<int64_t*>(shared.floats(2 * rows))),
        other(reinterpret_cast<int64_t*>(shared.floats(2 * rows))) {}
  __device__ __forceinline__ void fill(const Groups& groups, const Rows& x_rows, const Rows& other_rows, Tile tile) const {
    for (int i = threadIdx.x; i < tile.end - tile.begin; i += kThreads) {
      row[i] = groups.row(tile.begin + i);
      x[i] = x_rows.offset(row[i]);
      other[i] = other_rows.data ? other_rows.offset(row[i]) : 0;
    }
    __syncthreads();
  }
};

// The lines of a tile's rows: chunk c of row i is line i * chunks + c.
template <class T>
struct Lines {
  const T* data;
  const int64_t* offset;
  Inner inner;  // vector: quads of a line can be loaded at once
  int chunks, features;

  __device__ __forceinline__ Lines(const Rows& rows, const int64_t* offset, int chunks, int features)
      : data(static_cast<const T*>(rows.data)), offset(offset),
        inner{rows.inner.stride, rows.inner.vector && features % 4 == 0}, chunks(chunks), features(features) {}
  __device__ __forceinline__ const T* of(int row, int chunk) const {
    return data + offset[row] + static_cast<int64_t>(chunk) * features * inner.stride;
  }
  __device__ __forceinline__ const T* of(int line) const { return of(line / chunks, line % chunks); }
};

// Sums 32 numbers of each lane over the lanes: lane i gets the sum of the i-th.
template <int N>
__device__ __forceinline__ float sum_lanes(float (&v)[N]) {
  if constexpr (N == 1) {
    return v[0];
  } else {
    const bool upper = threadIdx.x % 32 & (N / 2);
    float half[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
      const float other = __shfl_xor_sync(0xffffffffu, upper ? v[i] : v[i + N / 2], N / 2);
      half[i] = (upper ? v[i + N / 2] : v[i]) + other;
    }
    return sum_lanes(half);
  }
}

__device__ __forceinline__ void multiply_add(float (&sum)[4], float v, const float4& w) {
  sum[0] += v * w.x, sum[1] += v * w.y, sum[2] += v * w.z, sum[3] += v * w.w;
}
__device__ __forceinline__ float4 four(const float* from) { return *reinterpret_cast<const float4*>(from); }

// out[line][k] = the sum of x[line][j] * factor[j][k] over the features j, for `rows` rows.
template <class T>
__device__ __forceinline__ void project(float* out, const Lines<T>& x, int rows, const Factor& factor, int adapter) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, count = rows * x.chunks, width = factor.width;
  const float* weights = factor.of(adapter);
#pragma unroll 1
  for (int first = warp * kLines; first < count; first += kWarps * kLines) {
    const T* from[kLines];
#pragma unroll
    for (int l = 0; l < kLines; l++) from[l] = x.of(least(first + l, count - 1));
#pragma unroll 1
    for (int k = 0; k < width; k += 4) {
      float sum[kLines][4] = {};
#pragma unroll 1
      for (int j = lane * 4; j < factor.features; j += kSpan) {
        const Placed placed(j, factor.features);
        float v[kLines][4];
#pragma unroll
        for (int l = 0; l < kLines; l++) load_quad(v[l], from[l] + j * x.inner.stride, x.inner, factor.features - j);
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const float4 w = four(weights + static_cast<int64_t>(placed.line(lane, e)) * width + k);
#pragma unroll
          for (int l = 0; l < kLines; l++) multiply_add(sum[l], v[l][e], w);
        }
      }
      const float total = sum_lanes(reinterpret_cast<float(&)[kLines * 4]>(sum));
      if (first + lane / 4 < count) out[(first + lane / 4) * width + k + lane % 4] = total;
    }
  }
}

// Calls store(row, chunk, j, values) for four features from j on of each line: the sums of in[line][k] * factor[j][k] over k.
template <class F>
__device__ __forceinline__ void expand(const float* in, int rows, int chunks, const Factor& factor, int adapter, F store) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, count = rows * chunks, width = factor.width;
  const int blocks = static_cast<int>(divide_up(factor.features, kSpan));
  const int64_t items = divide_up(count, kLines) * blocks;
  const float* weights = factor.of(adapter);
#pragma unroll 1
  for (int64_t item = warp; item < items; item += kWarps) {
    const int first = static_cast<int>(item / blocks) * kLines, j = static_cast<int>(item % blocks) * kSpan + lane * 4;
    if (j >= factor.features) continue;
    const Placed placed(j, factor.features);
    float sum[kLines][4] = {};
#pragma unroll 1
    for (int k = 0; k < width; k += 4) {
      float4 w[4];
#pragma unroll
      for (int e = 0; e < 4; e++) w[e] = four(weights + static_cast<int64_t>(placed.line(lane, e)) * width + k);
#pragma unroll
      for (int l = 0; l < kLines; l++) {
        const float4 h = four(in + least(first + l, count - 1) * width + k);
#pragma unroll
        for (int e = 0; e < 4; e++) sum[l][e] += h.x * w[e].x + h.y * w[e].y + h.z * w[e].z + h.w * w[e].w;
      }
    }
#pragma unroll
    for (int l = 0; l < kLines; l++)
      if (first + l < count) store((first + l) / chunks, (first + l) % chunks, j, sum[l]);
  }
}

// A rule for each adapter: (terms, from, to) in float32, contiguous.
struct Rule {
  const float* data;
  int64_t group;
  int terms, from, to;

  __device__ __forceinline__ const float* of(int adapter) const { return data + adapter * group; }
};

// The rank space of a row's chunk: column i * q + k belongs to term i.
struct Rank {
  int columns, q, width;  // terms * q, and with zeros up to a multiple of four
};

// out[row][b][i, k] = gain * the sum of rule[i][a][b] * in[row][a][i, k] over a; TRANSPOSED: the other way, from b to a.
template <bool TRANSPOSED>
__device__ __forceinline__ void mix(
    float* out, const float* in, int rows, const Rule& rule, int adapter, const Rank& rank, float gain = 1.f) {
  const int from = TRANSPOSED ? rule.to : rule.from, to = TRANSPOSED ? rule.from : rule.to, width = rank.width;
  const int step = TRANSPOSED ? 1 : rule.to, line = TRANSPOSED ? rule.to : 1;
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * to * width; i += kThreads) {
    const int column = i % width, b = i / width % to, row = i / width / to;
    float sum = 0.f;
    if (column < rank.columns) {
      const float* weights = rule.of(adapter) + static_cast<int64_t>(column / rank.q) * rule.from * rule.to + b * line;
      const float* values = in + row * from * width + column;
      for (int a = 0; a < from; a++) sum += weights[a * step] * values[a * width];
    }
    out[i] = gain * sum;  // the padding must be zero, whatever infinities there are
  }
}

// Sums over a block's rows, in memory of its own ("plane"): the first tile of rows stores, the others add.
struct Plane {
  float* data;  // nullptr where the sums aren't wanted
  bool first;

  __device__ __forceinline__ void add(int64_t i, float v) const { data[i] = first ? v : data[i] + v; }
};

// factor[j][k] = the sum of x[line][j] * values[line][k] over the lines of `rows` rows.  With SUMS, sum_of(i, v) gets for each
// column i of the rows the sum of x.
template <bool SUMS, class T, class F>
__device__ __forceinline__ void add_outer(
    const Plane& factor, const Lines<T>& x, int rows, const float* values, int width, F sum_of) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quads = factor.data ? width / 4 : 1;
  const int blocks = static_cast<int>(divide_up(x.features, kSpan));
#pragma unroll 1
  for (int item = warp; item < blocks * quads; item += kWarps) {
    const int k = item / blocks * 4, j = item % blocks * kSpan + lane * 4, left = x.features - j;
    if (left <= 0) continue;
    float outer[4][4] = {};
#pragma unroll 1
    for (int chunk = 0; chunk < x.chunks; chunk++) {
      float sum[4] = {};
#pragma unroll 4
      for (int row = 0; row < rows; row++) {
        float v[4];
        load_quad(v, x.of(row, chunk) + j * x.inner.stride, x.inner, left);
        const float4 w = factor.data ? four(values + (row * x.chunks + chunk) * width + k) : float4{0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int e = 0; e < 4; e++) {
          if (SUMS) sum[e] += v[e];
          multiply_add(outer[e], v[e], w);
        }
      }
      if (SUMS && k == 0)
#pragma unroll
        for (int e = 0; e < 4; e++)
          if (e < left) sum_of(static_cast<int64_t>(chunk) * x.features + j + e, sum[e]);
    }
    if (!factor.data) continue;
    const Placed placed(j, x.features);
#pragma unroll
    for (int e = 0; e < 4; e++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        factor.add(static_cast<int64_t>(placed.line(lane, e)) * width + k + i, outer[e][i]);
  }
}

// rule[i][a][b] = the sum of values[row][a][i, k] * grads[row][b][i, k] over rows and k.
__device__ __forceinline__ void add_rule(
    const Plane& plane, int rows, const float* values, const float* grads, const Rule& rule, const Rank& rank) {
  if (!plane.data) return;
#pragma unroll 1
  for (int i = threadIdx.x; i < rule.terms * rule.from * rule.to; i += kThreads) {
    const int b = i % rule.to, a = i / rule.to % rule.from, column = i / rule.to / rule.from * rank.q;
    float sum = 0.f;
    for (int row = 0; row < rows; row++) {
      const float* left = values + (row * rule.from + a) * rank.width + column;
      const float* right = grads + (row * rule.to + b) * rank.width + column;
      for (int k = 0; k < rank.q; k++) sum += left[k] * right[k];
    }
    plane.add(i, sum);
  }
}

// Rows without an adapter, at positions from `begin` on, pass `source` through or become zero; rows of an id outside the bank
// become NaN.
template <class T>
__device__ __forceinline__ void pass_rows(
    T* out, const Groups& groups, int64_t begin, int64_t end, int columns, bool invalid, const Rows* source) {
#pragma unroll 1
  for (int64_t position = begin; position < end; position++) {
    const int64_t row = groups.row(position);
    const T* from = source ? static_cast<const T*>(source->data) + source->offset(row) : nullptr;
    for (int c = threadIdx.x; c < columns; c += kThreads)
      out[row * columns + c] = invalid ? from_float<T>(nanf("")) : from ? from[c * source->inner.stride] : from_float<T>(0.f);
  }
}

}  // namespace fastadapt
