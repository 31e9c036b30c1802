// Parallel loops on the OpenMP runtime that torch uses.
#pragma once

#include <cstdint>
#include <type_traits>

namespace pixnerd {

// The path of torch's OpenMP runtime, or an empty string where torch is not loaded (loops then run serially).
const char* openmp_runtime();

using LoopBody = void (*)(void* context, int worker, std::int64_t index);

// How many workers parallel_for uses at most.
int workers_for(std::int64_t count, int threads);

// Call body(context, worker, i) once for every i in [0, count) on workers 0 ... workers_for(count, threads) -
// 1; indices are handed out in order, whichever worker is free takes the next. `body` must not throw.
void parallel_for(std::int64_t count, int threads, LoopBody body, void* context);

template <class Function>
void parallel_for(std::int64_t count, int threads, Function&& function) {
  parallel_for(
      count, threads,
      [](void* context, int worker, std::int64_t i) {
        (*static_cast<std::remove_reference_t<Function>*>(context))(worker, i);
      },
      const_cast<void*>(static_cast<const void*>(&function)));
}

}  // namespace pixnerd
