#include "softmax.hpp"

// In a page of keys the tokens of one feature are contiguous: a vector holds that feature of 16 keys.
// A query's sums run over features and keys in index order, each as one chain of additions: its bits
// depend neither on the queries computed beside it nor on how a prompt was cut into steps.

namespace fastsafe::cpu {

namespace {

FASTSAFE_INLINE Index whole(Index count) { return (count + kLanes - 1) / kLanes * kLanes; }

FASTSAFE_INLINE void write_token(float* keys, float* values, const float* k, const float* v,
                                 Index cache_slot, const Paged& p) {
  const Index page = cache_slot / kLanes, offset = cache_slot % kLanes, room = whole(p.dim);
  for (Index head = 0; head < p.kv_heads; ++head) {
    float* key = keys + page * p.key_page + head * p.dim * kLanes + offset;
    for (Index d = 0; d < p.dim; ++d) key[d * kLanes] = k[head * p.dim + d];
    std::memcpy(values + page * p.value_page + (head * kLanes + offset) * room, v + head * p.dim,
                p.dim * sizeof(float));
  }
}

struct Queries {  // consecutive (token, head) pairs of one row that share a key/value head
  const std::int32_t* pages;
  Index kv, position, token, first_head;  // position, token and head in the group of the first pair
  Index group;
  Index token_of(Index j) const { return (first_head + j) / group; }
  Index head_of(Index j) const { return kv * group + (first_head + j) % group; }
};

// Q queries over W pages at a time
template <class Vec, int Q, int W>
FASTSAFE_INLINE void attend(float* out, const float* keys, const float* values, const float* q,
                            const Queries& b, const Paged& p) {
  static thread_local std::vector<float> buffer;
  const Index end = b.position + b.token_of(Q - 1) + 1, room_of_value = whole(p.dim);
  const Index begin = p.window ? std::max<Index>(0, b.position - p.window + 1) : 0;
  const Index first = begin / kLanes, count = (end + kLanes - 1) / kLanes - first;
  const Index base = first * kLanes, room = (count + W - 1) / W * W * kLanes;
  float* x = aligned(buffer, Q * (whole(p.dim) + room));
  float* scores = x + Q * whole(p.dim);
  for (Index j = 0; j < Q; ++j)
    std::memcpy(x + j * p.dim, q + (b.token + b.token_of(j)) * p.q_row + b.head_of(j) * p.dim,
                p.dim * sizeof(float));
  for (Index at = 0; at < count; at += W) {
    const float* from[W];
    for (int w = 0; w < W; ++w) {  // past the end, the last page again: its scores are ignored
      const Index page = b.pages[first + std::min(at + w, count - 1)];
      from[w] = keys + page * p.key_page + b.kv * p.dim * kLanes;
    }
    Vec sums[Q][W] = {};
    for (Index d = 0; d < p.dim; ++d)
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) {
        const Vec key = load<Vec>(from[w] + d * kLanes);
#pragma GCC unroll 4
        for (int j = 0; j < Q; ++j) sums[j][w] += x[j * p.dim + d] * key;
      }
    for (int j = 0; j < Q; ++j)
      for (int w = 0; w < W; ++w) store(scores + j * room + (at + w) * kLanes, sums[j][w]);
  }
  for (Index j = 0; j < Q; ++j) {
    const Index position = b.position + b.token_of(j);
    const Index low = p.window ? std::max<Index>(0, position - p.window + 1) : 0;
    softmax<Vec>(scores + j * room, low - base, position + 1 - base, room, p.scale, p.cap);
  }
  for (Index c = 0; c < room_of_value; c += 2 * kLanes) {
    const bool pair = c + kLanes < room_of_value;
    Vec left[Q] = {}, right[Q] = {};
    const auto value_at = [&](Index t) {
      const float* page = values + b.pages[t / kLanes] * p.value_page;
      return page + (b.kv * kLanes + t % kLanes) * room_of_value + c;
    };
    for (Index t = begin, next; t <= b.position; t = next) {
      next = std::min(b.position + 1, (t / kLanes + 1) * kLanes);  // to the end of the page
      const float* value = value_at(t);
      const float* weights = scores + t - base;
      for (Index i = 0; i < next - t; ++i, value += room_of_value) {
        const Vec l = load<Vec>(value), r = pair ? load<Vec>(value + kLanes) : Vec{};
#pragma GCC unroll 4
        for (int j = 0; j < Q; ++j) {
          left[j] += weights[j * room + i] * l;
          right[j] += weights[j * room + i] * r;
        }
      }
    }
    // keys after this query's token belong to later queries alone: they may be NaN, and 0 * NaN is NaN
    for (Index t = b.position + 1; t < end; ++t) {
      const float* value = value_at(t);
#pragma GCC unroll 4
      for (int j = 0; j < Q; ++j)
        if (t <= b.position + b.token_of(j)) {
          const float weight = scores[j * room + t - base];
          left[j] += weight * load<Vec>(value);
          if (pair) right[j] += weight * load<Vec>(value + kLanes);
        }
    }
    for (Index j = 0; j < Q; ++j) {
      float* to = out + ((b.token + b.token_of(j)) * p.heads + b.head_of(j)) * p.dim + c;
      put(to, left[j], p.dim - c);
      if (pair) put(to + kLanes, right[j], p.dim - c - kLanes);
    }
  }
}

// Prefetching a longer context would evict its first lines from the CPU's cache before use.
constexpr Index kFetched = 256;

// the pages of a decoding row are rarely in cache, and too scattered for the hardware prefetcher
FASTSAFE_INLINE void fetch(const float* keys, const float* values, Index row, Index kv,
                           const Paged& p) {
  const Index end = p.positions[p.starts[row + 1] - 1] + 1, room = whole(p.dim);
  const Index begin = p.window ? std::max<Index>(0, p.positions[p.starts[row]] - p.window + 1) : 0;
  if (end - begin > kFetched) return;
  for (Index page = begin / kLanes; page * kLanes < end; ++page) {
    const Index id = p.table[row * p.width + page];
    const float* key = keys + id * p.key_page + kv * p.dim * kLanes;
    const float* value = values + id * p.value_page + kv * kLanes * room;
    for (Index i = 0; i < p.dim; ++i) __builtin_prefetch(key + i * kLanes);
    const Index tokens = std::min(kLanes, end - page * kLanes);
    for (Index i = 0; i < tokens * room; i += kLanes) __builtin_prefetch(value + i);
  }
}

struct Item {  // some tokens of a row and one key/value head: their attention
  Index row, kv, begin, end;
};

// Tokens of an item: enough to keep the keys in cache, few enough that a prompt occupies all threads.
constexpr Index kItemTokens = 32;

std::vector<Item> items_of(const Paged& p) {
  std::vector<Item> items;
  for (Index row = 0; row < p.rows; ++row)
    for (Index kv = 0; kv < p.kv_heads; ++kv)
      for (Index begin = p.starts[row]; begin < p.starts[row + 1]; begin += kItemTokens)
        items.push_back({row, kv, begin, std::min(begin + kItemTokens, p.starts[row + 1])});
  return items;
}

template <class Set>
FASTSAFE_INLINE void attend_items_body(float* out, const float* keys, const float* values,
                                       const float* q, const Paged& p, const Item* items,
                                       Index count) {
  using Vec = typename Set::Vec;
  constexpr int W = Set::rows >= 12 ? 4 : 1;  // pages whose sums fit in registers
  const Index group = p.heads / p.kv_heads;
  for (Index n = 0; n < count; ++n) {
    const auto& [row, kv, begin, end] = items[n];
    if (n + 1 < count) fetch(keys, values, items[n + 1].row, items[n + 1].kv, p);
    const Index pairs = (end - begin) * group;
    for (Index i = 0; i < pairs;) {
      const Index token = begin + i / group, left = pairs - i;
      const Queries b = {p.table + row * p.width, kv,        p.positions[token], token,
                         i % group,                 group};
      if (left >= 4) {
        attend<Vec, 4, W>(out, keys, values, q, b, p);
        i += 4;
      } else if (left >= 2) {
        attend<Vec, 2, W>(out, keys, values, q, b, p);
        i += 2;
      } else {
        attend<Vec, 1, W>(out, keys, values, q, b, p);
        i += 1;
      }
    }
  }
}

FASTSAFE_OP(attend_items,
            (float* out, const float* keys, const float* values, const float* q, const Paged& p,
             const Item* items, Index count),
            (out, keys, values, q, p, items, count))

}  // namespace

void paged_attention(float* out, float* keys, float* values, const float* q, const float* k,
                     const float* v, const Paged& p, Team& team) {
  for (Index t = 0; t < p.starts[p.rows]; ++t)
    write_token(keys, values, k + t * p.kv_row, v + t * p.kv_row, p.cache_slots[t], p);
  const std::vector<Item> items = items_of(p);
  const Index count = static_cast<Index>(items.size());
  // contiguous items, whose pages are fetched ahead; several parts per thread, as they differ in size
  const Index parts = team.size() < 2 ? 1 : std::min<Index>(count, 8 * team.size());
  team.run(parts, [&](Index part) {
    const Index first = count * part / parts, last = count * (part + 1) / parts;
    attend_items(out, keys, values, q, p, items.data() + first, last - first);
  });
}

}  // namespace fastsafe::cpu
