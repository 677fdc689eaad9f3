// Softmax of one row of scores, for packed and for paged attention.

#pragma once

#include "cpu_ops.hpp"

namespace fastsafe::cpu {

constexpr float kMasked = 1e30f;  // subtracted from the scores of masked keys

template <class Vec>
FASTSAFE_INLINE Vec capped(Vec scores, float scale, float cap) {
  scores *= scale;
  return cap > 0 ? cap * hyperbolic_tangent(scores / cap) : scores;
}

// clears a row of `room` values outside [low, high), then rounds [low, high) out to whole vectors
FASTSAFE_INLINE void clear_around(float* row, Index room, Index* low, Index* high) {
  std::memset(row, 0, *low * sizeof(float));
  std::memset(row + *high, 0, (room - *high) * sizeof(float));
  *low = *low / kLanes * kLanes;
  *high = (*high + kLanes - 1) / kLanes * kLanes;
}

// softmax of one row in place over [low, high); zero elsewhere in [0, room), a multiple of 16
template <class Vec>
FASTSAFE_INLINE Scale softmax(float* row, Index low, Index high, Index room, float scale,
                              float cap) {
  Index begin = low, end = high;
  clear_around(row, room, &begin, &end);
  Vec tops = Vec{} - 2.0f * kMasked;
  for (Index c = begin; c < end; c += kLanes) {
    const Vec mask = (within<Vec>(low, high, c) - 1.0f) * kMasked;
    const Vec v = capped(load<Vec>(row + c), scale, cap) + mask;
    store(row + c, v);
    tops = larger(tops, v);
  }
  const float top = largest(tops);
  Vec sums = {};
  for (Index c = begin; c < end; c += kLanes) {
    const Vec v = exponential(load<Vec>(row + c) - top) * within<Vec>(low, high, c);
    store(row + c, v);
    sums += v;
  }
  const float inverse = 1.0f / sum(sums);
  for (Index c = begin; c < end; c += kLanes) store(row + c, load<Vec>(row + c) * inverse);
  return {top, inverse};
}

}  // namespace fastsafe::cpu
