// All layers of a decoder over packed tokens in one call: what Transformer.forward computes on a CPU
// in fp32, by the same operations and so with the same bits, but without the interpreter between
// them and in memory that is used again. Plain pointers; fastsafe/model/native.py checks the sizes.

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
  // null where the architecture has none
  const float *attention_norm, *attention_out_norm, *mlp_norm, *mlp_out_norm, *q_norm, *k_norm;
  Index window, rotation;  // keys that a query sees, 0: all; which of a step's rotations
};

struct Sizes {
  Index vocab, hidden, heads, kv_heads, dim;
  float eps, scale, cap, embedding_scale, residual_scale;
  bool one_plus, gelu, norms_projection;  // the last: of q and k as a whole, not of every head
};

struct Part {  // columns [begin, end) of y get A's rows [first, last) of x, times B
  Index begin, end, first, last;
  const float* b;  // [end - begin, last - first]
};

struct Patch {  // what an adapter does to a linear
  const float* weight = nullptr;  // in place of the base's; null: the base's
  const float* a = nullptr;       // [rank, in]
  Index rank = 0;
  std::vector<Part> parts;
};

struct Segment {  // tokens up to `end`, and kept ones up to `kept_end`, of one adapter
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
  const std::int64_t* keep;  // tokens whose final state is wanted
  Index kept;
  std::vector<Segment> segments;
  std::vector<Rotation> rotations;
  Paged paged;  // all but the strides of q, k and v, scale, cap and window
  float *keys, *values;
  Index key_layer, value_layer;  // strides of a layer
};

class Decoder {
 public:
  Decoder(const Sizes& sizes, std::vector<Layer> layers, const float* embedding,
          const float* final_norm);
  std::size_t num_linears() const { return layers_.size() * kNames; }
  // out [kept, hidden]; one call at a time
  void forward(float* out, const Step& step);

 private:
  void multiply(float* y, const float* x, Index rows, std::size_t layer, Name name,
                const Step& step, bool kept);
  void attend(float* out, float* qkv, std::size_t layer, const Step& step);
  // adds x to h, and norms it into y; where there is no norm, y becomes h
  void enter(const float** y, float* h, const float* x, const float* norm, Index rows);
  float* room(int buffer, Index count);

  Sizes sizes_;
  std::vector<Layer> layers_;
  const float *embedding_, *final_norm_;
  std::vector<float> buffers_[7];
};

}  // namespace fastsafe::cpu
