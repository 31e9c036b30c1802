#include "parallel.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <string>

#if defined(__linux__)
#include <link.h>
#endif

namespace pixnerd {
namespace {

// GOMP_parallel is the stable entry point that GCC's `#pragma omp parallel` calls; libgomp defines it and
// LLVM's and Intel's runtimes do too on Linux. Looking it up in whatever torch has loaded, in place of
// linking to a library of a fixed name, keeps one runtime (and one thread pool) in the process: torch's
// wheels have carried libgomp under several names.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

struct Runtime {
  GompParallel parallel = nullptr;
  std::string path;
};

#if defined(__linux__)
int visit(dl_phdr_info* info, std::size_t, void* data) {
  auto* runtime = static_cast<Runtime*>(data);
  const std::string path = info->dlpi_name ? info->dlpi_name : "";
  const std::string name = path.substr(path.rfind('/') + 1);
  if (name.rfind("libgomp", 0) != 0 && name.rfind("libiomp5", 0) != 0 && name.rfind("libomp", 0) != 0) return 0;
  void* handle = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (!handle) return 0;
  runtime->parallel = reinterpret_cast<GompParallel>(dlsym(handle, "GOMP_parallel"));
  if (!runtime->parallel) return 0;
  runtime->path = path;
  return 1;
}
#endif

const Runtime& runtime() {
  static const Runtime found = [] {
    Runtime result;
#if defined(__linux__)
    dl_iterate_phdr(visit, &result);
#endif
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
