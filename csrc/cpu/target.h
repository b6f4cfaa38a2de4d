#pragma once

namespace fastadapt {

// The instruction set whose kernels run. Detected once; the tests choose others.
enum class Target { portable, avx2, avx512 };

Target target();
const char* name(Target);
// False if the name is unknown or the processor can't run it.
bool set_target(const char* name);

}  // namespace fastadapt
