#include "decoder.hpp"

#include <algorithm>
#include <string>
#include <utility>

#include "reader.hpp"  // Error

namespace fastsafe::cpu {

namespace {

// Buffers of a step, all in memory at once; workspace_bytes() counts all but the last.
enum Buffer {
  kHidden,  // hidden: residual stream
  kNormed,  // hidden: its norm
  kWide,    // qkv, or gate and up
  kMixed,   // heads * dim: output of attention
  kOut,     // hidden: output of the o and down linears
  kGated,   // intermediate
  kShrunk,  // rank of an adapter
};

void gather(float* to, const float* from, const std::int64_t* index, Index count, Index columns) {
  for (Index i = 0; i < count; ++i)
    std::memcpy(to + i * columns, from + index[i] * columns, columns * sizeof(float));
}

void expect_below(const std::int64_t* values, Index count, Index end, const char* name) {
  for (Index i = 0; i < count; ++i)
    if (values[i] < 0 || values[i] >= end)
      throw Error("decoder: " + std::string(name) + " " + std::to_string(values[i]) +
                  " is not in [0, " + std::to_string(end) + ")");
}

constexpr Index kWorthSharing = 1 << 15;  // elements

// work(begin, count) over blocks of rows
template <class Work>
void by_rows(Team& team, Index rows, Index columns, const Work& work) {
  const Index parts = rows * columns < kWorthSharing ? 1 : std::min<Index>(rows, team.size());
  team.run(parts, [&](Index part) {
    const Index begin = rows * part / parts;
    work(begin, rows * (part + 1) / parts - begin);
  });
}

}  // namespace

Decoder::Decoder(const Sizes& sizes, std::vector<Layer> layers, const float* embedding,
                 const float* final_norm)
    : sizes_(sizes),
      layers_(std::move(layers)),
      embedding_(embedding),
      final_norm_(final_norm) {}

Index Decoder::workspace_bytes(Index hidden, Index intermediate, Index heads, Index kv_heads,
                               Index dim, Index tokens, Index itemsize) {
  const Index q = heads * dim, qkv = q + 2 * kv_heads * dim;
  // kWide and kGated are widest around the MLP; around attention, q is copied besides
  const Index widest = std::max(3 * intermediate, qkv + 2 * q);
  return tokens * itemsize * (3 * hidden + std::max(hidden, q) + widest);
}

float* Decoder::grow(int buffer, Index count) { return aligned(buffers_[buffer], count); }

void Decoder::multiply(float* y, const float* x, Index rows, std::size_t layer, Name name,
                       const Step& step, bool kept, Team& team) {
  const Linear& base = layers_[layer].linears[name];
  const Index in = base.in, out = base.out;
  const auto patch_of = [&](const Segment& segment) -> const Patch* {
    return segment.patches ? &(*segment.patches)[layer * kNames + name] : nullptr;
  };
  const auto weight_of = [&](const Segment& segment) {
    const Patch* patch = patch_of(segment);
    return patch && patch->weight ? patch->weight : base.weight;
  };
  const auto product = [&](Index begin, Index end, const float* weight) {
    const Term term = {{x + begin * in, end - begin, in, in, 1}, {weight, out, in, in, 1}};
    if (end > begin) linear(y + begin * out, out, false, &term, 1, base.bias, team);
  };
  Index begin = 0, end = 0;  // of consecutive segments with one weight
  const float* weight = nullptr;
  for (const Segment& segment : step.segments) {
    if (weight_of(segment) != weight) {
      product(begin, end, weight);
      begin = end;
      weight = weight_of(segment);
    }
    end = kept ? segment.kept_end : segment.end;
  }
  product(begin, rows, weight);
  updates_.clear();
  Index room = 0;
  begin = 0;
  for (const Segment& segment : step.segments) {
    end = kept ? segment.kept_end : segment.end;
    const Patch* patch = patch_of(segment);
    if (patch && patch->rank)
      for (; begin < end; begin += kUpdateRows) {
        updates_.push_back({patch, begin, std::min(begin + kUpdateRows, end), room});
        room += (updates_.back().end - begin) * patch->rank;
      }
    begin = end;
  }
  float* shrunk = room ? grow(kShrunk, room) : nullptr;
  team.run(static_cast<Index>(updates_.size()), [&](Index i) {
    const Update& u = updates_[i];
    add_update(y + u.begin * out, x + u.begin * in, u.end - u.begin, base, *u.patch, shrunk + u.room);
  });
}

void Decoder::add_update(float* y, const float* x, Index rows, const Linear& base, const Patch& patch,
                         float* shrunk) {
  Team alone(1);
  const Index rank = patch.rank;
  const Term down = {{x, rows, base.in, base.in, 1}, {patch.a, rank, base.in, base.in, 1}};
  linear(shrunk, rank, false, &down, 1, nullptr, alone);
  for (const Part& part : patch.parts) {
    const Index r = part.last - part.first;
    const Term up = {{shrunk + part.first, rows, r, rank, 1}, {part.b, part.end - part.begin, r, r, 1}};
    linear(y + part.begin, base.out, true, &up, 1, nullptr, alone);
  }
}

void Decoder::attend(float* out, float* qkv, std::size_t layer, const Step& step, Team& team) {
  const Layer& weights = layers_[layer];
  const Sizes& s = sizes_;
  const Index row = (s.heads + 2 * s.kv_heads) * s.dim, width = s.heads * s.dim;
  if (weights.q_norm) {
    const auto norm_heads = [&](float* x, const float* weight, Index heads) {
      const Index rows = s.norms_projection ? 1 : heads, columns = heads * s.dim / rows;
      norm(x, nullptr, nullptr, x, nullptr, weight, rows, columns, 1.0f, s.eps, s.one_plus);
    };
    for (Index t = 0; t < step.tokens; ++t) {
      norm_heads(qkv + t * row, weights.q_norm, s.heads);
      norm_heads(qkv + t * row + width, weights.k_norm, s.kv_heads);
    }
  }
  const Rotation& rotation = step.rotations[weights.rotation];
  rope(qkv, row, qkv, row, rotation.cos, rotation.sin, rotation.row, step.tokens,
       s.heads + s.kv_heads, s.dim, rotation.width, false);
  Paged paged = step.paged;
  paged.heads = s.heads;
  paged.kv_heads = s.kv_heads;
  paged.dim = s.dim;
  paged.q_row = paged.kv_row = row;
  paged.scale = s.scale;
  paged.cap = s.cap;
  paged.window = weights.window;
  const float* k = qkv + width;
  paged_attention(out, step.keys + layer * step.key_layer, step.values + layer * step.value_layer,
                  qkv, k, k + s.kv_heads * s.dim, paged, team);
}

void Decoder::add_norm(const float** y, float* h, const float* x, const float* weight, Index rows,
                       Team& team) {
  const Index columns = sizes_.hidden;
  *y = h;
  if (weight) {
    float* normed = grow(kNormed, rows * columns);
    by_rows(team, rows, columns, [&](Index begin, Index count) {
      const Index at = begin * columns;
      norm(normed + at, h + at, nullptr, x ? x + at : h + at, x ? h + at : nullptr, weight, count,
           columns, sizes_.residual_scale, sizes_.eps, sizes_.one_plus);
    });
    *y = normed;
  } else if (x) {
    for (Index i = 0; i < rows * columns; ++i) h[i] += sizes_.residual_scale * x[i];
  }
}

void Decoder::forward(float* out, const Step& step, Team& team) {
  const Sizes& s = sizes_;
  expect_below(step.token_ids, step.tokens, s.vocab, "token id");
  expect_below(step.keep, step.kept, step.tokens, "kept token");
  Index rows = step.tokens;
  float* h = grow(kHidden, rows * s.hidden);
  gather(h, embedding_, step.token_ids, rows, s.hidden);
  if (s.embedding_scale != 1.0f)
    for (Index i = 0; i < rows * s.hidden; ++i) h[i] *= s.embedding_scale;
  const float *x = nullptr, *y;
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    const Layer& layer = layers_[i];
    const bool last = i + 1 == layers_.size();
    const auto run = [&](Name name, Buffer buffer, const float* from, bool kept) {
      float* to = grow(buffer, rows * layer.linears[name].out);
      multiply(to, from, rows, i, name, step, kept, team);
      return to;
    };
    const auto norm_out = [&](float* z, const float* weight) {
      if (weight)
        norm(z, nullptr, nullptr, z, nullptr, weight, rows, s.hidden, 1.0f, s.eps, s.one_plus);
      x = z;
    };
    add_norm(&y, h, x, layer.attention_norm, rows, team);
    float* mixed = grow(kMixed, rows * s.heads * s.dim);
    attend(mixed, run(kQkv, kWide, y, false), i, step, team);
    if (last) {  // from here on only the kept tokens are computed
      float* kept_mixed = grow(kWide, step.kept * s.heads * s.dim);
      gather(kept_mixed, mixed, step.keep, step.kept, s.heads * s.dim);
      float* kept_h = grow(kNormed, step.kept * s.hidden);
      gather(kept_h, h, step.keep, step.kept, s.hidden);
      std::swap(buffers_[kHidden], buffers_[kNormed]);
      mixed = kept_mixed;
      h = kept_h;
      rows = step.kept;
    }
    norm_out(run(kO, kOut, mixed, last), layer.attention_out_norm);
    add_norm(&y, h, x, layer.mlp_norm, rows, team);
    const Index inner = layer.linears[kDown].in;
    const float* gate_up = run(kGateUp, kWide, y, last);
    float* active = grow(kGated, rows * inner);
    by_rows(team, rows, inner, [&](Index begin, Index count) {
      gated(active + begin * inner, gate_up + 2 * begin * inner, count, inner, s.gelu);
    });
    norm_out(run(kDown, kOut, active, last), layer.mlp_out_norm);
  }
  add_norm(&y, h, x, final_norm_, rows, team);
  std::memcpy(out, y, rows * s.hidden * sizeof(float));
}

}  // namespace fastsafe::cpu
