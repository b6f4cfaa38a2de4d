// What cuda_emulator.h tells the sanitizers.  To ThreadSanitizer every fiber is a thread, and only barriers order two of them,
// so that it reports a race wherever the CUDA program has one, in whatever order the fibers ran.
#pragma once
#include <cstddef>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#elif defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif

namespace emulator {

// A fiber, or the scheduler, as the sanitizer sees it.
struct Context {
  const void* stack = nullptr;
  size_t size = 0;
  void* handle = nullptr;
};

#if defined(__SANITIZE_THREAD__)

// Fibers are dear, and those of one block serve the next but three: a race between two blocks shows unless more than
// that lie between them, and in another schedule others do.
constexpr unsigned kSlots = 4;

inline Context create(void* stack, size_t size) { return {stack, size, __tsan_create_fiber(0)}; }
inline void adopt(Context& scheduler) { scheduler.handle = __tsan_get_current_fiber(); }
__attribute__((no_sanitize("thread"))) inline void leave(Context&, bool, const Context& to) {
  __tsan_switch_to_fiber(to.handle, __tsan_switch_to_fiber_no_sync);
}
inline void arrive(Context&) {}
inline void arrive_first(Context&) {}
inline void release(void* order) { __tsan_release(order); }
inline void acquire(void* order) { __tsan_acquire(order); }
inline void poison(void*, size_t) {}
inline void unpoison(void*, size_t) {}

// The emulator's own data are touched by every fiber and are no part of the CUDA program.
struct Quiet {
  Quiet() { AnnotateIgnoreReadsBegin("", 0), AnnotateIgnoreWritesBegin("", 0); }
  ~Quiet() { AnnotateIgnoreReadsEnd("", 0), AnnotateIgnoreWritesEnd("", 0); }
};
struct Loud {
  Loud() { AnnotateIgnoreReadsEnd("", 0), AnnotateIgnoreWritesEnd("", 0); }
  ~Loud() { AnnotateIgnoreReadsBegin("", 0), AnnotateIgnoreWritesBegin("", 0); }
};

#else

constexpr unsigned kSlots = 1;

inline Context create(void* stack, size_t size) { return {stack, size, nullptr}; }
inline void adopt(Context&) {}
inline void release(void*) {}
inline void acquire(void*) {}
struct Quiet {
  Quiet() {}
};
struct Loud {
  Loud() {}
};

#if defined(__SANITIZE_ADDRESS__)
inline void leave(Context& from, bool for_good, const Context& to) {
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.handle, to.stack, to.size);
}
inline void arrive(Context& me) { __sanitizer_finish_switch_fiber(me.handle, nullptr, nullptr); }
// The first fiber ever comes from the scheduler, whose stack is learnt here.
inline void arrive_first(Context& scheduler) {
  const void* stack;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &size);
  if (!scheduler.stack) scheduler.stack = stack, scheduler.size = size;
}
inline void poison(void* p, size_t bytes) { __asan_poison_memory_region(p, bytes); }
inline void unpoison(void* p, size_t bytes) { __asan_unpoison_memory_region(p, bytes); }
#else
inline void leave(Context&, bool, const Context&) {}
inline void arrive(Context&) {}
inline void arrive_first(Context&) {}
inline void poison(void*, size_t) {}
inline void unpoison(void*, size_t) {}
#endif
#endif

}  // namespace emulator
