// All layers of a decoder over packed tokens in one call. It runs the operations of
// Transformer.forward on a CPU in fp32, so results have the same bits; but no Python runs between
// them, and buffers are reused. fastsafe/model/cpu_decoder.py checks pointers and sizes.

#pragma once

#include <cstddef>

#include "cpu_ops.hpp"

namespace fastsafe::cpu {

enum Name { kQkv, kO, kGateUp, kDown, kNames };

struct Linear {
  const float *weight, *bias;  // [out, in], [out] or null
  Index out, in;
};

struct Layer {
  Linear linears[kNames];
  // null if the architecture has no such norm
  const float *attention_norm, *attention_out_norm, *mlp_norm, *mlp_out_norm, *q_norm, *k_norm;
  Index window, rotation;  // keys that a query sees, 0: all; index into Step::rotations
};

struct Sizes {
  Index vocab, hidden, heads, kv_heads, dim;
  float eps, scale, cap, embedding_scale, residual_scale;
  bool one_plus, gelu, norms_projection;  // the last: norm all heads of q (k) as one vector
};

struct Part {  // columns [begin, end) of y += B (A[first:last) x)
  Index begin, end, first, last;
  const float* b;  // [end - begin, last - first]
};

struct Patch {  // change of an adapter to a linear
  const float* weight = nullptr;  // merged weight; null: the base's
  const float* a = nullptr;       // [rank, in]
  Index rank = 0;
  std::vector<Part> parts;
};

struct Segment {  // consecutive rows of one adapter: packed tokens to `end`, kept ones to `kept_end`
  const std::vector<Patch>* patches;  // by layer * kNames + name; null: the base
  Index end, kept_end;
};

struct Rotation {
  const float *cos, *sin;  // [tokens, width]
  Index row, width;
};

struct Step {
  const std::int64_t* token_ids;
  Index tokens;
  const std::int64_t* keep;  // tokens whose final state is returned
  Index kept;
  std::vector<Segment> segments;
  std::vector<Rotation> rotations;
  Paged paged;  // Decoder sets the strides of q, k and v, scale, cap and window
  float *keys, *values;
  Index key_layer, value_layer;  // strides of a layer
};

class Decoder {
 public:
  Decoder(const Sizes& sizes, std::vector<Layer> layers, const float* embedding,
          const float* final_norm);
  // Bytes of a step's buffers for elements of `itemsize` bytes, adapters not counted. The memory
  // planner asks it for every device: Transformer.forward holds no more.
  static Index workspace_bytes(Index hidden, Index intermediate, Index heads, Index kv_heads,
                               Index dim, Index tokens, Index itemsize);
  // out [kept, hidden]; not thread-safe. The team shares columns of products and rows of the rest,
  // which changes no bit.
  void forward(float* out, const Step& step, Team& team);

 private:
  void multiply(float* y, const float* x, Index rows, std::size_t layer, Name name,
                const Step& step, bool kept, Team& team);
  // adds the adapter of a segment to its rows of y
  void add_update(float* y, const float* x, Index rows, const Linear& base, const Patch& patch,
                  float* shrunk);
  void attend(float* out, float* qkv, std::size_t layer, const Step& step, Team& team);
  // h += x unless x is null, then y = norm(h), or y = h if norm is null
  void add_norm(const float** y, float* h, const float* x, const float* norm, Index rows, Team& team);
  float* grow(int buffer, Index count);

  struct Update {  // rows [begin, end) of a segment; its products with A at `room`
    const Patch* patch;
    Index begin, end, room;
  };
  static constexpr Index kUpdateRows = 64;

  Sizes sizes_;
  std::vector<Update> updates_;
  std::vector<Layer> layers_;
  const float *embedding_, *final_norm_;
  std::vector<float> buffers_[7];
};

}  // namespace fastsafe::cpu
