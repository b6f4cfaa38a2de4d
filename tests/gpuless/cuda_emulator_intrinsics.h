// The CUDA intrinsics and the wrappers of csrc/cuda/hardware.cuh on top of the fibers of cuda_emulator.h.
#pragma once

inline void __syncthreads() {
  const dim3 n = emulator::state().block_size;
  emulator::barrier(0, n.x * n.y * n.z);
}
inline void __syncwarp() {
  emulator::warp_operation("syncwarp", nullptr, [](void**) {}, true);
}
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(unsigned v) { return __builtin_ffs(static_cast<int>(v)); }

namespace emulator {
inline uint16_t read(const uint16_t* p) {  // by the CUDA program
  Loud loud;
  return *p;
}

template <class T>
struct Exchange {
  T value, result;
  unsigned source;
};

template <class T>
T shuffle(const char* name, T value, unsigned source) {
  Exchange<T> mine{value, value, source};
  warp_operation(name, &mine, [](void** all) {
    for (int l = 0; l < 32; l++) {
      auto* lane = static_cast<Exchange<T>*>(all[l]);
      lane->result = static_cast<Exchange<T>*>(all[lane->source % 32])->value;
    }
  });
  return mine.result;
}
}  // namespace emulator

template <class T>
T __shfl_sync(unsigned, T value, int source) {
  return emulator::shuffle("shfl", value, source);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulator::shuffle("shfl.xor", value, emulator::current()->lane ^ mask);
}
inline unsigned __match_any_sync(unsigned, int value) {
  struct Match {
    int value;
    unsigned peers;
  } mine{value, 0};
  emulator::warp_operation("match.any", &mine, [](void** all) {
    for (int l = 0; l < 32; l++)
      for (int o = 0; o < 32; o++)
        if (static_cast<Match*>(all[l])->value == static_cast<Match*>(all[o])->value)
          static_cast<Match*>(all[l])->peers |= 1u << o;
  });
  return mine.peers;
}

namespace fastadapt {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  _Float16 value;
};

inline float to_float(float v) { return v; }
inline float to_float(f16 v) { return static_cast<float>(v.value); }
inline float to_float(bf16 v) {
  const uint32_t bits = uint32_t{v.bits} << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
template <class T>
T from_float(float v) {
  if constexpr (std::is_same_v<T, bf16>) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    if (v != v) return bf16{static_cast<uint16_t>(bits >> 16 | 0x40)};
    return bf16{static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};  // to nearest, ties to even
  } else if constexpr (std::is_same_v<T, f16>) {
    return f16{static_cast<_Float16>(v)};
  } else {
    return v;
  }
}

inline float exp2_approx(float v) {
  const float result = std::exp2(v);
  return result < 1.17549435e-38f ? 0.f : result;
}

#define FA_DYNAMIC_SHARED(name) unsigned char* name = emulator::state().shared

template <class... Parameters, class... Arguments>
void launch(
    void (*kernel)(Parameters...), dim3 grid, unsigned threads, size_t shared, cudaStream_t schedule, Arguments... arguments) {
  emulator::run(grid, dim3(threads), shared, [=] { kernel(arguments...); }, reinterpret_cast<uintptr_t>(schedule));
}

inline void bar_sync(int id, int threads) { emulator::barrier(id, threads); }

inline void land(const emulator::Copy& copy) {
  emulator::Loud loud;
  std::memcpy(copy.to, copy.from, copy.bytes);
  std::memset(static_cast<char*>(copy.to) + copy.bytes, 0, 16 - copy.bytes);
}
inline void cp_async16(void* to, const void* from, int bytes) {
  emulator::Quiet quiet;
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) & 15)
    emulator::fail("cp.async: misaligned address");
  if (bytes < 0 || bytes > 16) emulator::fail("cp.async: a source size outside 0..16");
  emulator::Copy copy{to, from, bytes};
  if (emulator::state().copies_land_at_once) {
    land(copy);
    copy.to = nullptr;  // stays in the queue, so that a missing wait is still seen
  }
  emulator::current()->open.push_back(copy);
}
inline void cp_async_commit() {
  emulator::Quiet quiet;
  emulator::Fiber* me = emulator::current();
  me->groups.push_back(std::move(me->open));
  me->open.clear();
}
template <int GROUPS>
void cp_async_wait() {
  emulator::Quiet quiet;
  emulator::Fiber* me = emulator::current();
  while (static_cast<int>(me->groups.size()) > GROUPS) {
    for (const emulator::Copy& copy : me->groups.front())
      if (copy.to) land(copy);
    me->groups.pop_front();
  }
}

// Four 8x8 matrices of 16-bit values; lane 8*i + k gives the address of row k of matrix i.
template <bool TRANSPOSED>
void ldmatrix_x4(uint32_t (&registers)[4], const void* row) {
  struct Load {
    const void* row;
    uint32_t* registers;
  } mine{row, registers};
  if (reinterpret_cast<uintptr_t>(row) & 15) emulator::fail("ldmatrix: misaligned row");
  emulator::warp_operation(TRANSPOSED ? "ldmatrix.trans" : "ldmatrix", &mine, [](void** all) {
    for (int l = 0; l < 32; l++)
      for (int matrix = 0; matrix < 4; matrix++) {
        uint32_t packed = 0;
        for (int half = 0; half < 2; half++) {
          const int along = l % 4 * 2 + half, across = l / 4;
          const int r = TRANSPOSED ? along : across, c = TRANSPOSED ? across : along;
          const auto* line = static_cast<const uint16_t*>(static_cast<Load*>(all[matrix * 8 + r])->row);
          packed |= uint32_t{emulator::read(line + c)} << 16 * half;
        }
        static_cast<Load*>(all[l])->registers[matrix] = packed;
      }
  });
}

// c += a @ b for a 16x16 row-major, b 16x8 column-major, c 16x8, spread over the lanes as mma.m16n8k16 wants.
template <class T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operands {
    float* c;
    const uint32_t* a;
    uint32_t b[2];
  } mine{c, a, {b0, b1}};
  emulator::warp_operation("mma.m16n8k16", &mine, [](void** all) {
    auto unpack = [](uint32_t pair, int half) {
      const uint16_t bits = static_cast<uint16_t>(pair >> 16 * half);
      T value;
      std::memcpy(&value, &bits, 2);
      return to_float(value);
    };
    float A[16][16], B[16][8];
    for (int l = 0; l < 32; l++) {
      const auto* o = static_cast<Operands*>(all[l]);
      const int group = l / 4, pair = l % 4 * 2;
      for (int half = 0; half < 2; half++) {
        for (int i = 0; i < 4; i++) A[group + i % 2 * 8][pair + i / 2 * 8 + half] = unpack(o->a[i], half);
        for (int i = 0; i < 2; i++) B[pair + i * 8 + half][group] = unpack(o->b[i], half);
      }
    }
    float D[16][8] = {};
    for (int r = 0; r < 16; r++)
      for (int k = 0; k < 16; k++)
        for (int n = 0; n < 8; n++) D[r][n] += A[r][k] * B[k][n];
    for (int l = 0; l < 32; l++)
      for (int i = 0; i < 4; i++) static_cast<Operands*>(all[l])->c[i] += D[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
  });
}

}  // namespace fastadapt
