#include "target.h"

#include <atomic>
#include <cstring>

#include "amx_tiles.h"

namespace fastadapt {

namespace {

constexpr Target all[] = {Target::amx, Target::avx512, Target::avx2, Target::portable};  // best first

bool supported(Target t) {
#if defined(__x86_64__)
  if (t == Target::amx) return amx::available();
  if (t == Target::avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq");
  if (t == Target::avx2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
  return t == Target::portable;
}

Target detect() {
  for (Target t : all)
    if (supported(t)) return t;
  return Target::portable;
}

std::atomic<Target>& chosen() {
  static std::atomic<Target> t{detect()};
  return t;
}

}  // namespace

Target target() { return chosen().load(std::memory_order_relaxed); }

const char* name(Target t) {
  switch (t) {
    case Target::amx: return "amx";
    case Target::avx512: return "avx512";
    case Target::avx2: return "avx2";
    default: return "portable";
  }
}

bool set_target(const char* wanted) {
  for (Target t : all)
    if (!std::strcmp(wanted, name(t)) && supported(t)) {
      chosen().store(t);
      return true;
    }
  return false;
}

}  // namespace fastadapt
