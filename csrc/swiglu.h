// out = silu(gate) * up for rows of any stride.
#pragma once

#include "dtype.h"
#include "tensors.h"

namespace pixnerd {

struct Swiglu {
  std::int64_t rows, columns;
  DType dtype;
  int threads;
  Matrices gate, up;  // [1, rows, columns]
};

void swiglu_forward(const Swiglu& s, MutableMatrices out);

struct SwigluTangents {
  Matrices gate, up;  // the incoming tangents; null where zero
  MutableMatrices out, out_tangent;
};

// out and its tangent.
void swiglu_jvp(const Swiglu& s, const SwigluTangents& tangents);

void swiglu_backward(const Swiglu& s, Matrices grad, MutableMatrices d_gate, MutableMatrices d_up);

}  // namespace pixnerd
