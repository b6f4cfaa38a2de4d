#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors only pass between functions that are inlined
#endif

#define FA_FORCED __attribute__((always_inline))
#define FA_INLINE inline FA_FORCED
#define FA_NOINLINE __attribute__((noinline))

// Plain types that the instruction-set specific translation units share with the rest. They include no PyTorch header: an
// inline function of such a header, compiled there for AVX-512, could be the copy that the linker keeps for everyone. For the
// same reason every function here is forced inline.
namespace fastadapt {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

enum class Dtype { float32, float16, bfloat16, float64 };

// Products accumulate in the compute type: float32, and float64 for float64.
template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

FA_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FA_INLINE constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
FA_INLINE constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
FA_INLINE constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Carves aligned arrays out of one allocation. With a null base it only measures.
class Arena {
 public:
  FA_INLINE explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  FA_INLINE T* take(int64_t count) {
    T* array = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return array;
  }

  FA_INLINE int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace fastadapt
