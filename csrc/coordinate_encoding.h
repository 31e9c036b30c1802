// Coordinate encodings of the pixels of a patch (see pixnerd_kernels/ops/coordinate_encoding for the
// formulas).
#pragma once

namespace pixnerd {

enum class Encoding : int { kDct = 0, kDctInteger = 1, kDctPaper = 2, kRope = 3, kSinCos = 4, kDctAligned = 5 };

// Writes [height * width, max_freqs^2] doubles to `out`, row y * width + x. Throws std::bad_alloc.
void coordinate_encoding(int height, int width, int max_freqs, Encoding kind, double scale_x, double scale_y,
                         double* out);

}  // namespace pixnerd
