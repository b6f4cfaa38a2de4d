#include "types.h"
#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC target("avx2,fma,f16c")
#define FA_TARGET avx2
#define FA_LANES 8
#include "lora_linear_kernel.h"
#endif
