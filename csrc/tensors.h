// How the core sees tensors: an address and strides in elements. The last dimension is always dense.
#pragma once

#include <cstdint>

namespace pixnerd {

// A batch of matrices; what has one row per batch ignores row_stride.
struct Matrices {
  const void* data = nullptr;
  std::int64_t patch_stride = 0;
  std::int64_t row_stride = 0;
};

struct MutableMatrices {
  void* data = nullptr;
  std::int64_t patch_stride = 0;
  std::int64_t row_stride = 0;
};

// [batch, token, head, channel].
struct Heads {
  const void* data = nullptr;
  std::int64_t batch_stride = 0;
  std::int64_t token_stride = 0;
  std::int64_t head_stride = 0;
};

struct MutableHeads {
  void* data = nullptr;
  std::int64_t batch_stride = 0;
  std::int64_t token_stride = 0;
  std::int64_t head_stride = 0;
};

}  // namespace pixnerd
