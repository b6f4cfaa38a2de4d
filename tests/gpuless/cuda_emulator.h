// Runs CUDA C++ kernels on the CPU, one fiber per CUDA thread, from the same source that nvcc compiles.
//
// csrc/cuda/hardware.cuh includes this file under FA_EMULATE; the names of the intrinsics are those of CUDA and of that
// header.  The emulator is stricter than a GPU:
//   * shared memory starts as NaN;
//   * an asynchronous copy lands at the wait that covers it, or at once (odd schedules), never "some time later";
//   * blocks, warps and lanes run in a shuffled order (schedules other than 0), so a missing barrier changes results;
//   * divergent barriers and warp operations, misaligned addresses, and threads that end with copies in flight are errors.
// A launch takes the number of the schedule where CUDA takes a stream.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __restrict__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
using cudaStream_t = uint64_t;

namespace emulator {

constexpr size_t kStack = 128 * 1024;
constexpr size_t kGuard = 256;  // poisoned bytes on either side of shared memory
enum class Now { ready, blocked, done };

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Fiber {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  char* stack = nullptr;
  unsigned thread = 0, lane = 0, warp = 0;
  dim3 index;
  Now now = Now::ready;
  std::vector<Copy> open;                // copies issued, not yet committed
  std::deque<std::vector<Copy>> groups;  // committed, not yet waited for
};

struct Warp {
  void* arguments[32];
  const char* operation[32];
  unsigned arrived = 0;
};

struct Barrier {
  unsigned arrived = 0;
  std::vector<unsigned> waiting;
};

struct State {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barriers[16];
  Fiber* current = nullptr;
#if defined(__x86_64__)
  void* scheduler = nullptr;
#else
  ucontext_t scheduler;
#endif
  dim3 block, block_size, grid_size;
  std::vector<unsigned> order;  // in which ready threads are picked
  unsigned live = 0;
  std::function<void()> kernel;
  unsigned char* shared = nullptr;
  bool copies_land_at_once = false;
  std::vector<char*> stacks;
  std::string error;
};

inline State& state() {
  static thread_local State s;
  return s;
}
// Fibers of one launch never change thread, but the compiler may not keep a thread-local address across a switch.
__attribute__((noinline)) inline Fiber* current() { return state().current; }

#if defined(__x86_64__)
// Saves the callee-saved registers on the old stack and takes up the new one: four times as fast as swapcontext.
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
.weak emulator_switch
.type emulator_switch,@function
emulator_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp,(%rdi)
  mov %rsi,%rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size emulator_switch,.-emulator_switch
)");
#endif

// Continues another fiber, or the scheduler for nullptr.
__attribute__((noinline)) inline void switch_to(Fiber* to) {
  State& s = state();
  Fiber* from = s.current;
  s.current = to;
#if defined(__x86_64__)
  emulator_switch(from ? &from->stack_pointer : &s.scheduler, to ? to->stack_pointer : s.scheduler);
#else
  swapcontext(from ? &from->context : &s.scheduler, to ? &to->context : &s.scheduler);
#endif
}

// Ends the launch with an error; the fibers are left where they are.
inline void fail(const std::string& what) {
  State& s = state();
  s.error = "block (" + std::to_string(s.block.x) + ", " + std::to_string(s.block.y) + ", " + std::to_string(s.block.z) +
            "), thread " + std::to_string(s.current ? s.current->thread : 0) + ": " + what;
  switch_to(nullptr);
}

inline Fiber* next_ready() {
  State& s = state();
  for (unsigned t : s.order)
    if (s.fibers[t].now == Now::ready) return &s.fibers[t];
  return nullptr;
}

inline void block_current() {
  current()->now = Now::blocked;
  switch_to(next_ready());
}

inline void fiber_main() {
  state().kernel();
  State& s = state();
  if (!s.current->open.empty() || !s.current->groups.empty()) fail("the thread ends with asynchronous copies in flight");
  s.current->now = Now::done;
  s.live--;
  switch_to(next_ready());
  abort();
}

inline void barrier(unsigned id, unsigned count) {
  State& s = state();
  Barrier& b = s.barriers[id];
  if (++b.arrived == count) {
    b.arrived = 0;
    for (unsigned t : b.waiting) s.fibers[t].now = Now::ready;
    b.waiting.clear();
  } else {
    b.waiting.push_back(current()->thread);
    block_current();
  }
}

// One operation of a whole warp: the last lane to arrive runs work over the arguments of all 32.
template <class Work>
void warp_operation(const char* name, void* argument, Work work) {
  State& s = state();
  Fiber* me = current();
  Warp& warp = s.warps[me->warp];
  warp.arguments[me->lane] = argument;
  warp.operation[me->lane] = name;
  warp.arrived |= 1u << me->lane;
  if (warp.arrived != 0xffffffffu) return block_current();
  for (const char* other : warp.operation)
    if (std::strcmp(other, name)) fail(std::string("lanes of one warp wait in different operations: ") + name + ", " + other);
  work(warp.arguments);
  warp.arrived = 0;
  for (unsigned l = 0; l < 32; l++) {
    Fiber& lane = s.fibers[me->warp * 32 + l];
    if (lane.now == Now::blocked) lane.now = Now::ready;
  }
}

inline void start_fiber(Fiber& f) {
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(f.stack) + kStack - 64) & ~uintptr_t{15});
  *--top = nullptr;  // where fiber_main would return to; keeps the alignment that a call gives
  *--top = reinterpret_cast<void*>(fiber_main);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  f.stack_pointer = top;
#else
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack;
  f.context.uc_stack.ss_size = kStack;
  f.context.uc_link = nullptr;
  makecontext(&f.context, reinterpret_cast<void (*)()>(fiber_main), 0);
#endif
}

inline void run_block(uint64_t index, std::mt19937_64& random, bool shuffled) {
  State& s = state();
  const unsigned threads = s.block_size.x * s.block_size.y * s.block_size.z;
  s.block = dim3(index % s.grid_size.x, index / s.grid_size.x % s.grid_size.y, index / s.grid_size.x / s.grid_size.y);
  s.fibers.clear();
  s.fibers.resize(threads);
  s.warps.assign(threads / 32, Warp{});
  for (Barrier& b : s.barriers) b = Barrier{};
  std::vector<unsigned> warps(threads / 32);
  for (unsigned w = 0; w < warps.size(); w++) warps[w] = w;
  if (shuffled) std::shuffle(warps.begin(), warps.end(), random);
  s.order.clear();
  for (unsigned w : warps) {
    unsigned lanes[32];
    for (unsigned l = 0; l < 32; l++) lanes[l] = w * 32 + l;
    if (shuffled) std::shuffle(lanes, lanes + 32, random);
    s.order.insert(s.order.end(), lanes, lanes + 32);
  }
  for (unsigned t = 0; t < threads; t++) {
    Fiber& f = s.fibers[t];
    f.thread = t, f.lane = t % 32, f.warp = t / 32, f.stack = s.stacks[t];
    f.index = dim3(t % s.block_size.x, t / s.block_size.x % s.block_size.y, t / s.block_size.x / s.block_size.y);
    start_fiber(f);
  }
  s.live = threads;
  switch_to(next_ready());
  s.current = nullptr;
  if (s.error.empty() && s.live) {
    s.error = std::to_string(s.live) + " of " + std::to_string(threads) + " threads of block " + std::to_string(index) +
              " wait for ever: a divergent barrier or warp operation";
  }
}

inline void run(dim3 grid, dim3 block, size_t shared, std::function<void()> kernel, uint64_t schedule) {
  State& s = state();
  const unsigned threads = block.x * block.y * block.z;
  if (threads % 32) throw std::runtime_error("emulator: the block size must be a multiple of 32");
  s.grid_size = grid, s.block_size = block, s.kernel = std::move(kernel), s.error.clear();
  s.copies_land_at_once = schedule & 1;
  std::mt19937_64 random(schedule);
  std::vector<uint64_t> blocks(uint64_t{grid.x} * grid.y * grid.z);
  for (uint64_t i = 0; i < blocks.size(); i++) blocks[i] = i;
  if (schedule) std::shuffle(blocks.begin(), blocks.end(), random);
  while (s.stacks.size() < threads) s.stacks.push_back(static_cast<char*>(std::malloc(kStack)));
  const size_t bytes = (shared + 2 * kGuard + 255) / 256 * 256;
  unsigned char* memory = static_cast<unsigned char*>(std::aligned_alloc(256, bytes));
  s.shared = memory + kGuard;
  for (uint64_t b : blocks) {
    std::memset(memory, 0xff, bytes);  // NaN in every float type
    run_block(b, random, schedule != 0);
    for (size_t i = 0; i < kGuard && s.error.empty(); i++)
      if (memory[i] != 0xff || s.shared[shared + i] != 0xff) s.error = "a write outside shared memory";
    if (!s.error.empty()) break;
  }
  std::free(memory);
  if (!s.error.empty()) throw std::runtime_error("emulator: " + s.error);
}

}  // namespace emulator

#define threadIdx (emulator::current()->index)
#define blockIdx (emulator::state().block)
#define blockDim (emulator::state().block_size)
#define gridDim (emulator::state().grid_size)

#include "cuda_emulator_intrinsics.h"
