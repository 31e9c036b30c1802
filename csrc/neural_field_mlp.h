// The neural-field block of every patch, forward and backward:
//
//   n = x * rsqrt(mean(x^2) + norm_eps) * norm_weight          (n = x without norm_weight)
//   y = x + act(n @ w1 * s1) @ w2 * s2                         (plain)
//   y = x + (act(n @ w_gate * s_gate) * (n @ w1 * s1)) @ w2 * s2   (gated)
//
// with s = 1 / max(||w||, weight_eps) per column, or 1 where a weight is not normalised.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "tensors.h"

namespace pixnerd {

enum class Activation : int { kSilu = 0, kGelu = 1, kRelu = 2 };

struct NeuralField {
  std::int64_t patches, pixels;
  int channels, hidden;
  DType dtype;         // of x, y and their gradients
  DType weight_dtype;  // of the weights and their gradients
  Activation activation;
  bool residual;
  bool normalize_w1, normalize_w2, normalize_w_gate;
  double norm_eps, weight_eps;
  int threads;
  Matrices x;               // [patches, pixels, channels]
  Matrices w1;              // [patches, channels, hidden]
  Matrices w2;              // [patches, hidden, channels]
  Matrices w_gate;          // [patches, channels, hidden]; null for the plain form
  const void* norm_weight;  // [channels] in the computed type (double for float64, else float); null for none
};

struct NeuralFieldGradients {
  Matrices y;                                     // the incoming gradient [patches, pixels, channels]
  MutableMatrices x = {};                         // null where not wanted, like those below
  MutableMatrices w1 = {}, w2 = {}, w_gate = {};  // all wanted or none
  void* norm_weight = nullptr;                    // [channels] in the computed type
};

// The direction of a Jacobian-vector product, and where it and the value go. Weights have tangents all or none.
struct NeuralFieldTangents {
  Matrices x;                    // [patches, pixels, channels] in x's dtype; null for zero, like those below
  Matrices w1, w2, w_gate;       // in the weights' dtype
  MutableMatrices y, y_tangent;  // [patches, pixels, channels]
};

// y [patches, pixels, channels], written once. Throws std::bad_alloc.
void neural_field_mlp_forward(const NeuralField& field, MutableMatrices y);

// Every wanted gradient, written once. Results do not depend on the number of threads. Throws std::bad_alloc.
void neural_field_mlp_backward(const NeuralField& field, const NeuralFieldGradients& gradients);

// y and its tangent, each written once. Throws std::bad_alloc.
void neural_field_mlp_jvp(const NeuralField& field, const NeuralFieldTangents& tangents);

}  // namespace pixnerd
