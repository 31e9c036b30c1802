#include "peak.h"

#include "parallel.h"
#include "scratch.h"
#include "simd.h"

namespace pixnerd::PIXNERD_ISA {

std::int64_t multiply_adds(std::int64_t steps, int threads) {
  // More chains than a unit's latency times its throughput (8 to 10), and few enough for the registers.
  constexpr int kChains = kVectorBytes == 16 ? 12 : 14;
  const int workers = workers_for(threads, threads);
  const Scratch results(sizeof(Vec<float>), workers);
  parallel_for(workers, workers, [&](int, std::int64_t item) {
    Vec<float> chains[kChains];
    for (int i = 0; i < kChains; ++i) chains[i] = broadcast(static_cast<float>(i));
    for (std::int64_t step = 0; step < steps; ++step) {
      for (int i = 0; i < kChains; ++i) chains[i] = chains[i] * 0.5f + 1.0f;
    }
    for (int i = 1; i < kChains; ++i) chains[0] += chains[i];
    store<float>(static_cast<float*>(results.slice(static_cast<int>(item))), chains[0]);
  });
  volatile float seen = *static_cast<const float*>(results.slice(0));  // or the compiler might leave all of it out
  static_cast<void>(seen);
  return steps * workers * kChains * kLanes<float> * 2;
}

}  // namespace pixnerd::PIXNERD_ISA
