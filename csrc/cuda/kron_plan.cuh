// The host side of kron.cuh: from arrays to copies of parameters, and from planes to gradients.
#pragma once
#include "bank_plan.cuh"
#include "kron_pack.cuh"

namespace fastadapt {

// How the dims of a parameter, or of its gradient, are those of a Layout; -1: absent.
struct Dims {
  int line, term, column;  // counted from the last one, which is 0
  bool placed;
};
constexpr Dims kFactorS{1, 2, 0, true}, kFactorT{0, 2, 1, true}, kRuleDims{2, 1, 0, false}, kVectorDims{-1, -1, 0, false};
constexpr Dims in_order(Dims dims) { return Dims{dims.line, dims.term, dims.column, false}; }

inline Layout layout_of(const Array& array, Dims dims, int64_t groups, bool padded) {
  auto at = [&](const int64_t* of, int dim, int64_t absent) { return dim < 0 ? absent : of[array.dims - 1 - dim]; };
  Layout l{groups, at(array.size, dims.line, 1), at(array.size, dims.term, 1), at(array.size, dims.column, 1), 0,
      at(array.stride, dims.line, 0), at(array.stride, dims.term, 0), at(array.stride, dims.column, 0), 0, dims.placed};
  if (groups > 1) l.group = array.stride[0];
  l.width = padded ? divide_up(l.terms * l.columns, 4) * 4 : l.terms * l.columns;
  return l;
}

// The copies of a call, made by one launch.
struct KronPacker {
  const Device& device;
  int64_t groups;
  Packings packings{};

  KronPacker(const Device& device, int64_t groups) : device(device), groups(groups) {}
  Layout add(float*& copy, const Array& array, Dims dims, bool padded) {
    const Layout layout = layout_of(array, dims, groups, padded);
    copy = static_cast<float*>(device.allocate(groups * layout.size() * sizeof(float)));
    packings.of[packings.count++] = Packing{layout, array.data, array.kind == Kind::float32, copy};
    const int64_t parts = divide_up(layout.size(), kThreads);
    if (parts > packings.parts) packings.parts = parts;
    return layout;
  }
  Factor factor(const Array& array, Dims dims) {
    float* copy;
    const Layout layout = add(copy, array, dims, true);
    return Factor{copy, layout.size(), static_cast<int>(layout.lines), static_cast<int>(layout.width)};
  }
  Rule rule(const Array& array) {
    float* copy;
    const Layout layout = add(copy, array, kRuleDims, false);
    return Rule{copy, layout.size(), static_cast<int>(layout.lines), static_cast<int>(layout.terms),
        static_cast<int>(layout.columns)};
  }
  // nullptr if it is absent.
  const float* vector(const Array& array) {
    float* copy = nullptr;
    if (array.data) add(copy, array, kVectorDims, false);
    return copy;
  }
  template <class T>
  void run() const {
    launch_over(groups * packings.parts, kron_pack_kernel<T>, 0, device, packings);
  }
};

// The planes of a call's gradients and their reduction.
struct KronReducer {
  const Device& device;
  int64_t groups, splits;
  KronReductions reductions{};
  unsigned count = 0;
  int64_t blocks = 0;

  KronReducer(const Device& device, int64_t groups, int64_t splits) : device(device), groups(groups), splits(splits) {}
  // The planes of a gradient; nullptr if it isn't wanted.
  float* add(const Array& out, Dims dims, bool padded, Vector scale = {}, float scale_value = 1.f) {
    if (!out.data) return nullptr;
    const Layout layout = layout_of(out, dims, groups, padded);
    return add(out, layout, splits, scale, scale_value);
  }
  // One number for all adapters.
  float* add_total(const Array& out) {
    if (!out.data) return nullptr;
    return add(out, Layout{1, 1, 1, 1, 0, 0, 0, 0, 1, false}, splits * groups, {}, 1.f);
  }
  template <class T>
  void run() const {
    const dim3 grid(static_cast<unsigned>(blocks), count);
    if (blocks) launch(kron_reduce_kernel<T>, grid, kThreads, kThreads * sizeof(float), device.stream, reductions);
  }

 private:
  float* add(const Array& out, const Layout& layout, int64_t planes, Vector scale, float scale_value) {
    float* data = static_cast<float*>(device.allocate(planes * layout.groups * layout.size() * sizeof(float)));
    reductions.of[count++] = KronReduction{layout, data, planes, scale, scale_value, out.kind == Kind::float32, out.data};
    blocks = std::max(blocks, layout.groups * divide_up(layout.size(), 32));
    return data;
  }
};

// Shared memory of a block of `rows` rows of `bytes` each; every part of it begins on 16 bytes.
constexpr int64_t kron_shared(int rows, int64_t bytes) { return rows * bytes + 256; }

// Rows a block: few enough that every multiprocessor has some blocks, and that the numbers of rank space, `bytes` a row, leave
// room for other blocks; yet for each warp eight lines.  No result depends on it.  0 if not even one row fits.
inline int kron_rows(int64_t m, int64_t bytes, int lines, const Device& device) {
  constexpr int64_t kRoom = 24 * 1024;
  int rows = 16;
  while (rows > 1 && rows * lines > kWarps * kLines && divide_up(m, rows) < 4 * device.multiprocessors) rows /= 2;
  while (rows > 1 && rows * bytes > kRoom) rows /= 2;
  return kron_shared(rows, bytes) <= device.shared_limit ? rows : 0;
}

}  // namespace fastadapt
