// The tiles of Intel AMX: whether they are there, their configuration, and their instructions.  Torch-free.
#pragma once
#include "types.h"

#if defined(__x86_64__) && defined(__linux__) && \
    ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && defined(__GNUC__) && __GNUC__ >= 11))
#define FASTADAPT_AMX 1
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#define FASTADAPT_AMX 0
#endif

namespace fastadapt::amx {

using bf16 = BFloat16;

// Sizes of the padded buffers that the caller owns; align them to 64 bytes.
// Elements of a packed weight with k inner and n outer entries.
constexpr int64_t packed_size(int64_t n, int64_t k) { return round_up(n, 32) * round_up(k, 32); }
// Elements of the scratch of a thread whose blocks have at most m rows and whose down products at most k inner entries.
constexpr int64_t scratch_size(int64_t m, int64_t k) { return 2048 + 1024 + round_up(m, 32) * 32 + 32 * round_up(k, 32); }
// Row length of the accumulators; the odd number of cache lines keeps the 16 rows of a tile out of one cache set.
constexpr int64_t accumulator_stride(int64_t n) { return round_up(n, 32) + 16; }

#if FASTADAPT_AMX

#define FASTADAPT_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

// Asks the processor and, once, the system: Linux grants the tile registers to a process on request.
inline bool available() {
  static const bool granted = [] {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return false;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") ||
        !__builtin_cpu_supports("avx512dq"))
      return false;
    constexpr long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  }();
  return granted;
}

// Configures all eight tiles as 16 rows of 64 bytes.  Other libraries use the tiles too, each with a configuration of its
// own, so that a scope must not span a call into one of them.
class TileScope {
 public:
  // scratch: scratch_size(m, k) elements, 64-byte aligned, used by this thread alone.
  TileScope(bf16* scratch, int64_t m)
      : product(reinterpret_cast<float*>(scratch)), tail(scratch + 2048), pairs(tail + 1024),
        copy(pairs + round_up(m, 32) * 32) {
    alignas(64) uint8_t config[64] = {1};  // palette 1
    for (int tile = 0; tile < 8; tile++) {
      config[16 + 2 * tile] = 64;  // bytes a row, 16 bits wide
      config[48 + tile] = 16;      // rows
    }
    asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
  }
  ~TileScope() { asm volatile("tilerelease" ::: "memory"); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;

  float* const product;  // 32 by 32: four tiles on their way to memory
  bf16* const tail;      // the last, partial step of two strips
  bf16* const pairs;     // the rows of a block, interleaved in pairs, 32 columns of them
  bf16* const copy;      // two strips that cannot be read in place
};

namespace detail {

template <int T>
inline __attribute__((always_inline)) void load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(T), "r"(p), "r"(stride) : "memory");
}
template <int T>
inline __attribute__((always_inline)) void store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(T), "r"(p), "r"(stride) : "memory");
}
template <int T>
inline __attribute__((always_inline)) void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int C, int A, int B>
inline __attribute__((always_inline)) void multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// Tiles 0..3 (row-major, 2 by 2) += left strips * right panels; MT row tiles, NT column tiles.
template <int MT, int NT>
inline __attribute__((always_inline)) void step(const char* a0, int64_t s0, const char* a1, int64_t s1, const bf16* b0,
                                                const bf16* b1) {
  load<4>(a0, s0);
  load<6>(b0, 64);
  multiply<0, 4, 6>();
  if constexpr (NT == 2) {
    load<7>(b1, 64);
    multiply<1, 4, 7>();
  }
  if constexpr (MT == 2) {
    load<5>(a1, s1);
    multiply<2, 5, 6>();
    if constexpr (NT == 2) multiply<3, 5, 7>();
  }
}
template <int MT, int NT>
inline __attribute__((always_inline)) void clear() {
  zero<0>();
  if constexpr (NT == 2) zero<1>();
  if constexpr (MT == 2) zero<2>();
  if constexpr (MT == 2 && NT == 2) zero<3>();
}
// Stores tiles 0..3 as a matrix whose rows are `stride` bytes apart.
template <int MT, int NT>
inline __attribute__((always_inline)) void store_all(float* c, int64_t stride) {
  store<0>(c, stride);
  if constexpr (NT == 2) store<1>(c + 16, stride);
  if constexpr (MT == 2) store<2>(c + 4 * stride, stride);
  if constexpr (MT == 2 && NT == 2) store<3>(c + 4 * stride + 16, stride);
}
template <int MT, int NT>
inline __attribute__((always_inline)) void load_all(const float* c, int64_t stride) {
  load<0>(c, stride);
  if constexpr (NT == 2) load<1>(c + 16, stride);
  if constexpr (MT == 2) load<2>(c + 4 * stride, stride);
  if constexpr (MT == 2 && NT == 2) load<3>(c + 4 * stride + 16, stride);
}

}  // namespace detail

#else

inline bool available() { return false; }

#endif  // FASTADAPT_AMX

}  // namespace fastadapt::amx
