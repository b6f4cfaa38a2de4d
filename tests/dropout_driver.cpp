// The mask of the CUDA kernels by itself, so that rows can be tried which no tensor here has.
#include "../csrc/cuda/dropout.cuh"

extern "C" void kept(int64_t seed, uint32_t threshold, int64_t count, const int64_t* row, const int64_t* block, int64_t* bits) {
  const fastadapt::Dropout dropout{&seed, threshold, 1.f};
  for (int64_t i = 0; i < count; i++) bits[i] = fastadapt::kept(dropout, row[i], block[i]);
}
