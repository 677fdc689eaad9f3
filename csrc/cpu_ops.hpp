// The operations of a decoder layer on a CPU in fp32, each one pass over memory, with what autograd
// needs of them. Plain pointers; sizes and strides are checked by fastsafe/model/cpu.py.

#pragma once

#include <string>

#include "gemm.hpp"

namespace fastsafe::cpu {

struct Attention {
  const std::int64_t* starts;  // [sequences + 1] first row of each
  Index sequences, heads, kv_heads, dim;
  Index q_row, kv_row;  // strides of q and of k, v; heads lie side by side in a row
  float scale, cap;     // cap 0: none
  Index window;         // keys that a query sees, itself included; 0: all
};

struct Scale {  // what turns a score into its weight: exp(score - top) inverse
  float top, inverse;
};

struct Paged {  // tokens packed by row; the context of a row is in pages of kLanes tokens
  const std::int64_t *starts, *positions, *cache_slots;  // [rows + 1], [tokens], [tokens]
  const std::int32_t* table;                        // [rows, width] pages
  Index rows, width, heads, kv_heads, dim;
  Index q_row, kv_row, key_page, value_page;  // strides of q, of k and v, of pages
  float scale, cap;
  Index window;
};

// "avx512", "avx2" or "baseline": what this CPU runs
const char* instruction_set();
// false where this CPU does not have it; for tests, as results do not depend on it
bool use_instruction_set(const std::string& name);

void linear(float* y, Index y_row, bool accumulate, const Term* terms, int count,
            const float* bias, unsigned threads);

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

// rotate the leading features of every head; back is the inverse
void rope(float* y, Index y_row, const float* x, Index x_row, const float* cos, const float* sin,
          Index table_row, Index rows, Index heads, Index dim, Index rotated, bool back);

// causal attention within each sequence; scales [rows, heads] (null: not wanted) are for the
// backward pass
void attention(float* out, Scale* scales, const float* q, const float* k, const float* v,
               const Attention& a);
void attention_backward(float* dq, float* dk, float* dv, const float* d_out,
                        const Scale* scales, const float* q, const float* k, const float* v,
                        const Attention& a);
// writes k and v to their places, then attends from every token over its row's context: keys are
// [pages, kv_heads, dim, kLanes], values [pages, kv_heads, kLanes, dim in whole vectors]
void paged_attention(float* out, float* keys, float* values, const float* q, const float* k,
                     const float* v, const Paged& p);

}  // namespace fastsafe::cpu
