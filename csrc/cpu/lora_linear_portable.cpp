#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
// Only processors without AVX2 come here: right is enough, and more optimization takes minutes to compile.
#pragma GCC optimize("O1")
#endif
#define FA_TARGET portable
#define FA_LANES 8
#include "lora_linear_kernel.h"
