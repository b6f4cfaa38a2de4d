// The activations of adapters and their derivatives.
#pragma once
#include "hardware.cuh"

namespace fastadapt {

constexpr int kIdentity = 5;
// The codes of fastadapt.ops.bottleneck.ACTIVATIONS.  NaN stays NaN: a comparison with it is false.
__device__ __forceinline__ float activate(int activation, float z) {
  switch (activation) {
    case 0: return z < 0.f ? 0.f : z;
    case 1: return 0.5f * z * (1.f + erff(z * 0.70710678f));
    case 2: return 0.5f * z * (1.f + tanhf(0.79788456f * (z + 0.044715f * z * z * z)));
    case 3: return z / (1.f + expf(-z));
    case 4: return tanhf(z);
    default: return z;
  }
}

__device__ __forceinline__ float activate_gradient(int activation, float z) {
  switch (activation) {
    case 0: return z <= 0.f ? 0.f : 1.f;
    case 1: return 0.5f * (1.f + erff(z * 0.70710678f)) + z * 0.39894228f * expf(-0.5f * z * z);
    case 2: {
      const float t = tanhf(0.79788456f * (z + 0.044715f * z * z * z));
      return 0.5f * (1.f + t) + 0.5f * z * (1.f - t * t) * 0.79788456f * (1.f + 0.134145f * z * z);
    }
    case 3: {
      const float s = 1.f / (1.f + expf(-z));
      return s * (1.f + z * (1.f - s));
    }
    case 4: {
      const float t = tanhf(z);
      return 1.f - t * t;
    }
    default: return 1.f;
  }
}

}  // namespace fastadapt
