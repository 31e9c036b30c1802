// C = A @ B (+ bias, + C) for the large products around the neural fields: generating the weights of many patches and
// the gradients of that.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace pixnerd {

// A matrix of any dtype; one of the two strides (in elements) is 1.
struct Operand {
  const void* data;
  std::int64_t row_stride, column_stride;
  DType dtype;
};

struct Product {
  std::int64_t rows, columns, depth;
  Operand a;         // [rows, depth]
  Operand b;         // [depth, columns]
  const void* bias;  // [columns] in b's dtype, added to every row; null for none
  void* c;           // [rows, columns] with dense rows
  std::int64_t row_stride;
  DType dtype;  // of c; kFloat64 computes in double, all others in float
  bool accumulate;
  bool row_invariant;  // a row of C has the same bits whatever the number of rows, for some speed
  int threads;
};

// C is written once (read once before with `accumulate`), except that a depth beyond a few thousand is added up in
// passes where C has the computed type. The order of additions depends on the sizes alone, with `row_invariant` on
// depth alone. Throws std::bad_alloc.
void matmul(const Product& product);

}  // namespace pixnerd
