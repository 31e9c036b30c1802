#include "normalize_weights.h"

#include "gemm.h"
#include "parallel.h"

namespace pixnerd::PIXNERD_ISA {
namespace {

// A worker takes one vector of neighbouring columns of one matrix: two passes over its rows.
template <class T, class Function>
void for_columns(const ColumnNorm& n, Function&& function) {
  const std::int64_t blocks = (n.columns + kLanes<T> - 1) / kLanes<T>;
  parallel_for(n.outer * blocks, n.threads, [&](int, std::int64_t item) {
    const std::int64_t first = item % blocks * kLanes<T>;
    const std::int64_t left = n.columns - first;
    function(item / blocks * n.rows * n.columns + first,
             static_cast<int>(left < kLanes<T> ? left : kLanes<T>));
  });
}

// Call function(row pointer) ... in the stored type of n.dtype, T being the type computed in.
template <class Function>
void dispatch(const ColumnNorm& n, Function&& function) {
  if (n.dtype == DType::kFloat64) {
    with_storage<double>(n.dtype, [&](auto storage) { function(double{}, storage); });
  } else {
    with_storage<float>(n.dtype, [&](auto storage) { function(float{}, storage); });
  }
}

template <class T>
PIXNERD_INLINE Vec<T> inverse_norm(Vec<T> squares, T eps, Vec<T>& slope) {
  Vec<T> inverse;
  for (int i = 0; i < kLanes<T>; ++i) {
    const T norm = square_root(squares[i]);
    inverse[i] = T(1) / (norm < eps ? eps : norm);
    slope[i] = norm < eps ? T(0) : inverse[i];
  }
  return inverse;
}

}  // namespace

void normalize_weights_forward(const ColumnNorm& n, void* out) {
  dispatch(n, [&](auto type, auto storage) {
    using T = decltype(type);
    using Stored = typename decltype(storage)::Stored;
    const auto* w = static_cast<const Stored*>(n.w);
    auto* target = static_cast<Stored*>(out);
    for_columns<T>(n, [&](std::int64_t at, int lanes) {
      Vec<T> squares{}, slope;
      for (std::int64_t r = 0; r < n.rows; ++r) {
        const Vec<T> v = load_columns<T>(storage, w + at + r * n.columns, 0, lanes);
        squares += v * v;
      }
      const Vec<T> inverse = inverse_norm<T>(squares, T(n.eps), slope);
      for (std::int64_t r = 0; r < n.rows; ++r) {
        const std::int64_t row = at + r * n.columns;
        store_columns<T>(storage, target + row, 0, lanes,
                         load_columns<T>(storage, w + row, 0, lanes) * inverse);
      }
    });
  });
}

// With u = w * inverse: (g - u * sum(u * g)) * inverse, without the projection where the norm is clamped.
void normalize_weights_backward(const ColumnNorm& n, const void* grad, void* out) {
  dispatch(n, [&](auto type, auto storage) {
    using T = decltype(type);
    using Stored = typename decltype(storage)::Stored;
    const auto* w = static_cast<const Stored*>(n.w);
    const auto* g = static_cast<const Stored*>(grad);
    auto* target = static_cast<Stored*>(out);
    for_columns<T>(n, [&](std::int64_t at, int lanes) {
      Vec<T> squares{}, dot{}, slope;
      for (std::int64_t r = 0; r < n.rows; ++r) {
        const Vec<T> v = load_columns<T>(storage, w + at + r * n.columns, 0, lanes);
        squares += v * v;
        dot += v * load_columns<T>(storage, g + at + r * n.columns, 0, lanes);
      }
      const Vec<T> inverse = inverse_norm<T>(squares, T(n.eps), slope);
      const Vec<T> projection = dot * slope * slope;
      for (std::int64_t r = 0; r < n.rows; ++r) {
        const std::int64_t row = at + r * n.columns;
        const Vec<T> v = load_columns<T>(storage, w + row, 0, lanes);
        const Vec<T> d = (load_columns<T>(storage, g + row, 0, lanes) - v * projection) * inverse;
        store_columns<T>(storage, target + row, 0, lanes, d);
      }
    });
  });
}

}  // namespace pixnerd::PIXNERD_ISA
