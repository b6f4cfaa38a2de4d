// A C interface to csrc/cpu/amx.h for test_amx.py.  Every scratch buffer starts as NaN, so that reading padding that nobody
// wrote shows.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <vector>

#include "../csrc/cpu/amx.h"

using namespace fastadapt;
using namespace fastadapt::amx;

namespace {

template <class T>
struct Buffer {
  explicit Buffer(int64_t count) {
    const size_t bytes = round_up(count * sizeof(T) + 64, 64);
    p = static_cast<T*>(std::aligned_alloc(64, bytes));
    std::memset(p, 0xff, bytes);
  }
  ~Buffer() { std::free(p); }
  Buffer(const Buffer&) = delete;
  T* p;
};

void pack_all(bf16* packed, const void* w, bool is_float, int64_t stride_n, int64_t stride_k, const float* scale_k, int64_t n,
              int64_t k) {
  for (int part = 0; part < 2; part++)
    if (is_float)
      pack_part(packed, static_cast<const float*>(w), stride_n, stride_k, scale_k, n, k, part, 2);
    else
      pack_part(packed, static_cast<const bf16*>(w), stride_n, stride_k, scale_k, n, k, part, 2);
}

}  // namespace

extern "C" {

bool amx_available() { return available(); }

// Memory between two pages that nobody may touch; it ends (or begins) right at one of them.
void* guarded(int64_t bytes, bool at_end) {
  const int64_t page = sysconf(_SC_PAGESIZE), inside = round_up(bytes, page);
  char* p = static_cast<char*>(mmap(nullptr, inside + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  mprotect(p + page, inside, PROT_READ | PROT_WRITE);
  return p + page + (at_end ? inside - bytes : 0);
}

void amx_down(const bf16* const* x, int64_t m, int64_t k, const void* w, bool is_float, int64_t stride_n, int64_t stride_k,
              const float* scale_k, int64_t n, const float* start, float* z, int64_t ldz) {
  Buffer<bf16> packed(packed_size(n, k)), scratch(scratch_size(m, k));
  pack_all(packed.p, w, is_float, stride_n, stride_k, scale_k, n, k);
  const TileScope scope(scratch.p, m);
  down(scope, x, m, k, packed.p, n, start, z, ldz);
}

void amx_up(const float* h, int64_t m, int64_t k, const void* w, bool is_float, int64_t stride_n, int64_t stride_k, int64_t n,
            const Epilogue* epilogue, bf16* const* y) {
  Buffer<bf16> packed(packed_size(n, k)), scratch(scratch_size(m, 0)), a(round_up(m, 16) * round_up(k, 32));
  pack_all(packed.p, w, is_float, stride_n, stride_k, nullptr, n, k);
  round_rows(h, k, m, k, a.p);
  const TileScope scope(scratch.p, m);
  up(scope, a.p, m, k, packed.p, n, *epilogue, y);
}

// c += transpose(h) * x, or = if fresh, with the sums of the columns of x below if `ones`; rows of c are n floats.
void amx_accumulate(const float* h, int64_t m, int64_t r, bool ones, const bf16* const* x, int64_t n, bool fresh, float* c) {
  const int64_t rows = r + ones, stride = accumulator_stride(n);
  Buffer<bf16> scratch(scratch_size(m, 0)), at(round_up(rows, 16) * round_up(m, 32));
  Buffer<float> sums(round_up(rows, 16) * stride);
  for (int64_t i = 0; i < rows; i++) std::memcpy(sums.p + i * stride, c + i * n, n * 4);
  transpose_round(h, r, m, r, ones, at.p, round_up(m, 32));
  {
    const TileScope scope(scratch.p, m);
    accumulate(scope, at.p, round_up(m, 32), rows, x, m, n, fresh, sums.p, stride);
  }
  for (int64_t i = 0; i < rows; i++) std::memcpy(c + i * n, sums.p + i * stride, n * 4);
}
}
