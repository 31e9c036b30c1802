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
void swiglu_backward(const Swiglu& s, Matrices grad, MutableMatrices d_gate, MutableMatrices d_up);

}  // namespace pixnerd
