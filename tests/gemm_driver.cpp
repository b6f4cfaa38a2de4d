// Checks of csrc/cpu/gemm.h, narrow.h and simd.h without PyTorch, and the rate of the micro-kernel. The instruction set is chosen by
// macros: FA_LANES, and USE_AVX512 or USE_AVX2. Prints one line a failure, or with the argument "rate" GFLOP/s on one core.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../csrc/cpu/types.h"
#if defined(USE_AVX512)
#include <immintrin.h>
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#define FA_SET_tested 512
#elif defined(USE_AVX2)
#include <immintrin.h>
#pragma GCC target("avx2,fma,f16c")
#define FA_SET_tested 2
#endif
#define FA_TARGET tested
#include "../csrc/cpu/narrow.h"

using namespace fastadapt;
namespace t = fastadapt::tested;

static int failures = 0;

static void expect(bool good, const char* what, int64_t a = 0, int64_t b = 0, int64_t c = 0, double error = 0) {
  if (good) return;
  ++failures;
  std::printf("%s: sizes %ld %ld %ld, error %g\n", what, static_cast<long>(a), static_cast<long>(b), static_cast<long>(c), error);
}

template <class C>
struct Store {
  C* y;
  int64_t ld, columns;

  template <int MR, int NV>
  FA_FORCED void operator()(int64_t i, int64_t j, t::Vec<C> (&acc)[MR][NV]) const {
    for (int r = 0; r < MR; ++r)
      for (int v = 0; v < NV; ++v) {
        const int64_t c = j + v * t::lanes<C>, count = columns - c;
        if (count > 0) t::store_some<C>(y + (i + r) * ld + c, acc[r][v], least(count, t::lanes<C>));
      }
  }
};

// A matrix product in double, and how far a result may be from it: a rounding for each term.
template <class C>
static bool near(double got, double want, double magnitude, int64_t terms) {
  return std::abs(got - want) <= (terms + 4) * (sizeof(C) == 4 ? 6e-8 : 1.2e-16) * (magnitude + 1e-30);
}

template <class C>
static void check_products(int64_t m, int64_t k, int64_t n, bool k_contiguous) {
  std::mt19937 random(static_cast<unsigned>(m * 10007 + k * 101 + n));
  std::uniform_real_distribution<double> uniform(-1, 1);
  const int64_t lda = k + 3, ldc = t::padded<C>(n);
  std::vector<C> a(m * lda), b(k * n), k_factor(k), n_factor(n), start(ldc + t::panel_width<C>, 0), c(m * ldc), y(m * n + 1, 7), g(k * ldc);
  std::vector<C> packed(t::packed_size<C>(k, n) + 1);
  for (auto* v : {&a, &b, &k_factor, &n_factor})
    for (C& e : *v) e = static_cast<C>(uniform(random));
  for (int64_t j = 0; j < n; ++j) start[j] = static_cast<C>(uniform(random));
  const int64_t sk = k_contiguous ? 1 : n, sn = k_contiguous ? k : 1;
  const t::Source<C, C> source = {b.data(), sk, sn, k, n, k_factor.data(), n_factor.data()};
  const int64_t units = t::pack_units<C>(k, n);
  t::pack(source, packed.data(), 0, units / 2);
  t::pack(source, packed.data(), units / 2, units);
  t::gemm(m, k, n, a.data(), lda, packed.data(), start.data(), false, c.data(), ldc);
  t::gemm_epilogue(m, k, n, a.data(), lda, packed.data(), start.data(), Store<C>{y.data(), n, n});
  const bool narrow = t::is_narrow(n);
  std::vector<C> columns(narrow ? t::narrow_size<C>(k) : 0), d(m * ldc, 7);
  if (narrow) {
    t::pack_narrow(source, columns.data());
    t::gemm_narrow(m, k, a.data(), lda, columns.data(), start.data(), d.data(), ldc);
  }
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double want = start[j], size = std::abs(want);
      for (int64_t p = 0; p < k; ++p) {
        const double term = double(a[i * lda + p]) * b[p * sk + j * sn] * k_factor[p] * n_factor[j];
        want += term;
        size += std::abs(term);
      }
      expect(near<C>(c[i * ldc + j], want, size, k), "gemm", m, k, n, c[i * ldc + j] - want);
      expect(near<C>(y[i * n + j], want, size, k), "gemm_epilogue", m, k, n, y[i * n + j] - want);
      if (narrow) expect(near<C>(d[i * ldc + j], want, size, k), "gemm_narrow", m, k, n, d[i * ldc + j] - want);
    }
  expect(y[m * n] == 7, "gemm_epilogue wrote past the end", m, k, n);
  for (bool more : {false, true}) t::gemm_transposed(k, m, n, a.data(), lda, c.data(), ldc, more, g.data(), ldc);
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double want = 0, size = 0;
      for (int64_t p = 0; p < m; ++p) {
        want += 2 * double(a[p * lda + i]) * c[p * ldc + j];
        size += 2 * std::abs(double(a[p * lda + i]) * c[p * ldc + j]);
      }
      expect(near<C>(g[i * ldc + j], want, size, m), "gemm_transposed", m, k, n, g[i * ldc + j] - want);
    }
}

static void check_functions() {
  for (float x = -20; x < 20; x += 1.0f / 512) {
    const t::VF v = t::broadcast<float>(x);
    const auto ulp = [](float got, double want) { return std::abs(got - want) / (std::abs(want) * 6e-8 + 1e-45); };
    expect(ulp(t::exp(v)[0], std::exp(double(x))) <= 4, "exp", 0, 0, 0, x);
    expect(ulp(t::tanh(v)[0], std::tanh(double(x))) <= 4, "tanh", 0, 0, 0, x);
    expect(ulp(t::erf(v)[0], std::erf(double(x))) <= 4, "erf", 0, 0, 0, x);
  }
  const auto at = [](t::VF (*f)(t::VF), float x) { return f(t::broadcast<float>(x))[0]; };
  const auto e = [](t::VF v) { return t::exp(v); };
  const auto h = [](t::VF v) { return t::tanh(v); };
  const auto r = [](t::VF v) { return t::erf(v); };
  expect(at(e, INFINITY) == INFINITY && at(e, -INFINITY) == 0 && std::isnan(at(e, NAN)), "exp of special values");
  expect(at(h, INFINITY) == 1 && at(h, -INFINITY) == -1 && std::isnan(at(h, NAN)), "tanh of special values");
  expect(at(r, INFINITY) == 1 && at(r, -INFINITY) == -1 && std::isnan(at(r, NAN)), "erf of special values");
}

// Every 16-bit value widens exactly and comes back; rounding goes to the nearest, ties to even.
template <class T>
static void check_conversions(const char* name, int mantissa, int least_exponent) {
  T in[t::lanes<float>] = {}, out[t::lanes<float>];
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    in[0].bits = static_cast<uint16_t>(bits);
    const t::VF v = t::load<float>(in);
    t::store(out, v);
    expect(std::isnan(v[0]) ? std::isnan(t::load<float>(out)[0]) : out[0].bits == bits, name, bits);
  }
  std::mt19937 random(1);
  std::uniform_real_distribution<float> exponent(static_cast<float>(least_exponent) - 20, 14);
  for (int i = 0; i < 200000; ++i) {
    const float x = std::exp2(exponent(random)) * (random() % 2 ? 1 : -1);
    t::store(out, t::broadcast<float>(x));
    const int scale = std::max(std::ilogb(x), least_exponent) - mantissa;
    expect(t::load<float>(out)[0] == std::ldexp(std::nearbyint(std::ldexp(double(x), -scale)), scale), name, 0, 0, 0, x);
  }
}

static double rate(int64_t m, int64_t k, int64_t n) {
  std::vector<float> a(m * k, 1), b(k * n, 1), packed(t::packed_size<float>(k, n) + 16), c(m * t::padded<float>(n) + 16);
  const auto align = [](std::vector<float>& v) { return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(v.data()) + 63) & ~uintptr_t{63}); };
  t::pack(t::Source<float, float>{b.data(), n, 1, k, n, nullptr, nullptr}, align(packed), 0, t::pack_units<float>(k, n));
  double best = 0;
  for (int i = 0; i < 200; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    t::gemm(m, k, n, a.data(), k, align(packed), static_cast<const float*>(nullptr), false, align(c), t::padded<float>(n));
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    best = std::max(best, 2.0 * m * k * n / seconds / 1e9);
  }
  return best;
}

int main(int argc, char**) {
  if (argc > 1) {
    std::printf("%.1f\n", rate(192, 768, 64));
    return 0;
  }
  for (int64_t m : {1, 2, 7, 13, 31, 50})
    for (int64_t k : {1, 5, 16, 33, 129, 300, 1100})
      for (int64_t n : {1, 4, 7, 8, 16, 17, 33, 48, 64, 100}) {
        check_products<float>(m, k, n, m % 2);
        check_products<double>(m, k, n, m % 2 == 0);
      }
  check_functions();
  check_conversions<Half>("float16", 10, -14);
  check_conversions<BFloat16>("bfloat16", 7, -126);
  return failures ? 1 : 0;
}
