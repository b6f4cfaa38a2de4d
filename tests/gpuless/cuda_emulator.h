// Runs CUDA C++ kernels on the CPU, one fiber per CUDA thread, from the same source that nvcc compiles.
//
// csrc/cuda/hardware.cuh includes this file under FA_EMULATE; the names of the intrinsics are those of CUDA and of that
// header.  The emulator is stricter than a GPU:
//   * shared memory starts as NaN;
//   * an asynchronous copy lands at the wait that covers it, or at once (odd schedules), never "some time later";
//   * blocks, warps and lanes run in a shuffled order (schedules other than 0), so a missing barrier changes results;
//   * divergent barriers and warp operations, misaligned addresses, and threads that end with copies in flight are errors.
// Built with AddressSanitizer it also sees every access out of bounds, with ThreadSanitizer every race, between blocks too.
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

#include "cuda_emulator_sanitizers.h"

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
struct Schedule;
using cudaStream_t = Schedule*;  // a pointer as in CUDA; its value is the number

namespace emulator {

constexpr size_t kStack = 64 * 1024;
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
  ucontext_t registers;
#endif
  Context* context = nullptr;
  char* stack = nullptr;
  unsigned thread = 0, lane = 0, warp = 0;
  unsigned place = 0;  // in the order in which ready threads are picked
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
  unsigned arrived = 0, count = 0;
  std::vector<unsigned> waiting;
};

constexpr unsigned kBarriers = 16, kMostThreads = 1024;

struct State {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barriers[kBarriers];
  // To ThreadSanitizer an address stands for what a barrier, or __syncwarp, orders: of each barrier and each warp of a block.
  std::vector<uint64_t> orders;
  Fiber* current = nullptr;
#if defined(__x86_64__)
  void* scheduler = nullptr;
#else
  ucontext_t scheduler;
#endif
  Context scheduler_context;
  char begin, end;  // their addresses stand for the order between a launch and what surrounds it
  dim3 block, block_size, grid_size;
  Fiber* order[kMostThreads];         // in which ready threads are picked
  uint64_t ready[kMostThreads / 64];  // a bit for each place of it
  unsigned live = 0;
  std::function<void()> kernel;
  unsigned char* shared = nullptr;
  size_t shared_limit = 48 * 1024;  // what a launch gets without asking
  uint64_t most_blocks = UINT64_MAX;
  bool copies_land_at_once = false;
  std::vector<char*> stacks;
  std::vector<Context> contexts;
  std::string error;
};

inline State& state() {
  static thread_local State s;
  return s;
}
// Fibers of one launch never change thread, but the compiler may not keep a thread-local address across a switch.
__attribute__((noinline)) inline Fiber* current() {
  Quiet quiet;
  return state().current;
}

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
__attribute__((noinline, no_sanitize("thread"))) inline void switch_to(Fiber* to) {
  State& s = state();
  Fiber* from = s.current;
  s.current = to;
  Context& mine = from ? *from->context : s.scheduler_context;
  leave(mine, from && from->now == Now::done, to ? *to->context : s.scheduler_context);
#if defined(__x86_64__)
  emulator_switch(from ? &from->stack_pointer : &s.scheduler, to ? to->stack_pointer : s.scheduler);
#else
  swapcontext(from ? &from->registers : &s.scheduler, to ? &to->registers : &s.scheduler);
#endif
  arrive(mine);
}

// Ends the launch with an error; the fibers are left where they are.
inline void fail(const std::string& what) {
  State& s = state();
  s.error = "block (" + std::to_string(s.block.x) + ", " + std::to_string(s.block.y) + ", " + std::to_string(s.block.z) +
            "), thread " + std::to_string(s.current ? s.current->thread : 0) + ": " + what;
  switch_to(nullptr);
}

inline void set(Fiber& f, Now now) {
  const uint64_t bit = uint64_t{1} << f.place % 64;
  uint64_t& word = state().ready[f.place / 64];
  word = now == Now::ready ? word | bit : word & ~bit;
  f.now = now;
}

inline Fiber* next_ready() {
  State& s = state();
  for (unsigned w = 0; w < kMostThreads / 64; w++)
    if (s.ready[w]) return s.order[w * 64 + __builtin_ctzll(s.ready[w])];
  return nullptr;
}

inline void block_current() {
  set(*current(), Now::blocked);
  switch_to(next_ready());
}

// Not to ThreadSanitizer, whose record of a fiber's calls would keep one that never returns.
__attribute__((no_sanitize("thread"))) inline void fiber_main() {
  State& s = state();
  arrive_first(s.scheduler_context);
  acquire(&s.begin);
  s.kernel();
  release(&s.end);
  Fiber* next;
  {
    Quiet quiet;
    if (!s.current->open.empty() || !s.current->groups.empty()) fail("the thread ends with asynchronous copies in flight");
    set(*s.current, Now::done);
    s.live--;
    next = next_ready();
  }
  switch_to(next);
  abort();
}

inline void barrier(unsigned id, unsigned count) {
  Quiet quiet;
  State& s = state();
  if (id >= kBarriers) fail("barrier " + std::to_string(id) + " of " + std::to_string(kBarriers));
  Barrier& b = s.barriers[id];
  if (b.arrived && b.count != count)
    fail("a barrier of " + std::to_string(count) + " threads, of " + std::to_string(b.count) + " to others");
  b.count = count;
  void* order = &s.orders[id];
  release(order);
  if (++b.arrived == count) {
    b.arrived = 0;
    for (unsigned t : b.waiting) set(s.fibers[t], Now::ready);
    b.waiting.clear();
  } else {
    b.waiting.push_back(current()->thread);
    block_current();
  }
  acquire(order);
}

// One operation of a whole warp: the last lane to arrive runs work over the arguments of all 32.  Only __syncwarp orders the
// memory accesses of the lanes; the others exchange registers.
template <class Work>
void warp_operation(const char* name, void* argument, Work work, bool orders = false) {
  Quiet quiet;
  State& s = state();
  Fiber* me = s.current;
  Warp& warp = s.warps[me->warp];
  warp.arguments[me->lane] = argument;
  warp.operation[me->lane] = name;
  warp.arrived |= 1u << me->lane;
  void* order = &s.orders[kBarriers + me->warp];
  if (orders) release(order);
  if (warp.arrived != 0xffffffffu) {
    block_current();
  } else {
    for (const char* other : warp.operation)
      if (other != name && std::strcmp(other, name))
        fail(std::string("lanes of one warp wait in different operations: ") + name + ", " + other);
    work(warp.arguments);
    warp.arrived = 0;
    for (unsigned l = 0; l < 32; l++) {
      Fiber& lane = s.fibers[me->warp * 32 + l];
      if (lane.now == Now::blocked) set(lane, Now::ready);
    }
  }
  if (orders) acquire(order);
}

inline void start_fiber(Fiber& f) {
  unpoison(f.stack, kStack);  // the frames of a fiber that never ended
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(f.stack) + kStack - 64) & ~uintptr_t{15});
  *--top = nullptr;  // where fiber_main would return to; keeps the alignment that a call gives
  *--top = reinterpret_cast<void*>(fiber_main);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  f.stack_pointer = top;
#else
  getcontext(&f.registers);
  f.registers.uc_stack.ss_sp = f.stack;
  f.registers.uc_stack.ss_size = kStack;
  f.registers.uc_link = nullptr;
  makecontext(&f.registers, reinterpret_cast<void (*)()>(fiber_main), 0);
#endif
}

inline void run_block(uint64_t index, unsigned slot, std::mt19937_64& random, bool shuffled) {
  State& s = state();
  const unsigned threads = s.block_size.x * s.block_size.y * s.block_size.z;
  s.block = dim3(index % s.grid_size.x, index / s.grid_size.x % s.grid_size.y, index / s.grid_size.x / s.grid_size.y);
  s.fibers.clear();
  s.fibers.resize(threads);
  s.warps.assign(threads / 32, Warp{});
  s.orders = std::vector<uint64_t>(kBarriers + threads / 32);  // new memory: what one block ordered, the next must not inherit
  for (Barrier& b : s.barriers) b = Barrier{};
  std::vector<unsigned> warps(threads / 32);
  for (unsigned w = 0; w < warps.size(); w++) warps[w] = w;
  if (shuffled) std::shuffle(warps.begin(), warps.end(), random);
  std::memset(s.ready, 0, sizeof s.ready);
  unsigned place = 0;
  for (unsigned w : warps) {
    unsigned lanes[32];
    for (unsigned l = 0; l < 32; l++) lanes[l] = w * 32 + l;
    if (shuffled) std::shuffle(lanes, lanes + 32, random);
    for (unsigned t : lanes) {
      Fiber& f = *(s.order[place] = &s.fibers[t]);
      f.place = place++;
      set(f, Now::ready);
    }
  }
  for (unsigned t = 0; t < threads; t++) {
    Fiber& f = s.fibers[t];
    f.thread = t, f.lane = t % 32, f.warp = t / 32, f.stack = s.stacks[slot * threads + t];
    f.context = &s.contexts[slot * threads + t];
    f.index = dim3(t % s.block_size.x, t / s.block_size.x % s.block_size.y, t / s.block_size.x / s.block_size.y);
    start_fiber(f);
  }
  s.live = threads;
  adopt(s.scheduler_context);
  release(&s.begin);
  switch_to(next_ready());
  s.current = nullptr;
  if (s.error.empty() && s.live) {
    s.error = std::to_string(s.live) + " of " + std::to_string(threads) + " threads of block " + std::to_string(index) +
              " wait for ever: a divergent barrier or warp operation";
  }
}

// Shared memory between two guards.
class Shared {
 public:
  explicit Shared(size_t bytes) : bytes_(bytes), all_((bytes + 2 * kGuard + 255) / 256 * 256) {
    memory_ = static_cast<unsigned char*>(std::aligned_alloc(256, all_));
    std::memset(memory_, 0xff, all_);  // NaN in every float type
    poison(memory_, kGuard);
    poison(data() + bytes_, all_ - kGuard - bytes_);
  }
  ~Shared() { std::free(memory_); }
  Shared(const Shared&) = delete;

  unsigned char* data() const { return memory_ + kGuard; }
  bool guards_hold() const {
    unpoison(memory_, all_);
    for (size_t i = 0; i < kGuard; i++)
      if (memory_[i] != 0xff || data()[bytes_ + i] != 0xff) return false;
    return true;
  }

 private:
  size_t bytes_, all_;
  unsigned char* memory_;
};

inline void run(dim3 grid, dim3 block, size_t shared, std::function<void()> kernel, uint64_t schedule) {
  Quiet quiet;
  State& s = state();
  const unsigned threads = block.x * block.y * block.z;
  if (threads % 32 || threads > kMostThreads)
    throw std::runtime_error("emulator: the block size must be a multiple of 32 up to 1024");
  if (!grid.x || !grid.y || !grid.z || grid.x > INT32_MAX || grid.y > UINT16_MAX || grid.z > UINT16_MAX)
    throw std::runtime_error("emulator: CUDA takes no grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) +
                             " x " + std::to_string(grid.z) + " blocks");
  if (shared > s.shared_limit)
    throw std::runtime_error(
        "emulator: " + std::to_string(shared) + " bytes of shared memory, of " + std::to_string(s.shared_limit));
  s.grid_size = grid, s.block_size = block, s.kernel = std::move(kernel), s.error.clear();
  s.copies_land_at_once = schedule & 1;
  std::mt19937_64 random(schedule);
  const uint64_t all = uint64_t{grid.x} * grid.y * grid.z, some = std::min(all, s.most_blocks);
  std::vector<uint64_t> blocks(some);
  for (uint64_t i = 0; i < some; i++) blocks[i] = i < some / 2 ? i : all - some + i;
  if (schedule) std::shuffle(blocks.begin(), blocks.end(), random);
  while (s.stacks.size() < kSlots * threads) {
    s.stacks.push_back(static_cast<char*>(std::malloc(kStack)));
    s.contexts.push_back(create(s.stacks.back(), kStack));
  }
  unsigned slot = 0;
  for (uint64_t b : blocks) {
    const Shared memory(shared);
    s.shared = memory.data();
    run_block(b, slot++ % kSlots, random, schedule != 0);
    if (!memory.guards_hold() && s.error.empty()) s.error = "a write outside shared memory";
    if (!s.error.empty()) break;
  }
  acquire(&s.end);
  if (!s.error.empty()) throw std::runtime_error("emulator: " + s.error);
}

}  // namespace emulator

#define threadIdx (emulator::current()->index)
#define blockIdx (emulator::state().block)
#define blockDim (emulator::state().block_size)
#define gridDim (emulator::state().grid_size)

#include "cuda_emulator_intrinsics.h"
