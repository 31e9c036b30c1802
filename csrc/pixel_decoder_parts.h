// The pieces that the forward and backward of the pixel decoder share: pixels between planes and panels, a block's
// weights, and the layers around the blocks.
#pragma once

#include "neural_field_backward.h"
#include "pixel_decoder.h"

namespace pixnerd::PIXNERD_ISA {

template <class T>
inline constexpr DType kComputed = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;

// Where a patch lies in a set of planes.
struct Place {
  std::int64_t image, row, column;

  Place(const PixelDecoder& d, std::int64_t index) {
    const std::int64_t patch = d.first + index;
    image = patch / (d.rows * d.columns);
    row = patch / d.columns % d.rows * d.height;
    column = patch % d.columns * d.width;
  }
  template <class P>
  PIXNERD_INLINE std::int64_t offset(const P& planes) const {
    return image * planes.image_stride + row * planes.row_stride + column * planes.column_stride;
  }
};

// Call function(r, offset of the pixel in planes) for pixels first ... first + rows of a patch.
template <class P, class Function>
PIXNERD_INLINE void for_pixels(const P& planes, int width, int first, int rows, Function&& function) {
  int y = first / width, x = first % width;
  for (int r = 0; r < rows; ++r) {
    function(r, y * planes.row_stride + x * planes.column_stride);
    if (++x == width) x = 0, ++y;
  }
}

// Pixels of a patch into rows 0 ... of `target`; the rest of the last vector becomes zero.
template <class T>
void read_pixels(const PixelDecoder& d, const Planes& planes, const Place& place, int channels, int first, int rows,
                 Panels<T> target) {
  with_storage<T>(d.dtype, [&](auto storage) {
    const auto* base = static_cast<const typename decltype(storage)::Stored*>(planes.data) + place.offset(planes);
    for (int c = 0; c < round_up(channels, kLanes<T>); ++c) {
      T* column = target.panel(c / kPanel<T>) + c % kPanel<T>;
      const auto* plane = base + c * planes.channel_stride;
      for_pixels(planes, d.width, first, rows, [&](int r, std::int64_t at) __attribute__((always_inline)) {
        column[r * kPanel<T>] = c < channels ? storage.get(plane + at) : T(0);
      });
    }
  });
}

template <class T>
void write_pixels(const PixelDecoder& d, const MutablePlanes& planes, const Place& place, int channels, int first,
                  int rows, Panels<T> values) {
  with_storage<T>(d.dtype, [&](auto storage) {
    auto* base = static_cast<typename decltype(storage)::Stored*>(planes.data) + place.offset(planes);
    for (int c = 0; c < channels; ++c) {
      const T* column = values.panel(c / kPanel<T>) + c % kPanel<T>;
      auto* plane = base + c * planes.channel_stride;
      for_pixels(planes, d.width, first, rows, [&](int r, std::int64_t at) __attribute__((always_inline)) {
        storage.put(plane + at, column[r * kPanel<T>]);
      });
    }
  });
}

// A dense [rows, columns] matrix of the computed type as panels.
template <class T>
Panels<T> dense_panels(const void* source, int rows, int columns, Arena<T>& arena) {
  const Panels<T> target = arena.matrix(round_up(rows, kPanel<T>), columns);
  if (target.data) {
    for (int r = 0; r < round_up(rows, kPanel<T>); ++r) {
      const T* row = static_cast<const T*>(source) + static_cast<std::ptrdiff_t>(r) * columns;
      if (r < rows) {
        unpack_row<T>(Native<T>{}, row, columns, target, r);
      } else {
        for (int c = 0; c < panels<T>(columns) * kPanel<T>; ++c) target.row(c / kPanel<T>, r)[c % kPanel<T>] = T(0);
      }
    }
  }
  return target;
}

// The first element of matrix `index` of a block, for the run's first patch.
template <class T, class G>
auto matrix(const PixelDecoder& d, const G& generated, int block, int index) {
  const std::int64_t item = bytes_of(d.dtype);
  const std::int64_t size = static_cast<std::int64_t>(d.channels) * d.hidden;
  using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(generated.data)>>, const char, char>;
  return static_cast<Byte*>(generated.data) + (block * generated.block_stride + index * size) * item;
}

// One block as a neural field on rows [pixels, channels] in the worker's memory.
template <class T>
NeuralField block_field(const PixelDecoder& d, int block, const T* x) {
  const auto weight = [&](int index, int width) {
    return Matrices{matrix<T>(d, d.generated, block, index), d.generated.patch_stride, width};
  };
  return {.patches = d.count,
          .pixels = static_cast<std::int64_t>(d.height) * d.width,
          .channels = d.channels,
          .hidden = d.hidden,
          .dtype = kComputed<T>,
          .weight_dtype = d.dtype,
          .activation = d.activation,
          .residual = true,
          .normalize_w1 = d.normalize_w1,
          .normalize_w2 = d.normalize_w2,
          .normalize_w_gate = d.normalize_w_gate,
          .norm_eps = d.norm_eps,
          .weight_eps = d.weight_eps,
          .threads = 1,
          .x = {x, 0, d.channels},
          .w1 = weight(d.gated ? 1 : 0, d.hidden),
          .w2 = weight(d.gated ? 2 : 1, d.channels),
          .w_gate = d.gated ? weight(0, d.hidden) : Matrices{},
          .norm_weight = static_cast<const T*>(d.norm_weights) + static_cast<std::ptrdiff_t>(block) * d.channels};
}

// Call function(first, rows) for every tile of a patch.
template <class T, class Function>
PIXNERD_INLINE void each_tile(const Plan<T>& plan, Function&& function) {
  for (int first = 0; first < plan.pixels; first += plan.tile) {
    function(first, at_most(plan.tile, plan.pixels - first));
  }
}

// The layers around the blocks, on tiles.
template <class T>
struct Ends {
  Panels<T> pixel_weight, linear_weight;  // [image_channels, channels], [channels, out_channels]
  Panels<T> pixels, out;                  // [tile, image_channels], [tile, out_channels]
  T *linear_bias = nullptr, *final_norm = nullptr;

  Ends(const PixelDecoder& d, int tile, Arena<T>& arena) {
    pixel_weight = dense_panels<T>(d.pixel_weight, d.image_channels, d.channels, arena);
    pixels = arena.matrix(tile, d.image_channels);
    out = arena.matrix(tile, d.out_channels);
    if (d.linear_weight) {
      linear_weight = dense_panels<T>(d.linear_weight, d.channels, d.out_channels, arena);
      linear_bias = padded(d.linear_bias, d.out_channels, arena);
    }
    if (d.final_norm) final_norm = padded(d.final_norm, d.channels, arena);
  }

 private:
  static T* padded(const void* source, int size, Arena<T>& arena) {
    T* target = arena.vector(panels<T>(size) * kPanel<T>);
    if (target && source) pad<T>(source, size, target);
    for (int c = 0; target && !source && c < panels<T>(size) * kPanel<T>; ++c) target[c] = T(0);
    return target;
  }
};

// Rows [tile] of x from the pixels.
template <class T>
void embed(const PixelDecoder& d, const Ends<T>& ends, const Place& place, int first, int rows, Panels<T> n, T* x) {
  const int channels = d.channels;
  read_pixels<T>(d, d.image, place, d.image_channels, first, rows, ends.pixels);
  multiply_into<T>(rows, channels, d.image_channels, ends.pixels, ends.pixel_weight, n,
                   [](Vec<T> v, int, std::ptrdiff_t) { return v; });
  const Matrices table{static_cast<const T*>(d.table), 0, channels};
  write_rows<T>(n, &table, kComputed<T>, 0, first, rows, channels, {x, 0, channels});
}

// The result of a tile from n = x or norm(x).
template <class T>
Panels<T> project(const PixelDecoder& d, const Ends<T>& ends, int rows, Panels<T> n) {
  if (!d.linear_weight) return n;
  multiply_into<T>(rows, d.out_channels, d.channels, n, ends.linear_weight, ends.out,
                   [&](Vec<T> v, int c, std::ptrdiff_t) { return v + load<T>(ends.linear_bias + c); });
  return ends.out;
}

template <class T>
void final_norm(const PixelDecoder& d, const Ends<T>& ends, const T* x, int first, int rows, Panels<T> n,
                T* inverse) {
  read_rows<T>({x, 0, d.channels}, kComputed<T>, 0, first, rows, d.channels, n);
  if (ends.final_norm) rms_norm<T>(n, rows, d.channels, T(d.norm_eps), ends.final_norm, inverse);
}

}  // namespace pixnerd::PIXNERD_ISA
