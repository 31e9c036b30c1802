#include "normalize_weights.h"

#include "gemm.h"
#include "parallel.h"

namespace pixnerd::PIXNERD_ISA {
namespace {

// Columns that a worker takes at a time: rows are read as runs of this length, and the sums stay in cache.
constexpr int kChunk = 512;

template <class T>
struct Sums {
  T squares[kChunk];
  T dots[kChunk];
};

// function(sums, offset of the first element, columns) for every chunk of columns of every matrix.
template <class T, class Function>
void for_chunks(const ColumnNorm& n, Function&& function) {
  const std::int64_t chunks = (n.columns + kChunk - 1) / kChunk;
  parallel_for(n.outer * chunks, n.threads, [&](int, std::int64_t item) {
    const std::int64_t first = item % chunks * kChunk, left = n.columns - first;
    Sums<T> sums;
    for (int c = 0; c < kChunk; ++c) sums.squares[c] = sums.dots[c] = T(0);
    function(sums, item / chunks * n.rows * n.columns + first, static_cast<int>(left < kChunk ? left : kChunk));
  });
}

// Call function(a value of the type computed in, the storage of n.dtype).
template <class Function>
void dispatch(const ColumnNorm& n, Function&& function) {
  if (n.dtype == DType::kFloat64) {
    with_storage<double>(n.dtype, [&](auto storage) { function(double{}, storage); });
  } else {
    with_storage<float>(n.dtype, [&](auto storage) { function(float{}, storage); });
  }
}

// Replace sums of squares by 1 / max(norm, eps), and dot products by the projection's factor: dot *
// inverse^2, or zero where the norm is clamped.
template <class T>
void finish(Sums<T>& sums, int columns, T eps) {
  for (int c = 0; c < columns; ++c) {
    const T norm = square_root(sums.squares[c]);
    const T inverse = T(1) / (norm < eps ? eps : norm);
    sums.dots[c] = norm < eps ? T(0) : sums.dots[c] * inverse * inverse;
    sums.squares[c] = inverse;
  }
}

}  // namespace

void normalize_weights_forward(const ColumnNorm& n, void* out) {
  dispatch(n, [&](auto type, auto storage) {
    using T = decltype(type);
    using Stored = typename decltype(storage)::Stored;
    for_chunks<T>(n, [&](Sums<T>& sums, std::int64_t at, int columns) {
      const Stored* w = static_cast<const Stored*>(n.w) + at;
      Stored* target = static_cast<Stored*>(out) + at;
      for (std::int64_t r = 0; r < n.rows; ++r) {
        for (int c = 0; c < columns; c += kLanes<T>) {
          const Vec<T> v = load_columns<T>(storage, w + r * n.columns, c, columns);
          store<T>(sums.squares + c, load<T>(sums.squares + c) + v * v);
        }
      }
      finish<T>(sums, columns, T(n.eps));
      for (std::int64_t r = 0; r < n.rows; ++r) {
        for (int c = 0; c < columns; c += kLanes<T>) {
          const Vec<T> v = load_columns<T>(storage, w + r * n.columns, c, columns);
          store_columns<T>(storage, target + r * n.columns, c, columns, v * load<T>(sums.squares + c));
        }
      }
    });
  });
}

// With u = w * inverse: (g - u * sum(u * g)) * inverse, without the projection where the norm is clamped.
void normalize_weights_backward(const ColumnNorm& n, const void* grad, void* out) {
  dispatch(n, [&](auto type, auto storage) {
    using T = decltype(type);
    using Stored = typename decltype(storage)::Stored;
    for_chunks<T>(n, [&](Sums<T>& sums, std::int64_t at, int columns) {
      const Stored* w = static_cast<const Stored*>(n.w) + at;
      const Stored* g = static_cast<const Stored*>(grad) + at;
      Stored* target = static_cast<Stored*>(out) + at;
      for (std::int64_t r = 0; r < n.rows; ++r) {
        for (int c = 0; c < columns; c += kLanes<T>) {
          const Vec<T> v = load_columns<T>(storage, w + r * n.columns, c, columns);
          const Vec<T> d = load_columns<T>(storage, g + r * n.columns, c, columns);
          store<T>(sums.squares + c, load<T>(sums.squares + c) + v * v);
          store<T>(sums.dots + c, load<T>(sums.dots + c) + v * d);
        }
      }
      finish<T>(sums, columns, T(n.eps));
      for (std::int64_t r = 0; r < n.rows; ++r) {
        for (int c = 0; c < columns; c += kLanes<T>) {
          const Vec<T> v = load_columns<T>(storage, w + r * n.columns, c, columns);
          const Vec<T> d = load_columns<T>(storage, g + r * n.columns, c, columns);
          const Vec<T> result = (d - v * load<T>(sums.dots + c)) * load<T>(sums.squares + c);
          store_columns<T>(storage, target + r * n.columns, c, columns, result);
        }
      }
    });
  });
}

}  // namespace pixnerd::PIXNERD_ISA
