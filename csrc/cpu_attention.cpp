#include <cmath>

#include "softmax.hpp"

// Scores are products of 64 queries with the keys that they see, computed by the tiles of gemm.hpp:
// attention runs at the rate of a matrix product over short and long sequences alike.

namespace fastsafe::cpu {

namespace {

constexpr Index kQueries = 64;

struct Block {  // queries [begin, end) of a sequence see keys [first, end)
  Index begin, end, first;
  Index queries() const { return end - begin; }
  Index keys() const { return end - first; }
};

FASTSAFE_INLINE Block block_at(Index begin, Index length, Index window) {
  return {begin, std::min(begin + kQueries, length),
          window ? std::max<Index>(0, begin - window + 1) : 0};
}

// scaled and capped scores of the keys that query i of the block sees: [low, high)
FASTSAFE_INLINE void visible(const Block& b, Index i, Index window, Index* low, Index* high) {
  const Index at = b.begin + i;
  *low = (window ? std::max<Index>(0, at - window + 1) : 0) - b.first;
  *high = at + 1 - b.first;
}

FASTSAFE_INLINE Matrix rows_of(const float* data, Index first, Index count, Index stride,
                               Index columns) {
  return {data + first * stride, count, columns, stride, 1};
}

FASTSAFE_INLINE Matrix transposed(const Matrix& m) {
  return {m.data, m.columns, m.rows, m.column_stride, m.row_stride};
}

// y = (or +=) a b, where b is not transposed
template <class Set>
FASTSAFE_INLINE void multiply(float* y, Index y_row, bool accumulate, const Matrix& a,
                              const Matrix& b, bool roomy = false) {
  const Term term = {a, transposed(b)};
  gemm<Set>(y, y_row, accumulate ? Into::kSum : Into::kNew, &term, 1, roomy);
}

FASTSAFE_INLINE Index padded(Index count) { return (count + kWidth - 1) / kWidth * kWidth; }

template <class Set>
FASTSAFE_INLINE void attention_body(float* out, Scale* scales, const float* q, const float* k,
                                    const float* v, const Attention& a) {
  using Vec = typename Set::Vec;
  static thread_local std::vector<float> buffer;
  const Index group = a.heads / a.kv_heads, out_row = a.heads * a.dim;
  for (Index s = 0; s < a.sequences; ++s) {
    const Index start = a.starts[s], length = a.starts[s + 1] - start;
    for (Index begin = 0; begin < length; begin += kQueries) {
      const Block b = block_at(begin, length, a.window);
      const Index columns = b.keys(), room = padded(columns);
      float* scores = aligned(buffer, kQueries * room);
      for (Index head = 0; head < a.heads; ++head) {
        const Index kv = head / group * a.dim;
        const Matrix queries =
            rows_of(q + head * a.dim, start + begin, b.queries(), a.q_row, a.dim);
        const Matrix keys = rows_of(k + kv, start + b.first, columns, a.kv_row, a.dim);
        const Matrix values = rows_of(v + kv, start + b.first, columns, a.kv_row, a.dim);
        multiply<Set>(scores, room, false, queries, transposed(keys), true);
        for (Index i = 0; i < b.queries(); ++i) {
          Index low, high;
          visible(b, i, a.window, &low, &high);
          const Scale found = softmax<Vec>(scores + i * room, low, high, room, a.scale, a.cap);
          if (scales) scales[(start + begin + i) * a.heads + head] = found;
        }
        multiply<Set>(out + (start + begin) * out_row + head * a.dim, out_row, false,
                    {scores, b.queries(), columns, room, 1}, values);
      }
    }
  }
}

// with P = softmax of the capped scores and dP = dO V^T: dV = P^T dO,
// dS = P (dP - rowsum(P dP)), dQ = scale dS K, dK = scale dS^T Q; a cap's own slope is
// 1 - (score / cap)^2
template <class Set>
FASTSAFE_INLINE void attention_backward_body(float* dq, float* dk, float* dv, const float* d_out,
                                             const Scale* scales, const float* q,
                                             const float* k, const float* v, const Attention& a) {
  using Vec = typename Set::Vec;
  static thread_local std::vector<float> buffer;
  const Index group = a.heads / a.kv_heads, out_row = a.heads * a.dim;
  for (Index s = 0; s < a.sequences; ++s) {
    const Index start = a.starts[s], length = a.starts[s + 1] - start;
    for (Index row = start; row < start + length; ++row)
      for (float* d : {dk, dv})
        std::fill(d + row * a.kv_row, d + row * a.kv_row + a.kv_heads * a.dim, 0.0f);
    for (Index begin = 0; begin < length; begin += kQueries) {
      const Block b = block_at(begin, length, a.window);
      const Index columns = b.keys(), room = padded(columns), first = start + begin;
      float* p = aligned(buffer, (2 * kQueries + 1) * room);
      float* ds = p + kQueries * room;
      float* slopes_of_cap = ds + kQueries * room;
      for (Index head = 0; head < a.heads; ++head) {
        const Index at = head * a.dim, kv = head / group * a.dim;
        const Matrix queries = rows_of(q + at, first, b.queries(), a.q_row, a.dim);
        const Matrix upstream = rows_of(d_out + at, first, b.queries(), out_row, a.dim);
        const Matrix keys = rows_of(k + kv, start + b.first, columns, a.kv_row, a.dim);
        const Matrix values = rows_of(v + kv, start + b.first, columns, a.kv_row, a.dim);
        multiply<Set>(p, room, false, queries, transposed(keys), true);
        multiply<Set>(ds, room, false, upstream, transposed(values), true);
        for (Index i = 0; i < b.queries(); ++i) {
          Index low, high, begin_at, end_at;
          visible(b, i, a.window, &low, &high);
          const Scale scale = scales[(first + i) * a.heads + head];
          float *p_row = p + i * room, *ds_row = ds + i * room;
          for (float* row : {p_row, ds_row}) {
            begin_at = low, end_at = high;
            clear_around(row, room, &begin_at, &end_at);
          }
          Vec products = {};
          for (Index c = begin_at; c < end_at; c += kLanes) {
            const Vec z = capped(load<Vec>(p_row + c), a.scale, a.cap);
            const Vec weight =
                exponential(z - scale.top) * scale.inverse * within<Vec>(low, high, c);
            products += weight * load<Vec>(ds_row + c);
            store(p_row + c, weight);
            if (a.cap > 0) store(slopes_of_cap + c, 1.0f - z * z / (a.cap * a.cap));
          }
          const float along = sum(products);
          for (Index c = begin_at; c < end_at; c += kLanes) {
            Vec slope = load<Vec>(p_row + c) * (load<Vec>(ds_row + c) - along) * a.scale;
            if (a.cap > 0) slope *= load<Vec>(slopes_of_cap + c);
            store(ds_row + c, slope);
          }
        }
        const Matrix weights = {p, b.queries(), columns, room, 1};
        const Matrix slopes = {ds, b.queries(), columns, room, 1};
        multiply<Set>(dq + first * a.q_row + at, a.q_row, false, slopes, keys);
        multiply<Set>(dk + (start + b.first) * a.kv_row + kv, a.kv_row, true, transposed(slopes),
                    queries);
        multiply<Set>(dv + (start + b.first) * a.kv_row + kv, a.kv_row, true, transposed(weights),
                    upstream);
      }
    }
  }
}

}  // namespace

FASTSAFE_OP(attention,
            (float* out, Scale* scales, const float* q, const float* k, const float* v,
             const Attention& a),
            (out, scales, q, k, v, a))
FASTSAFE_OP(attention_backward,
            (float* dq, float* dk, float* dv, const float* d_out, const Scale* scales, const float* q, const float* k, const float* v,
             const Attention& a),
            (dq, dk, dv, d_out, scales, q, k, v, a))

}  // namespace fastsafe::cpu
