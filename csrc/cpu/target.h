#pragma once

namespace fastadapt {

// The instruction set whose kernels run. Detected once; the tests choose others. `amx` is avx512 but for bfloat16 rows.
enum class Target { portable, avx2, avx512, amx };

Target target();
const char* name(Target);
// False if the name is unknown or the processor can't run it.
bool set_target(const char* name);

}  // namespace fastadapt
