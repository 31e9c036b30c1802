// The transformer's norm, alone or behind the gated residual that feeds it:
//
//   z = x + gate * y                                                (z = x without y)
//   out = z * rsqrt(mean(z^2) + eps) * weight * (1 + scale) + shift
#pragma once

#include "dtype.h"
#include "tensors.h"

namespace pixnerd {

struct ModulatedNorm {
  std::int64_t batches, rows, columns;
  DType dtype;  // of every tensor but weight
  double eps;
  int threads;
  Matrices x;             // [batches, rows, columns]; backward takes z here
  Matrices y;             // like x; null for the norm alone
  Matrices gate;          // [batches, columns], with y
  Matrices shift, scale;  // [batches, columns]; null where absent
  const void* weight;     // [columns] in the computed type (double for float64, else float)
};

struct ModulatedNormGradients {
  Matrices out;                        // the incoming gradient
  Matrices z;                          // the incoming gradient of z; null for the norm alone
  MutableMatrices x, y;                // y null for the norm alone
  MutableMatrices gate, shift, scale;  // [batches, columns]; null where not wanted
  void* weight;                        // [columns] in the computed type
};

// z is written where y is given. Throws std::bad_alloc.
void modulated_rms_norm_forward(const ModulatedNorm& norm, MutableMatrices z, MutableMatrices out);

struct ModulatedNormTangents {
  Matrices x, y, gate, shift, scale;  // the incoming tangents; null where zero
  MutableMatrices z, z_tangent;       // null for the norm alone
  MutableMatrices out, out_tangent;
};

// Values and tangents. Throws std::bad_alloc.
void modulated_rms_norm_jvp(const ModulatedNorm& norm, const ModulatedNormTangents& tangents);

// Results do not depend on the number of threads. Throws std::bad_alloc.
void modulated_rms_norm_backward(const ModulatedNorm& norm, const ModulatedNormGradients& gradients);

}  // namespace pixnerd
