// Memory that will be needed soon, brought near a few cache lines at a time between other work.
#pragma once

#include <cstddef>
#include <cstdint>

#include "simd.h"

namespace pixnerd::PIXNERD_ISA {

class Ahead {
 public:
  // `runs` runs of `bytes` neighbours each, `step` bytes from the start of one to the next's. Of at most kPieces.
  void add(const void* data, std::int64_t runs, std::int64_t bytes, std::int64_t step) {
    if (step == bytes) bytes *= runs, step = bytes, runs = 1;
    if (!data || runs <= 0 || bytes <= 0 || count_ == kPieces) return;
    pieces_[count_++] = {static_cast<const char*>(data), runs, bytes, step};
    lines_ += runs * ((bytes + kLine - 1) / kLine);
  }

  // Divide everything among so many calls of next().
  void spread(std::int64_t calls) {
    at_once_ = calls > 0 ? static_cast<int>((lines_ + calls - 1) / calls) : 0;
    if (count_ > 0) begin();
  }

  PIXNERD_INLINE void next() {
    for (int i = 0; i < at_once_ && line_; ++i) {
      __builtin_prefetch(line_, 0, 2);
      line_ += kLine;
      if (line_ >= end_) next_run();
    }
  }

 private:
  static constexpr int kLine = 64, kPieces = 10;
  struct Piece {
    const char* data;
    std::int64_t runs, bytes, step;
  };

  void begin() {
    line_ = pieces_[current_].data;
    end_ = line_ + pieces_[current_].bytes;
  }
  void next_run() {
    Piece& piece = pieces_[current_];
    if (--piece.runs > 0) {
      piece.data += piece.step;
    } else if (++current_ == count_) {
      line_ = nullptr;
      return;
    }
    begin();
  }

  Piece pieces_[kPieces];
  int count_ = 0, current_ = 0, at_once_ = 0;
  std::int64_t lines_ = 0;
  const char *line_ = nullptr, *end_ = nullptr;
};

}  // namespace pixnerd::PIXNERD_ISA
