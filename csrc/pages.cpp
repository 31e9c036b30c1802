#include "pages.h"

#include <cstdint>
#include <cstdlib>
#include <string_view>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace pixnerd {
namespace {

constexpr std::uintptr_t kHugePage = std::uintptr_t{2} << 20;

bool wanted() {
  static const bool found = [] {
    const char* value = std::getenv("PIXNERD_HUGE_PAGES");
    return !value || std::string_view(value) != "0";
  }();
  return found;
}

}  // namespace

void advise_huge_pages([[maybe_unused]] void* address, [[maybe_unused]] std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // Only whole huge pages inside the block: its neighbours are somebody else's.
  const std::uintptr_t begin = (reinterpret_cast<std::uintptr_t>(address) + kHugePage - 1) / kHugePage * kHugePage;
  const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(address) + bytes) / kHugePage * kHugePage;
  if (end >= begin + kHugePage && wanted()) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace pixnerd
