// Operations of a decoder layer on a CPU in fp32, each one pass over memory, and their backward
// passes. fastsafe/model/cpu_ops.py checks pointers, sizes and strides.

#pragma once

#include <string>

#include "gemm.hpp"
#include "team.hpp"

namespace fastsafe::cpu {

struct Attention {
  const std::int64_t* starts;  // [sequences + 1] first row of each
  Index sequences, heads, kv_heads, dim;
  Index q_row, kv_row;  // strides of q and of k, v; heads lie side by side in a row
  float scale, cap;     // cap 0: none
  Index window;         // keys that a query sees, itself included; 0: all
};

struct Scale {  // softmax weight of a score: exp(score - top) * inverse
  float top, inverse;
};

struct Paged {  // tokens packed by row; a row's context is in pages of kLanes tokens
  const std::int64_t *starts, *positions, *cache_slots;  // [rows + 1], [tokens], [tokens]
  const std::int32_t* table;                        // [rows, width] pages
  Index rows, width, heads, kv_heads, dim;
  Index q_row, kv_row, key_page, value_page;  // strides of q, of k and v, of pages
  float scale, cap;
  Index window;
};

// The instruction set in use: "avx512", "avx2" or "baseline".
const char* instruction_set();
// Chooses another one, for tests: results are equal. False if this CPU does not have it.
bool use_instruction_set(const std::string& name);

void linear(float* y, Index y_row, bool accumulate, const Term* terms, int count,
            const float* bias, Team& team);

// h = residual + alpha x (where residual is given), r = 1 / rms(h), y = h r w
void norm(float* y, float* h, float* r, const float* x, const float* residual, const float* w,
          Index rows, Index columns, float alpha, float eps, bool one_plus);
// dx = dh + r (dy w - h r^2 mean(dy w h)); dh may be null
void norm_backward(float* dx, const float* dy, const float* dh, const float* h, const float* r,
                   const float* w, Index rows, Index columns, bool one_plus);

// y = act(gate) up of [gate | up]; act is silu, or gelu by tanh
void gated(float* y, const float* gate_up, Index rows, Index columns, bool gelu);
void gated_backward(float* d_gate_up, const float* dy, const float* gate_up, Index rows,
                    Index columns, bool gelu);

// rotates the leading features of every head; `back` rotates the other way
void rope(float* y, Index y_row, const float* x, Index x_row, const float* cos, const float* sin,
          Index table_row, Index rows, Index heads, Index dim, Index rotated, bool back);

// causal attention within each sequence; the backward pass needs scales [rows, heads] (may be null)
void attention(float* out, Scale* scales, const float* q, const float* k, const float* v,
               const Attention& a);
void attention_backward(float* dq, float* dk, float* dv, const float* d_out,
                        const Scale* scales, const float* q, const float* k, const float* v,
                        const Attention& a);
// writes k and v to their cache slots, then attends from every token over its row's context: keys are
// [pages, kv_heads, dim, kLanes], values [pages, kv_heads, kLanes, dim in whole vectors]
void paged_attention(float* out, float* keys, float* values, const float* q, const float* k,
                     const float* v, const Paged& p, Team& team);

}  // namespace fastsafe::cpu
