#include "cpu_ops.hpp"

#include <atomic>
#include <cmath>

namespace fastsafe::cpu {

namespace {

int find_level() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
    return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

template <class Set>
FASTSAFE_INLINE void product_body(float* y, Index y_row, bool accumulate, const Term* terms,
                                 int count, const float* bias) {
  const Index rows = terms[0].x.rows, columns = terms[0].w.rows;
  if (bias)
    for (Index m = 0; m < rows; ++m) std::memcpy(y + m * y_row, bias, columns * sizeof(float));
  gemm<Set>(y, y_row, accumulate ? Into::kChain : bias ? Into::kSum : Into::kNew, terms, count);
}

template <class Set>
FASTSAFE_INLINE void norm_body(float* y, float* h, float* r, const float* x, const float* residual,
                               const float* w, Index rows, Index columns, float alpha, float eps,
                               bool one_plus) {
  using Vec = typename Set::Vec;
  const float shift = one_plus ? 1.0f : 0.0f;
  for (Index m = 0; m < rows; ++m, y += columns, x += columns) {
    Vec squares = {};
    for (Index c = 0; c < columns; c += kLanes) {
      const Index left = columns - c;
      Vec v = get<Vec>(x + c, left);
      if (residual) {
        v = get<Vec>(residual + m * columns + c, left) + alpha * v;
        put(h + m * columns + c, v, left);
      }
      squares += v * v;
    }
    const float scale = 1.0f / std::sqrt(sum(squares) / columns + eps);
    if (r) r[m] = scale;
    const float* from = residual ? h + m * columns : x;
    for (Index c = 0; c < columns; c += kLanes) {
      const Index left = columns - c;
      put(y + c, get<Vec>(from + c, left) * scale * (get<Vec>(w + c, left) + shift), left);
    }
  }
}

template <class Set>
FASTSAFE_INLINE void norm_backward_body(float* dx, const float* dy, const float* dh,
                                        const float* h, const float* r, const float* w, Index rows,
                                        Index columns, bool one_plus) {
  using Vec = typename Set::Vec;
  const float shift = one_plus ? 1.0f : 0.0f;
  for (Index m = 0; m < rows; ++m, dx += columns, dy += columns, h += columns) {
    Vec products = {};
    for (Index c = 0; c < columns; c += kLanes) {
      const Index left = columns - c;
      products += get<Vec>(dy + c, left) * (get<Vec>(w + c, left) + shift) * get<Vec>(h + c, left);
    }
    const float scale = r[m], along = sum(products) / columns * scale * scale;
    for (Index c = 0; c < columns; c += kLanes) {
      const Index left = columns - c;
      Vec d = get<Vec>(dy + c, left) * (get<Vec>(w + c, left) + shift);
      d -= get<Vec>(h + c, left) * along;
      d *= scale;
      if (dh) d += get<Vec>(dh + m * columns + c, left);
      put(dx + c, d, left);
    }
  }
}

constexpr float kGelu = 0.7978845608f, kCubic = 0.044715f;  // sqrt(2 / pi)

template <class Set>
FASTSAFE_INLINE void gated_body(float* y, const float* gate_up, Index rows, Index columns,
                                bool gelu) {
  using Vec = typename Set::Vec;
  for (Index m = 0; m < rows; ++m, y += columns, gate_up += 2 * columns)
    for (Index c = 0; c < columns; c += kLanes) {
      const Index left = columns - c;
      const Vec g = get<Vec>(gate_up + c, left), up = get<Vec>(gate_up + columns + c, left);
      const Vec active = gelu ? 0.5f * g * (1.0f + hyperbolic_tangent(kGelu * (g + kCubic * g * g * g)))
                              : g / (1.0f + exponential(-g));
      put(y + c, active * up, left);
    }
}

template <class Set>
FASTSAFE_INLINE void gated_backward_body(float* d_gate_up, const float* dy, const float* gate_up,
                                         Index rows, Index columns, bool gelu) {
  using Vec = typename Set::Vec;
  for (Index m = 0; m < rows; ++m, dy += columns, gate_up += 2 * columns, d_gate_up += 2 * columns)
    for (Index c = 0; c < columns; c += kLanes) {
      const Index left = columns - c;
      const Vec g = get<Vec>(gate_up + c, left), up = get<Vec>(gate_up + columns + c, left);
      const Vec d = get<Vec>(dy + c, left);
      Vec active, slope;
      if (gelu) {
        const Vec t = hyperbolic_tangent(kGelu * (g + kCubic * g * g * g));
        active = 0.5f * g * (1.0f + t);
        slope = 0.5f * (1.0f + t);
        slope += 0.5f * g * (1.0f - t * t) * kGelu * (1.0f + 3.0f * kCubic * g * g);
      } else {
        const Vec s = 1.0f / (1.0f + exponential(-g));
        active = g * s;
        slope = s * (1.0f + g * (1.0f - s));
      }
      put(d_gate_up + c, d * up * slope, left);
      put(d_gate_up + columns + c, d * active, left);
    }
}

template <class Set>
FASTSAFE_INLINE void rope_body(float* y, Index y_row, const float* x, Index x_row,
                               const float* cos, const float* sin, Index table_row, Index rows,
                               Index heads, Index dim, Index rotated, bool back) {
  using Vec = typename Set::Vec;
  const Index half = rotated / 2;
  const float sign = back ? -1.0f : 1.0f;
  for (Index m = 0; m < rows; ++m, cos += table_row, sin += table_row)
    for (Index head = 0; head < heads; ++head) {
      const float* from = x + m * x_row + head * dim;
      float* to = y + m * y_row + head * dim;
      for (Index c = 0; c < half; c += kLanes) {
        const Index left = half - c;
        const Vec a = get<Vec>(from + c, left), b = get<Vec>(from + half + c, left);
        Vec low = a * get<Vec>(cos + c, left), high = b * get<Vec>(cos + half + c, left);
        low += b * get<Vec>(sin + c, left) * sign;
        high += a * get<Vec>(sin + half + c, left) * sign;
        put(to + c, low, left);
        put(to + half + c, high, left);
      }
      if (to != from && rotated < dim)
        std::memcpy(to + rotated, from + rotated, (dim - rotated) * sizeof(float));
    }
}

FASTSAFE_OP(product,
            (float* y, Index y_row, bool accumulate, const Term* terms, int count,
             const float* bias),
            (y, y_row, accumulate, terms, count, bias))

constexpr const char* kSets[] = {"baseline", "avx2", "avx512"};

std::atomic<int>& chosen_level() {
  static std::atomic<int> chosen{find_level()};
  return chosen;
}

}  // namespace

int level() { return chosen_level().load(std::memory_order_relaxed); }

const char* instruction_set() { return kSets[level()]; }

bool use_instruction_set(const std::string& name) {
  for (int i = 0; i <= find_level(); ++i)
    if (name == kSets[i]) {
      chosen_level() = i;
      return true;
    }
  return false;
}

void linear(float* y, Index y_row, bool accumulate, const Term* terms, int count,
            const float* bias, Team& team) {
  const Index columns = terms[0].w.rows;
  const Index panels = (columns + kWidth - 1) / kWidth;
  const Index parts = std::min<Index>(team.size(), panels);
  if (parts < 2) return product(y, y_row, accumulate, terms, count, bias);
  // columns are independent, so their bits do not depend on the number of threads
  team.run(parts, [&](Index part) {
    const Index begin = panels * part / parts * kWidth;
    const Index end = std::min(columns, panels * (part + 1) / parts * kWidth);
    std::vector<Term> own(terms, terms + count);
    for (Term& term : own) {
      term.w.data += begin * term.w.row_stride;
      term.w.rows = end - begin;
    }
    product(y + begin, y_row, accumulate, own.data(), count, bias ? bias + begin : nullptr);
  });
}

FASTSAFE_OP(norm,
            (float* y, float* h, float* r, const float* x, const float* residual, const float* w,
             Index rows, Index columns, float alpha, float eps, bool one_plus),
            (y, h, r, x, residual, w, rows, columns, alpha, eps, one_plus))
FASTSAFE_OP(norm_backward,
            (float* dx, const float* dy, const float* dh, const float* h, const float* r,
             const float* w, Index rows, Index columns, bool one_plus),
            (dx, dy, dh, h, r, w, rows, columns, one_plus))
FASTSAFE_OP(gated, (float* y, const float* gate_up, Index rows, Index columns, bool gelu),
            (y, gate_up, rows, columns, gelu))
FASTSAFE_OP(gated_backward,
            (float* d_gate_up, const float* dy, const float* gate_up, Index rows, Index columns,
             bool gelu),
            (d_gate_up, dy, gate_up, rows, columns, gelu))
FASTSAFE_OP(rope,
            (float* y, Index y_row, const float* x, Index x_row, const float* cos,
             const float* sin, Index table_row, Index rows, Index heads, Index dim, Index rotated,
             bool back),
            (y, y_row, x, x_row, cos, sin, table_row, rows, heads, dim, rotated, back))

}  // namespace fastsafe::cpu
