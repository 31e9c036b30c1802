#include "coordinate_encoding.h"

#include <cmath>
#include <cstddef>
#include <numbers>
#include <vector>

namespace pixnerd {
namespace {

// Sample i of n evenly spaced ones of [0, end], ends included; a single sample is 0.
double sample(int i, int n, double end) { return n > 1 ? end * i / (n - 1) : 0.0; }

// The m-th frequency of the cosine kinds.
double frequency(Encoding kind, int m, int max_freqs) {
  if (kind == Encoding::kDct || kind == Encoding::kDctAligned) return sample(m, max_freqs, max_freqs);
  return kind == Encoding::kDctInteger ? m : m + 1;
}

// trig(angle) of every pixel of an axis of n pixels at every frequency: [n, count].
std::vector<double> axis_table(Encoding kind, int n, double scale, int max_freqs, int count, double (*trig)(double)) {
  std::vector<double> table(static_cast<std::size_t>(n) * count);
  for (int m = 0; m < count; ++m) {
    const double decay = std::pow(10000.0, -static_cast<double>(m) / count);
    for (int i = 0; i < n; ++i) {
      const double place = kind == Encoding::kDctAligned ? static_cast<double>(i) / n : sample(i, n, 1.0);
      double angle = std::numbers::pi * place * frequency(kind, m, max_freqs);
      if (kind == Encoding::kRope) angle = sample(i, n, n * scale) * decay;
      if (kind == Encoding::kSinCos) angle = i * decay;
      table[static_cast<std::size_t>(i) * count + m] = trig(angle);
    }
  }
  return table;
}

}  // namespace

void coordinate_encoding(int height, int width, int max_freqs, Encoding kind, double scale_x, double scale_y,
                         double* out) {
  const int columns = max_freqs * max_freqs;
  const int count = kind == Encoding::kRope ? columns / 2 : kind == Encoding::kSinCos ? columns / 4 : max_freqs;
  const auto cosine = [](double angle) { return std::cos(angle); };
  const auto sine = [](double angle) { return std::sin(angle); };
  const auto cos_x = axis_table(kind, width, scale_x, max_freqs, count, cosine);
  const auto cos_y = axis_table(kind, height, scale_y, max_freqs, count, cosine);
  std::vector<double> sin_x, sin_y;
  if (kind == Encoding::kSinCos) {
    sin_x = axis_table(kind, width, scale_x, max_freqs, count, sine);
    sin_y = axis_table(kind, height, scale_y, max_freqs, count, sine);
  }
  for (int y = 0; y < height; ++y) {
    const std::size_t row = static_cast<std::size_t>(y) * count;
    for (int x = 0; x < width; ++x, out += columns) {
      const std::size_t column = static_cast<std::size_t>(x) * count;
      switch (kind) {
        case Encoding::kRope:
          for (int m = 0; m < count; ++m) {
            out[2 * m] = cos_x[column + m];
            out[2 * m + 1] = cos_y[row + m];
          }
          break;
        case Encoding::kSinCos:
          for (int m = 0; m < count; ++m) {
            out[m] = sin_x[column + m];
            out[count + m] = cos_x[column + m];
            out[2 * count + m] = sin_y[row + m];
            out[3 * count + m] = cos_y[row + m];
          }
          break;
        default:
          for (int a = 0; a < max_freqs; ++a) {
            for (int b = 0; b < max_freqs; ++b) {
              const double product = frequency(kind, a, max_freqs) * frequency(kind, b, max_freqs);
              const double damping = kind == Encoding::kDctPaper ? 1.0 : 1.0 + product;
              out[a * max_freqs + b] = cos_x[column + a] * cos_y[row + b] / damping;
            }
          }
      }
    }
  }
}

}  // namespace pixnerd
