// Queries and keys of packed projections, normalised over their channels and rotated in neighbouring pairs; values
// are copied. Text keys are normalised, not rotated, and written behind the image keys.
#pragma once

#include "dtype.h"
#include "tensors.h"

namespace pixnerd {

struct QkNormRope {
  std::int64_t batches, tokens, text_tokens, heads, channels;
  DType dtype;  // of every tensor but the weights and the table
  double eps;
  int threads;
  Heads q, k, v;                    // [batches, tokens, heads, channels]
  Heads text_k, text_v;             // [batches, text_tokens, heads, channels]
  const void *q_weight, *k_weight;  // [channels] in the computed type (double for float64, else float)
  const void* rope;                 // [tokens, channels / 2, (cos, sin)] in the computed type; null for no rotation
};

// k and v [batches, tokens + text_tokens, heads, channels].
void qk_norm_rope_forward(const QkNormRope& a, MutableHeads q, MutableHeads k, MutableHeads v);

struct QkNormRopeTangents {
  Heads q, k, v, text_k, text_v;  // the incoming tangents; null where zero
  MutableHeads d_q, d_k, d_v;     // the results' tangents, shaped like these
};

// Values and tangents. Throws std::bad_alloc.
void qk_norm_rope_jvp(const QkNormRope& a, const QkNormRopeTangents& t, MutableHeads q, MutableHeads k,
                      MutableHeads v);

struct QkNormRopeGradients {
  Heads q, k, v;  // the incoming gradients, shaped like forward's results
  MutableHeads d_q, d_k, d_v, d_text_k, d_text_v;
  void *q_weight, *k_weight;  // [channels] in the computed type
};

// Results do not depend on the number of threads. Throws std::bad_alloc.
void qk_norm_rope_backward(const QkNormRope& a, const QkNormRopeGradients& d);

}  // namespace pixnerd
