// w / max(||w||, eps) with the norm over the middle dimension of a dense [outer, rows, columns] tensor.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace pixnerd {

struct ColumnNorm {
  std::int64_t outer, rows, columns;
  DType dtype;
  double eps;
  int threads;
  const void* w;
};

// Writes the normalised weights to `out`, dense like w.
void normalize_weights_forward(const ColumnNorm& norm, void* out);

// Writes the gradient of w to `out`, from the gradient `grad` of the normalised weights.
void normalize_weights_backward(const ColumnNorm& norm, const void* grad, void* out);

}  // namespace pixnerd
