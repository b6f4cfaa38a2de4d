// The products of csrc/cpu/gemm.h by themselves, for benchmarks/micro.py, which compiles this with FA_LANES for one machine.
#define FA_TARGET micro
#include "../csrc/cpu/gemm.h"

using namespace fastadapt;

extern "C" {

// Floats that a packed k x n matrix takes, and columns of a product with it.
int64_t packed_floats(int64_t k, int64_t n) { return micro::packed_size<float>(k, n); }
int64_t columns(int64_t n) { return micro::padded<float>(n); }

void pack(int64_t k, int64_t n, const float* b, float* packed) {
  const micro::Source<float, float> source{b, n, 1, k, n, nullptr, nullptr};
  micro::pack<float>(source, packed, 0, micro::pack_units<float>(k, n));
}

// c = a * b in blocks of rows, as the kernels go through an activation.
void multiply(int64_t rows, int64_t block, int64_t k, int64_t n, const float* a, const float* packed, float* c) {
  const int64_t ldc = columns(n);
  for (int64_t i = 0; i < rows; i += block)
    micro::gemm<float>(least(block, rows - i), k, n, a + i * k, k, packed, nullptr, false, c + i * ldc, ldc);
}
}
