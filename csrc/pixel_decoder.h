// The pixel decoder on a run of patches whose neural fields' weights have been generated:
//
//   x = pixel @ pixel_weight + table[position]
//   x = block_k(x)                                  for every k; see neural_field_mlp.h
//   out = norm(x) @ linear_weight + linear_bias     each part where it is given
//
// Pixels are read from the image and results written to theirs in place.
#pragma once

#include <cstdint>

#include "neural_field_mlp.h"

namespace pixnerd {

// An image [images, channels, height, width]; strides in elements.
struct Planes {
  const void* data = nullptr;
  std::int64_t image_stride = 0, channel_stride = 0, row_stride = 0, column_stride = 0;
};

struct MutablePlanes {
  void* data = nullptr;
  std::int64_t image_stride = 0, channel_stride = 0, row_stride = 0, column_stride = 0;
};

// The packed matrices (w_gate, w1, w2, or w1, w2) of every block and patch of the run.
struct Generated {
  const void* data = nullptr;
  std::int64_t block_stride = 0, patch_stride = 0;
};

struct MutableGenerated {
  void* data = nullptr;
  std::int64_t block_stride = 0, patch_stride = 0;
};

struct PixelDecoder {
  std::int64_t first, count;                           // the run, of patches numbered image by image and row by row
  std::int64_t rows, columns;                          // patches of an image
  int height, width;                                   // pixels of a patch
  int image_channels, channels, hidden, out_channels;  // out_channels = channels without linear_weight
  int blocks;
  bool gated;
  DType dtype;  // of the image, the generated weights, the result and their gradients
  Activation activation;
  bool normalize_w1, normalize_w2, normalize_w_gate;
  double norm_eps, weight_eps;
  int threads;
  Planes image;
  Generated generated;
  // Dense, in the computed type (double for float64, else float).
  const void* pixel_weight;   // [image_channels, channels]
  const void* table;          // [height * width, channels]
  const void* norm_weights;   // [blocks, channels]
  const void* final_norm;     // [channels], or null
  const void* linear_weight;  // [channels, out_channels], or null
  const void* linear_bias;    // [out_channels], or null
};

struct PixelDecoderGradients {
  Planes out;  // the incoming gradient
  // Null where not wanted.
  MutablePlanes image;
  MutableGenerated generated;  // may be the memory of the weights themselves
  // Added to: table, pixel_weight, norm_weights, final_norm, linear_weight^T, linear_bias, one after the other
  // (final_norm is there always, linear_weight^T and linear_bias where linear_weight is).
  double* sums;
};

// The number of doubles in `sums`.
std::int64_t pixel_decoder_sums(const PixelDecoder& decoder);

// Writes the run's pixels of every plane of `out` once. Throws std::bad_alloc.
void pixel_decoder_forward(const PixelDecoder& decoder, const MutablePlanes& out);

// Every wanted gradient. Results do not depend on the number of threads. Throws std::bad_alloc.
void pixel_decoder_backward(const PixelDecoder& decoder, const PixelDecoderGradients& gradients);

}  // namespace pixnerd
