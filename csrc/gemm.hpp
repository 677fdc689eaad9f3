// fp32 matrix product on one core, with any strides, in portable vector code.
//
// A row's bits depend on its own values and the weight's shape alone: each element is one chain of
// multiply-adds over k in blocks of kDepth, at any number of rows. Into::kChain accumulates in index
// order starting from the present value, so splitting k over several calls gives identical bits.
// torch's own product (MKL) guarantees neither for few rows, and uses half the vector width on an
// AVX-512 CPU that is not Intel's.

#pragma once

#include <algorithm>
#include <vector>

#include "vector.hpp"

namespace fastsafe::cpu {

struct Matrix {
  const float* data;
  Index rows, columns, row_stride, column_stride;  // strides in elements
};

struct Term {  // x[M, K] w[N, K]^T
  Matrix x, w;
};

constexpr Index kWidth = 2 * kLanes;  // columns of a panel
constexpr Index kDepth = 128;         // depth of a panel, and products per sum

enum class Into { kNew, kSum, kChain };  // y = sum, y = y + sum, y = y + first + second + ...

// y[R, 32] of x[R, depth] panel[depth, 32]; all sums stay in registers
template <class Vec, int R>
FASTSAFE_INLINE void tile(const float* x, Index row, Index column, const float* panel, Index depth,
                          float* y, Index y_row, Into into) {
  Vec sums[R][2] = {};
  if (into == Into::kChain)
    for (int i = 0; i < R; ++i)
      for (int j = 0; j < 2; ++j) sums[i][j] = load<Vec>(y + i * y_row + j * kLanes);
  for (Index k = 0; k < depth; ++k) {
    const Vec left = load<Vec>(panel + k * kWidth), right = load<Vec>(panel + k * kWidth + kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const float a = x[i * row + k * column];
      sums[i][0] += a * left;
      sums[i][1] += a * right;
    }
  }
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < 2; ++j) {
      float* to = y + i * y_row + j * kLanes;
      store(to, into == Into::kSum ? load<Vec>(to) + sums[i][j] : sums[i][j]);
    }
}

template <class Vec, int R>
FASTSAFE_INLINE void last_rows(Index rows, const float* x, Index row, Index column,
                               const float* panel, Index depth, float* y, Index y_row, Into into) {
  if constexpr (R > 0) {
    if (rows == R)
      tile<Vec, R>(x, row, column, panel, depth, y, y_row, into);
    else
      last_rows<Vec, R - 1>(rows, x, row, column, panel, depth, y, y_row, into);
  }
}

// what fits in a register, of which a square block is transposed; float: nothing
template <class Vec>
struct Transposed {
  using Type = float;
};
template <>
struct Transposed<Sixteen> {
  using Type = Sixteen;
};
template <>
struct Transposed<Two<Eight>> {
  using Type = Eight;
};

// asks for a block of w, which may be in memory only, while the one before it is computed
FASTSAFE_INLINE void fetch_block(const Matrix& w, Index n, Index columns, Index k0, Index depth) {
  if (w.column_stride != 1) return;
  for (Index j = 0; j < columns; ++j) {
    const float* from = w.data + (n + j) * w.row_stride + k0;
    for (Index k = 0; k < depth; k += kLanes) __builtin_prefetch(from + k, 0, 2);
  }
}

// panel[k, j] = w[n + j, k0 + k], zero beyond the last row of w
template <class Vec>
FASTSAFE_INLINE void pack(const Matrix& w, Index n, Index columns, Index k0, Index depth,
                          float* panel) {
  const float* from = w.data + n * w.row_stride + k0 * w.column_stride;
  if (w.row_stride == 1 && columns == kWidth) {
    for (Index k = 0; k < depth; ++k)
      std::memcpy(panel + k * kWidth, from + k * w.column_stride, kWidth * sizeof(float));
    return;
  }
  if (columns < kWidth) std::memset(panel, 0, depth * kWidth * sizeof(float));
  using Block = typename Transposed<Vec>::Type;
  constexpr Index size = sizeof(Block) / sizeof(float);
  for (Index block = 0; block < depth; block += size) {
    const Index end = std::min(block + size, depth);
    Index first = 0;
    if constexpr (size > 1)
      if (w.column_stride == 1 && end - block == size)
        for (; first + size <= columns; first += size) {
          Block rows[size];
#pragma GCC unroll 16
          for (Index j = 0; j < size; ++j)
            rows[j] = load<Block>(from + (first + j) * w.row_stride + block);
          transpose(rows);
#pragma GCC unroll 16
          for (Index k = 0; k < size; ++k) store(panel + (block + k) * kWidth + first, rows[k]);
        }
    for (Index j = first; j < columns; ++j)
      for (Index k = block; k < end; ++k)
        panel[k * kWidth + j] = from[j * w.row_stride + k * w.column_stride];
  }
}

FASTSAFE_INLINE float* aligned(std::vector<float>& buffer, Index size) {
  if (buffer.size() < static_cast<std::size_t>(size + kLanes)) buffer.resize(size + kLanes);
  return reinterpret_cast<float*>((reinterpret_cast<std::uintptr_t>(buffer.data()) + 63) &
                                  ~std::uintptr_t{63});
}

// y[M, N] = sum over terms of x[M, K] w[N, K]^T. Set::rows by 32 elements of y are in registers at a
// time; all terms of a panel follow one another while its part of y is in cache. `roomy` says that y
// has columns up to a multiple of 32, which may be overwritten.
template <class Set>
FASTSAFE_INLINE void gemm(float* y, Index y_row, Into into, const Term* terms, int count,
                          bool roomy = false) {
  using Vec = typename Set::Vec;
  constexpr int R = Set::rows;
  static thread_local std::vector<float> buffer;
  const Index rows = terms[0].x.rows, width = terms[0].w.rows;
  float* panel = aligned(buffer, kDepth * kWidth + rows * kWidth);
  float* edge = panel + kDepth * kWidth;
  for (Index n = 0; n < width; n += kWidth) {
    const Index columns = std::min(kWidth, width - n);
    const bool whole = roomy || columns == kWidth;
    float* out = whole ? y + n : edge;
    const Index out_row = whole ? y_row : kWidth;
    if (!whole && into != Into::kNew)
      for (Index m = 0; m < rows; ++m)
        std::memcpy(edge + m * kWidth, y + m * y_row + n, columns * sizeof(float));
    Into next = into;
    for (int term = 0; term < count; ++term) {
      const Matrix &x = terms[term].x, &w = terms[term].w;
      for (Index k = 0; k < x.columns; k += kDepth) {
        const Index depth = std::min(kDepth, x.columns - k);
        if (k + depth < x.columns)
          fetch_block(w, n, columns, k + depth, std::min(kDepth, x.columns - k - depth));
        else if (n + kWidth < width)
          fetch_block(w, n + kWidth, std::min(kWidth, width - n - kWidth), 0, std::min(kDepth, x.columns));
        pack<Vec>(w, n, columns, k, depth, panel);
        const float* from = x.data + k * x.column_stride;
        Index m = 0;
        for (; m + R <= rows; m += R)
          tile<Vec, R>(from + m * x.row_stride, x.row_stride, x.column_stride, panel, depth,
                  out + m * out_row, out_row, next);
        last_rows<Vec, R - 1>(rows - m, from + m * x.row_stride, x.row_stride, x.column_stride, panel,
                         depth, out + m * out_row, out_row, next);
        if (next == Into::kNew) next = Into::kSum;
      }
    }
    if (!whole)
      for (Index m = 0; m < rows; ++m)
        std::memcpy(y + m * y_row + n, edge + m * kWidth, columns * sizeof(float));
  }
}

}  // namespace fastsafe::cpu
