// The pieces that the forward and backward of the neural-field block share: activations, packed weights, a worker's
// memory, and rows between tensors and panels.
#pragma once

#include "ahead.h"
#include "gemm.h"
#include "neural_field_mlp.h"
#include "parallel.h"
#include "scratch.h"

namespace pixnerd::PIXNERD_ISA {

template <class T>
struct Silu {
  PIXNERD_INLINE static Vec<T> value(Vec<T> z) { return times_sigmoid<T>(z, z); }
  PIXNERD_INLINE static void both(Vec<T> z, Vec<T>& value, Vec<T>& slope) {
    Vec<T> s, complement;
    sigmoid<T>(z, s, complement);
    value = z * s;
    slope = s + value * complement;
  }
};

// z * (1 + tanh(u)) / 2 = z * sigmoid(2 u) with u = sqrt(2 / pi) (z + 0.044715 z^3).
template <class T>
struct Gelu {
  static constexpr T kA = T(1.5957691216057308), kB = T(0.044715);
  PIXNERD_INLINE static Vec<T> value(Vec<T> z) { return times_sigmoid<T>(z, kA * (z + kB * z * z * z)); }
  PIXNERD_INLINE static void both(Vec<T> z, Vec<T>& value, Vec<T>& slope) {
    Vec<T> s, complement;
    sigmoid<T>(kA * (z + kB * z * z * z), s, complement);
    value = z * s;
    slope = s + value * complement * kA * (T(1) + 3 * kB * z * z);
  }
};

template <class T>
struct Relu {
  PIXNERD_INLINE static Vec<T> value(Vec<T> z) { return z < T(0) ? Vec<T>{} : z; }
  PIXNERD_INLINE static void both(Vec<T> z, Vec<T>& value, Vec<T>& slope) {
    value = z < T(0) ? Vec<T>{} : z;
    slope = z <= T(0) ? Vec<T>{} : broadcast(T(1));  // NaN has a slope, so that it reaches the gradients
  }
};

// Call function with a tag of the computed type, of products' operands and of the activation.
template <class... T>
struct Types {};
template <class Function>
void dispatch(DType dtype, Activation activation, Function&& function) {
  const auto with_types = [&]<class T, class O>(Types<T, O>) {
    switch (activation) {
      case Activation::kGelu:
        return function(Types<T, O, Gelu<T>>{});
      case Activation::kRelu:
        return function(Types<T, O, Relu<T>>{});
      default:
        return function(Types<T, O, Silu<T>>{});
    }
  };
#if defined(PIXNERD_ISA_AVX512_BF16)
  if (dtype == DType::kBFloat16) return with_types(Types<float, Pair>{});
#endif
  dtype == DType::kFloat64 ? with_types(Types<double, double>{}) : with_types(Types<float, float>{});
}

// A weight of one patch: its panels, the scale of each column, and the part of the scale that depends on the
// column's norm (zero where the norm is clamped or the weight is not normalised).
template <class T>
struct Weight {
  Panels<T> panels;
  T* scale;
  T* slope;
};

// Hands out pieces of a worker's slice; with a null base it only measures.
template <class T>
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  T* vector(std::ptrdiff_t count) {
    const std::size_t offset = used_;
    used_ += (static_cast<std::size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return base_ ? reinterpret_cast<T*>(base_ + offset) : nullptr;
  }
  Panels<T> matrix(int rows, int columns) {
    const std::ptrdiff_t stride = static_cast<std::ptrdiff_t>(rows) * kPanel<T>;
    return {vector(stride * panels<T>(columns)), stride};
  }
  Weight<T> weight(int rows, int columns) {
    const int padded = panels<T>(columns) * kPanel<T>;
    return {matrix(round_up(rows, kPanel<T>), columns), vector(padded), vector(padded)};
  }
  // Memory for an operand [rows, columns]; none where the matrix itself is one.
  template <class O>
  Panels<O> operand(int rows, int columns) {
    if constexpr (std::is_same_v<T, O>) {
      return {};
    } else {
      const Panels<T> room = matrix(rows, columns);
      return {reinterpret_cast<O*>(room.data), room.stride};
    }
  }
  std::size_t used() const { return used_; }

 private:
  char* base_;
  std::size_t used_ = 0;
};

// Sizes that hold for the whole call.
template <class T>
struct Plan {
  int channels, hidden, pixels, tile;
  bool gated;

  Plan(const NeuralField& f, int vectors_of_channels, int vectors_of_hidden, int budget)
      : channels(f.channels), hidden(f.hidden), pixels(static_cast<int>(f.pixels)), gated(f.w_gate.data != nullptr) {
    const int width = panels<T>(channels) * vectors_of_channels + panels<T>(hidden) * vectors_of_hidden;
    const int fit = budget / (width * kPanel<T> * static_cast<int>(sizeof(T)));
    const int largest = fit < kRows ? kRows : fit / kRows * kRows;
    const int tiles = (pixels + largest - 1) / largest;
    tile = tiles ? round_up((pixels + tiles - 1) / tiles, kRows) : kRows;
  }
};

// Pack one patch's matrix and find its column scales.
template <class T>
void pack(const Matrices& source, DType dtype, std::int64_t patch, int rows, int columns, bool normalize, double eps,
          Weight<T>& weight) {
  const int padded = panels<T>(columns) * kPanel<T>;
  T* squares = weight.scale;
  for (int c = 0; c < padded; ++c) squares[c] = T(0);
  with_storage<T>(dtype, [&](auto storage) {
    using Stored = typename decltype(storage)::Stored;
    const Stored* base = static_cast<const Stored*>(source.data) + patch * source.patch_stride;
    for (int r = 0; r < rows; ++r) {
      const Stored* row = base + r * source.row_stride;
      for (int c = 0; c < padded; c += kLanes<T>) {
        const Vec<T> v = c < columns ? load_columns<T>(storage, row, c, columns) : Vec<T>{};
        store<T>(weight.panels.row(c / kPanel<T>, r) + c % kPanel<T>, v);
        store<T>(squares + c, load<T>(squares + c) + v * v);
      }
    }
  });
  // Transposing reads whole tiles.
  for (int r = rows; r < round_up(rows, kLanes<T>); ++r) {
    for (int c = 0; c < padded; c += kLanes<T>) {
      store<T>(weight.panels.row(c / kPanel<T>, r) + c % kPanel<T>, Vec<T>{});
    }
  }
  for (int c = 0; c < padded; ++c) {
    const T norm = square_root(squares[c]);
    const bool clamped = norm < T(eps);
    weight.scale[c] = c >= columns ? T(0) : normalize ? T(1) / (clamped ? T(eps) : norm) : T(1);
    weight.slope[c] = !normalize || clamped ? T(0) : weight.scale[c];
  }
}

// d - w s * columns_sum(w s * d) in place of d, with s where a weight is normalised: times s, the tangent of w * s
// from that of w; and the gradient of w from that of w * s.
template <class T>
void remove_change_of_norm(const Weight<T>& w, Panels<T> d, int rows, int columns) {
  for (int c = 0; c < columns; c += kLanes<T>) {
    const Vec<T> slope = load<T>(w.slope + c);
    const auto at = [&](Panels<T> m, int r) { return m.row(c / kPanel<T>, r) + c % kPanel<T>; };
    if (rows == 1) {  // normalised, it is 1 or -1, unless the norm is clamped
      store<T>(at(d, 0), load<T>(at(d, 0)) * (slope == T(0) ? broadcast(T(1)) : Vec<T>{}));
      continue;
    }
    Vec<T> dot{};
    for (int r = 0; r < rows; ++r) dot += load<T>(at(w.panels, r)) * slope * load<T>(at(d, r));
    for (int r = 0; r < rows; ++r) {
      store<T>(at(d, r), load<T>(at(d, r)) - load<T>(at(w.panels, r)) * slope * dot);
    }
  }
}

// A patch's matrix (of Matrices or MutableMatrices) will be needed.
template <class M>
void add_ahead(Ahead& ahead, const M& m, DType dtype, std::int64_t patch, int rows, int columns) {
  if (!m.data) return;
  const int size = bytes_of(dtype);
  ahead.add(static_cast<const char*>(m.data) + patch * m.patch_stride * size, rows, columns * size,
            m.row_stride * size);
}

// Rows first ... first + rows of a stored matrix, as numbers.
template <class T>
void read_rows(const Matrices& source, DType dtype, std::int64_t patch, int first, int rows, int columns,
               Panels<T> target) {
  with_storage<T>(dtype, [&](auto storage) {
    using Stored = typename decltype(storage)::Stored;
    const Stored* row =
        static_cast<const Stored*>(source.data) + patch * source.patch_stride + first * source.row_stride;
    for (int r = 0; r < rows; ++r, row += source.row_stride) unpack_row<T>(storage, row, columns, target, r);
  });
}

// Replace the rows of x by n = x * rsqrt(mean(x^2) + eps) * weight, or without the weight where it is null; inverse
// receives the rsqrt of each row.
template <class T>
void rms_norm(Panels<T> x, int rows, int columns, T eps, const T* weight, T* inverse) {
  for (int r = 0; r < rows; ++r) {
    Vec<T> squares{};
    for_row(x, r, columns, [&](int, T* p) { squares += load<T>(p) * load<T>(p); });
    inverse[r] = T(1) / square_root(sum<T>(squares) / T(columns) + eps);
    for_row(x, r, columns, [&](int c, T* p) {
      const Vec<T> unit = load<T>(p) * inverse[r];
      store<T>(p, weight ? unit * load<T>(weight + c) : unit);
    });
  }
}

// Store rows of `values`, plus those of `base` where it is given, to a matrix of the same dtype as base.
template <class T>
void write_rows(Panels<T> values, const Matrices* base, DType dtype, std::int64_t patch, int first, int rows,
                int columns, const MutableMatrices& target) {
  with_storage<T>(dtype, [&](auto storage) {
    using Stored = typename decltype(storage)::Stored;
    for (int r = 0; r < rows; ++r) {
      Stored* out = static_cast<Stored*>(target.data) + patch * target.patch_stride + (first + r) * target.row_stride;
      const Stored* in =
          base ? static_cast<const Stored*>(base->data) + patch * base->patch_stride + (first + r) * base->row_stride
               : nullptr;
      for_row(values, r, columns, [&](int c, T* p) {
        Vec<T> v = load<T>(p);
        if (in) v += load_columns<T>(storage, in, c, columns);
        store_columns<T>(storage, out, c, columns, v);
      });
    }
  });
}

// A vector of the computed type, padded with zeros to whole panels.
template <class T>
void pad(const void* source, int size, T* target) {
  for (int c = 0; c < panels<T>(size) * kPanel<T>; ++c)
    target[c] = c < size ? static_cast<const T*>(source)[c] : T(0);
}

// The padded norm weight, or null.
template <class T>
T* padded_norm_weight(const NeuralField& f, Arena<T>& arena) {
  if (!f.norm_weight) return nullptr;
  T* weight = arena.vector(panels<T>(f.channels) * kPanel<T>);
  if (weight) pad<T>(f.norm_weight, f.channels, weight);
  return weight;
}

// C = A @ B for the pixels of a tile, each finished vector passed through function(vector, column, offset in C).
template <class T, class O, class Function>
PIXNERD_INLINE void multiply_into(int rows, int columns, int depth, Panels<O> a, Panels<O> b, Panels<T> c,
                                  Function&& function) {
  multiply<T>(rows, columns, depth, a, b, [&](int r, int p, auto& block) __attribute__((always_inline)) {
    constexpr int kVectors = sizeof(block.v[0]) / sizeof(block.v[0][0]);
    for (int j = 0; j < kVectors; ++j) {
      const int column = p * kPanel<T> + j * kLanes<T>;
      for (int i = 0; i < kRows; ++i) {
        T* out = c.row(p, r + i) + j * kLanes<T>;
        store<T>(out, function(block.v[i][j], column, out - c.data));
      }
    }
  });
}

}  // namespace pixnerd::PIXNERD_ISA
