#include "types.h"
#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#define FA_TARGET avx512
#define FA_LANES 16
#include "lora_linear_kernel.h"
#endif
