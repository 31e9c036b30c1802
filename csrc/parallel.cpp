#include "parallel.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <string>

namespace pixnerd {
namespace {

// GOMP_parallel is the stable entry point that GCC's `#pragma omp parallel` calls; libgomp defines it, and LLVM's and
// Intel's runtimes do too on Linux. Looked up through libtorch_cpu it is the one that torch itself calls, whatever
// name torch's wheel gives its library and whatever other runtimes (scikit-learn brings one) the process has loaded:
// torch's thread pool and ours are the same.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

struct Runtime {
  GompParallel parallel = nullptr;
  std::string path;
};

const Runtime& runtime() {
  static const Runtime found = [] {
    Runtime result;
    void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    if (!torch) return result;
    void* symbol = dlsym(torch, "GOMP_parallel");
    Dl_info info{};
    if (symbol && dladdr(symbol, &info) && info.dli_fname) {
      result.parallel = reinterpret_cast<GompParallel>(symbol);
      result.path = info.dli_fname;
    }
    return result;
  }();
  return found;
}

struct Loop {
  std::atomic<std::int64_t> next{0};
  std::atomic<int> workers{0};
  std::int64_t count;
  LoopBody body;
  void* context;

  void run() {
    const int worker = workers.fetch_add(1, std::memory_order_relaxed);
    for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(context, worker, i);
  }
};

}  // namespace

const char* openmp_runtime() { return runtime().path.c_str(); }

int workers_for(std::int64_t count, int threads) {
  if (!runtime().parallel) return 1;
  return static_cast<int>(std::min<std::int64_t>(std::max(threads, 1), std::max<std::int64_t>(count, 1)));
}

void parallel_for(std::int64_t count, int threads, LoopBody body, void* context) {
  Loop loop{.count = count, .body = body, .context = context};
  const int team = workers_for(count, threads);
  if (team <= 1) {
    loop.run();
  } else {
    runtime().parallel([](void* data) { static_cast<Loop*>(data)->run(); }, &loop, static_cast<unsigned>(team), 0);
  }
}

}  // namespace pixnerd
