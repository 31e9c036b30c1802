// Memory for the workers of one call. In the instruction set's namespace, like everything inline (see simd.h).
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

#include "pages.h"

namespace pixnerd::PIXNERD_ISA {

// One 64-byte aligned slice per worker. Throws std::bad_alloc.
class Scratch {
 public:
  Scratch(std::size_t bytes_per_worker, int workers)
      : slice_((bytes_per_worker + kAlign - 1) / kAlign * kAlign),
        data_(static_cast<char*>(std::aligned_alloc(kAlign, slice_ * static_cast<std::size_t>(workers) + kAlign))) {
    if (!data_) throw std::bad_alloc();
    advise_huge_pages(data_, slice_ * static_cast<std::size_t>(workers));
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void* slice(int worker) const { return data_ + slice_ * static_cast<std::size_t>(worker); }

 private:
  static constexpr std::size_t kAlign = 64;
  std::size_t slice_;
  char* data_;
};

}  // namespace pixnerd::PIXNERD_ISA
