// Vectors of 16 floats, and how a function is compiled for several instruction sets.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#define FASTSAFE_INLINE inline __attribute__((always_inline))

// Bodies are compiled once per instruction set, and the set is chosen at the first call.
#if defined(__x86_64__)
#define FASTSAFE_AVX512 \
  __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,prefer-vector-width=512")))
#define FASTSAFE_AVX2 __attribute__((target("avx2,fma")))
#define FASTSAFE_OP(name, parameters, arguments)                                             \
  FASTSAFE_AVX512 static void name##_avx512 parameters { name##_body<Avx512> arguments; }    \
  FASTSAFE_AVX2 static void name##_avx2 parameters { name##_body<Avx2> arguments; }          \
  static void name##_baseline parameters { name##_body<Baseline> arguments; }                \
  void name parameters {                                                                     \
    (level() == 2 ? name##_avx512 : level() == 1 ? name##_avx2 : name##_baseline) arguments; \
  }
#else
#define FASTSAFE_OP(name, parameters, arguments) \
  void name parameters { name##_body<Baseline> arguments; }
#endif

namespace fastsafe::cpu {

using Index = std::int64_t;
constexpr Index kLanes = 16;

typedef float Four __attribute__((vector_size(16)));
typedef float Eight __attribute__((vector_size(32)));
typedef float Sixteen __attribute__((vector_size(64)));

// Vectors wider than a register. A compiler may keep such a vector in memory and compute it lane by
// lane (GCC 12 does, at a hundredth of the speed), so here it is a pair of half the width.
// In a sum of two products the compiler fuses the first one; C++ leaves the order of operands open,
// so code that depends on it computes the first product in a statement of its own.
template <class Half>
struct Two {
  Half low, high;
};

// For each instruction set: its vector of 16 floats, and the rows of a product that fit in registers
struct Avx512 {
  using Vec = Sixteen;
  static constexpr int rows = 12;
};
struct Avx2 {
  using Vec = Two<Eight>;
  static constexpr int rows = 3;
};
struct Baseline {
  using Vec = Two<Two<Four>>;
  static constexpr int rows = 2;
};

template <class Vec>
constexpr bool kIsTwo = false;
template <class Half>
constexpr bool kIsTwo<Two<Half>> = true;

#define FASTSAFE_OPERATOR(op)                                           \
  template <class Half>                                                 \
  FASTSAFE_INLINE Two<Half> operator op(Two<Half> a, Two<Half> b) {     \
    return {a.low op b.low, a.high op b.high};                          \
  }                                                                     \
  template <class Half>                                                 \
  FASTSAFE_INLINE Two<Half> operator op(Two<Half> a, float b) {         \
    return {a.low op b, a.high op b};                                   \
  }                                                                     \
  template <class Half>                                                 \
  FASTSAFE_INLINE Two<Half> operator op(float a, Two<Half> b) {         \
    return {a op b.low, a op b.high};                                   \
  }                                                                     \
  template <class Half, class Other>                                    \
  FASTSAFE_INLINE Two<Half>& operator op##=(Two<Half>& a, Other b) {    \
    return a = a op b;                                                  \
  }
FASTSAFE_OPERATOR(+)
FASTSAFE_OPERATOR(-)
FASTSAFE_OPERATOR(*)
FASTSAFE_OPERATOR(/)

template <class Half>
FASTSAFE_INLINE Two<Half> operator-(Two<Half> a) {
  return {-a.low, -a.high};
}

// 2: AVX-512, 1: AVX2 with FMA, 0: baseline
int level();

template <class Vec>
FASTSAFE_INLINE Vec load(const float* p) {
  if constexpr (kIsTwo<Vec>) {
    using Half = decltype(Vec::low);
    return {load<Half>(p), load<Half>(p + sizeof(Half) / sizeof(float))};
  } else {
    Vec v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
}

template <class Vec>
FASTSAFE_INLINE void store(float* p, Vec v) {
  if constexpr (kIsTwo<Vec>) {
    store(p, v.low);
    store(p + sizeof(v.low) / sizeof(float), v.high);
  } else {
    std::memcpy(p, &v, sizeof(v));
  }
}

// loads the first `count` of 16 floats, and zeros
template <class Vec>
FASTSAFE_INLINE Vec get(const float* p, Index count) {
  if (count >= kLanes) return load<Vec>(p);
  float rest[kLanes] = {};
  std::memcpy(rest, p, count * sizeof(float));
  return load<Vec>(rest);
}

template <class Vec>
FASTSAFE_INLINE void put(float* p, Vec v, Index count) {
  if (count >= kLanes) return store(p, v);
  float rest[kLanes];
  store(rest, v);
  std::memcpy(p, rest, count * sizeof(float));
}

template <class Vec>
FASTSAFE_INLINE Vec larger(Vec a, Vec b) {
  if constexpr (kIsTwo<Vec>)
    return {larger(a.low, b.low), larger(a.high, b.high)};
  else
    return a > b ? a : b;
}

template <class Vec>
FASTSAFE_INLINE Vec smaller(Vec a, Vec b) {
  if constexpr (kIsTwo<Vec>)
    return {smaller(a.low, b.low), smaller(a.high, b.high)};
  else
    return a < b ? a : b;
}

constexpr float kLane[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// 1 if low <= at + lane < high, else 0; by clamping, as GCC splits comparison masks into lanes
template <class Vec>
FASTSAFE_INLINE Vec within(Index low, Index high, Index at) {
  const Vec lane = load<Vec>(kLane), one = Vec{} + 1.0f;
  const Vec after = lane + static_cast<float>(at - low + 1);
  const Vec before = static_cast<float>(high - at) - lane;
  return smaller(larger(after, Vec{}), one) * smaller(larger(before, Vec{}), one);
}

FASTSAFE_INLINE Two<Eight> halves(Sixteen v) {
  return {__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7),
          __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15)};
}
FASTSAFE_INLINE Two<Four> halves(Eight v) {
  return {__builtin_shufflevector(v, v, 0, 1, 2, 3), __builtin_shufflevector(v, v, 4, 5, 6, 7)};
}
template <class Half>
FASTSAFE_INLINE Two<Half> halves(Two<Half> v) {
  return v;
}

// adds halves until one value is left: the order does not depend on the width of a register
FASTSAFE_INLINE float sum(Four v) { return (v[0] + v[2]) + (v[1] + v[3]); }
template <class Vec>
FASTSAFE_INLINE float sum(Vec v) {
  const auto both = halves(v);
  return sum(both.low + both.high);
}

FASTSAFE_INLINE float largest(Four v) {
  return std::max(std::max(v[0], v[1]), std::max(v[2], v[3]));
}
template <class Vec>
FASTSAFE_INLINE float largest(Vec v) {
  const auto both = halves(v);
  return largest(larger(both.low, both.high));
}

// rows[i][j] becomes rows[j][i], by four perfect shuffles of the two halves
FASTSAFE_INLINE void transpose(Sixteen* rows) {
#pragma GCC unroll 4
  for (int round = 0; round < 4; ++round) {
    Sixteen next[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      const Sixteen a = rows[i], b = rows[i + kLanes / 2];
      next[2 * i] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      next[2 * i + 1] =
          __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

FASTSAFE_INLINE void transpose(Eight* rows) {
  Eight pairs[8], fours[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = __builtin_shufflevector(rows[i], rows[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    pairs[i + 1] = __builtin_shufflevector(rows[i], rows[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const Eight a = pairs[i + j], b = pairs[i + j + 2];
      fours[i + 2 * j] = __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13);
      fours[i + 2 * j + 1] = __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
    }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    rows[i] = __builtin_shufflevector(fours[i], fours[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    rows[i + 4] = __builtin_shufflevector(fours[i], fours[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

// 2^n of whole numbers
template <class Vec>
FASTSAFE_INLINE Vec power_of_two(Vec n) {
  if constexpr (kIsTwo<Vec>) {
    return {power_of_two(n.low), power_of_two(n.high)};
  } else {
    using Whole = decltype(n > n);
    const Whole bits = (__builtin_convertvector(n, Whole) + 127) << 23;
    return reinterpret_cast<Vec>(bits);
  }
}

// e^x to 2 units in the last place: 2^n by the exponent bits, a polynomial for the rest
template <class Vec>
FASTSAFE_INLINE Vec exponential(Vec x) {
  const Vec half = Vec{} + 12582912.0f;
  x = smaller(Vec{} + 88.0f, larger(Vec{} - 86.0f, x));
  const Vec n = (x * 1.44269504f + half) - half;
  const Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vec p = Vec{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * power_of_two(n);
}

template <class Vec>
FASTSAFE_INLINE Vec hyperbolic_tangent(Vec x) {
  return 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f);
}

}  // namespace fastsafe::cpu
