// The processor's own limit, for benchmarks to measure products against.
#pragma once

#include <cstdint>

namespace pixnerd {

// Every thread does `steps` rounds of independent float multiply-adds on registers; nothing is read or written.
// Returns the floating-point operations of all threads.
std::int64_t multiply_adds(std::int64_t steps, int threads);

}  // namespace pixnerd
