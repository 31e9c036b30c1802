// out = x + gate * y for tensors [batches, rows, columns] and a gate [batches, columns].
#pragma once

#include "dtype.h"
#include "tensors.h"

namespace pixnerd {

struct GatedResidual {
  std::int64_t batches, rows, columns;
  DType dtype;
  int threads;
  Matrices y, gate;
};

void gated_residual_forward(const GatedResidual& g, Matrices x, MutableMatrices out);

struct GatedResidualTangents {
  Matrices x, y, gate;  // the incoming tangents; null where zero
  MutableMatrices out, out_tangent;
};

// out and its tangent.
void gated_residual_jvp(const GatedResidual& g, Matrices x, const GatedResidualTangents& tangents);

// d_y = grad * gate and d_gate [batches, columns] = the sum over rows of grad * y; either may be null. The result
// does not depend on the number of threads. Throws std::bad_alloc.
void gated_residual_backward(const GatedResidual& g, Matrices grad, MutableMatrices d_y, MutableMatrices d_gate);

}  // namespace pixnerd
