// Element types of tensors, as the Python side numbers them.
#pragma once

namespace pixnerd {

enum class DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

}  // namespace pixnerd
