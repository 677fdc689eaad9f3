// Vectors of 16 floats, and how a function is compiled for several instruction sets.

#pragma once

#include <cstdint>
#include <cstring>

#define FASTSAFE_INLINE inline __attribute__((always_inline))

// Bodies are compiled once per instruction set, with as many rows of a product in registers as
// each has room for, and the set is chosen at the first call.
#if defined(__x86_64__)
#define FASTSAFE_AVX512 \
  __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,prefer-vector-width=512")))
#define FASTSAFE_AVX2 __attribute__((target("avx2,fma")))
#define FASTSAFE_OP(name, parameters, arguments)                                          \
  FASTSAFE_AVX512 static void name##_avx512 parameters { name##_body<12> arguments; }     \
  FASTSAFE_AVX2 static void name##_avx2 parameters { name##_body<3> arguments; }          \
  static void name##_baseline parameters { name##_body<2> arguments; }                    \
  void name parameters {                                                                  \
    (level() == 2 ? name##_avx512 : level() == 1 ? name##_avx2 : name##_baseline) arguments; \
  }
#else
#define FASTSAFE_OP(name, parameters, arguments) \
  void name parameters { name##_body<3> arguments; }
#endif

namespace fastsafe::cpu {

using Index = std::int64_t;
// the compiler splits it where registers are narrower
typedef float Vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef std::int32_t Lanes __attribute__((vector_size(64)));
constexpr Index kLanes = 16;

// 2: AVX-512, 1: AVX2 with FMA, 0: what every CPU of this kind has
int level();

FASTSAFE_INLINE Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
FASTSAFE_INLINE void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }

FASTSAFE_INLINE Vec get(const float* p, Index count) {
  if (count >= kLanes) return load(p);
  Vec v = {};
  std::memcpy(&v, p, count * sizeof(float));
  return v;
}

FASTSAFE_INLINE void put(float* p, Vec v, Index count) {
  if (count >= kLanes)
    store(p, v);
  else
    std::memcpy(p, &v, count * sizeof(float));
}

FASTSAFE_INLINE Vec added(Vec a, Vec b) { return a + b; }
FASTSAFE_INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }
FASTSAFE_INLINE Vec smaller(Vec a, Vec b) { return a < b ? a : b; }

// 1 where low <= at + lane < high, else 0; by clamping, as GCC takes masks of comparisons apart
FASTSAFE_INLINE Vec within(Index low, Index high, Index at) {
  const Vec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, one = Vec{} + 1.0f;
  const Vec after = lane + static_cast<float>(at - low + 1);
  const Vec before = static_cast<float>(high - at) - lane;
  return smaller(larger(after, Vec{}), one) * smaller(larger(before, Vec{}), one);
}

#define FASTSAFE_FOLD(v, op)                                                                     \
  v = op(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)); \
  v = op(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 8, 9, 10, 11, 12, 13, 14, 15)); \
  v = op(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)); \
  v = op(v, __builtin_shufflevector(v, v, 1, 0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15))

FASTSAFE_INLINE float sum(Vec v) {
  FASTSAFE_FOLD(v, added);
  return v[0];
}

FASTSAFE_INLINE float largest(Vec v) {
  FASTSAFE_FOLD(v, larger);
  return v[0];
}

// rows[i][j] becomes rows[j][i]: four times the halves are interleaved like cards
FASTSAFE_INLINE void transpose(Vec* rows) {
#pragma GCC unroll 4
  for (int round = 0; round < 4; ++round) {
    Vec next[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      const Vec a = rows[i], b = rows[i + kLanes / 2];
      next[2 * i] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      next[2 * i + 1] =
          __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

// e^x to 2 units in the last place: 2^n by the exponent bits, a polynomial for the rest
FASTSAFE_INLINE Vec exponential(Vec x) {
  const Vec low = Vec{} - 86.0f, high = Vec{} + 88.0f, half = Vec{} + 12582912.0f;
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Vec n = (x * 1.44269504f + half) - half;
  const Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vec p = Vec{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Lanes exponent = (__builtin_convertvector(n, Lanes) + 127) << 23;
  return p * reinterpret_cast<Vec>(exponent);
}

FASTSAFE_INLINE Vec hyperbolic_tangent(Vec x) {
  return 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f);
}

}  // namespace fastsafe::cpu
