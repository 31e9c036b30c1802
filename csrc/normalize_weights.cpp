#include "normalize_weights.h"

#include "rows.h"

namespace pixnerd::PIXNERD_ISA {
namespace {

// Columns that a worker takes at a time: rows are read as runs of this length, and the sums stay in cache.
constexpr int kChunk = 512;
// Rows that are summed one after the other; the sums of such blocks are added up in double.
constexpr int kBlock = 128;

// Per column: the sum of squares, then 1 / max(norm, eps); and the dot product with the gradient, then the factor of
// the projection, dot * inverse^2, or zero where the norm is clamped.
template <class T>
struct Sums {
  T squares[kChunk], dots[kChunk];
  double total_squares[kChunk], total_dots[kChunk];

  void clear(int columns) {
    for (int c = 0; c < columns; ++c) total_squares[c] = total_dots[c] = 0;
    clear_block(columns);
  }
  void clear_block(int columns) {
    for (int c = 0; c < columns; ++c) squares[c] = dots[c] = T(0);
  }
  void add_block(int columns) {
    for (int c = 0; c < columns; ++c) {
      total_squares[c] += squares[c];
      total_dots[c] += dots[c];
    }
    clear_block(columns);
  }
  // `constant`: for a gradient of columns of one row, whose result is 1 or -1 unless the norm is clamped.
  void finish(int columns, T eps, bool constant) {
    for (int c = 0; c < columns; ++c) {
      const T norm = static_cast<T>(square_root(total_squares[c]));
      const T inverse = T(1) / (norm < eps ? eps : norm);
      dots[c] = norm < eps ? T(0) : static_cast<T>(total_dots[c]) * inverse * inverse;
      squares[c] = constant && !(norm < eps) ? T(0) : inverse;
    }
  }
};

// function(sums, offset of the first element, columns) for every chunk of every matrix.
template <class T, class Function>
void for_chunks(const ColumnNorm& n, Function&& function) {
  const std::int64_t chunks = (n.columns + kChunk - 1) / kChunk;
  parallel_for(n.outer * chunks, n.threads, [&](int, std::int64_t item) {
    const std::int64_t first = item % chunks * kChunk, left = n.columns - first;
    const int columns = static_cast<int>(left < kChunk ? left : kChunk);
    Sums<T> sums;
    sums.clear(round_up(columns, kLanes<T>));
    function(sums, item / chunks * n.rows * n.columns + first, columns);
  });
}

// The same for matrices of one column: function(sums, offset) with vectors along the rows, summed lane by lane.
template <class T, class Function>
void for_rows(const ColumnNorm& n, Function&& function) {
  parallel_for(n.outer, n.threads, [&](int, std::int64_t item) {
    Sums<T> sums;
    sums.clear(kLanes<T>);
    function(sums, item * n.rows);
  });
}

// One matrix: two passes over its rows. With a gradient g and u = w * inverse the result is
// (g - u * sum(u * g)) * inverse, without the projection where the norm is clamped; without one it is u.
template <class T, class Storage>
void run_columns(Storage storage, const ColumnNorm& n, const void* grad, void* out) {
  using Stored = typename Storage::Stored;
  for_chunks<T>(n, [&](Sums<T>& sums, std::int64_t at, int columns) {
    const Stored* w = static_cast<const Stored*>(n.w) + at;
    const Stored* g = grad ? static_cast<const Stored*>(grad) + at : nullptr;
    Stored* target = static_cast<Stored*>(out) + at;
    for (std::int64_t r = 0; r < n.rows; ++r) {
      for (int c = 0; c < columns; c += kLanes<T>) {
        const Vec<T> v = load_columns<T>(storage, w + r * n.columns, c, columns);
        store<T>(sums.squares + c, load<T>(sums.squares + c) + v * v);
        if (!g) continue;
        const Vec<T> d = load_columns<T>(storage, g + r * n.columns, c, columns);
        store<T>(sums.dots + c, load<T>(sums.dots + c) + v * d);
      }
      if (r % kBlock == kBlock - 1 || r == n.rows - 1) sums.add_block(round_up(columns, kLanes<T>));
    }
    sums.finish(columns, T(n.eps), g && n.rows == 1);
    for (std::int64_t r = 0; r < n.rows; ++r) {
      for (int c = 0; c < columns; c += kLanes<T>) {
        Vec<T> v = load_columns<T>(storage, w + r * n.columns, c, columns);
        if (g) v = load_columns<T>(storage, g + r * n.columns, c, columns) - v * load<T>(sums.dots + c);
        store_columns<T>(storage, target + r * n.columns, c, columns, v * load<T>(sums.squares + c));
      }
    }
  });
}

// The same where every matrix is one dense column.
template <class T, class Storage>
void run_rows(Storage storage, const ColumnNorm& n, const void* grad, void* out) {
  using Stored = typename Storage::Stored;
  constexpr int kLength = kBlock * kLanes<T>;
  for_rows<T>(n, [&](Sums<T>& sums, std::int64_t at) {
    const Stored* w = static_cast<const Stored*>(n.w) + at;
    const Stored* g = grad ? static_cast<const Stored*>(grad) + at : nullptr;
    Stored* target = static_cast<Stored*>(out) + at;
    for (std::int64_t first = 0; first < n.rows; first += kLength) {
      const int length = static_cast<int>(n.rows - first < kLength ? n.rows - first : kLength);
      Vec<T> squares{}, dots{};
      for (int r = 0; r < length; r += kLanes<T>) {
        const Vec<T> v = load_columns<T>(storage, w + first, r, length);
        squares += v * v;
        if (g) dots += v * load_columns<T>(storage, g + first, r, length);
      }
      store<T>(sums.squares, squares);
      store<T>(sums.dots, dots);
      sums.add_block(kLanes<T>);
    }
    for (int i = 1; i < kLanes<T>; ++i) {
      sums.total_squares[0] += sums.total_squares[i];
      sums.total_dots[0] += sums.total_dots[i];
    }
    sums.finish(1, T(n.eps), g && n.rows == 1);
    for (std::int64_t first = 0; first < n.rows; first += kLength) {
      const int length = static_cast<int>(n.rows - first < kLength ? n.rows - first : kLength);
      for (int r = 0; r < length; r += kLanes<T>) {
        Vec<T> v = load_columns<T>(storage, w + first, r, length);
        if (g) v = load_columns<T>(storage, g + first, r, length) - v * sums.dots[0];
        store_columns<T>(storage, target + first, r, length, v * sums.squares[0]);
      }
    }
  });
}

void run(const ColumnNorm& n, const void* grad, void* out) {
  with_types(n.dtype, [&](auto type, auto storage) {
    using T = decltype(type);
    n.columns == 1 ? run_rows<T>(storage, n, grad, out) : run_columns<T>(storage, n, grad, out);
  });
}

}  // namespace

void normalize_weights_forward(const ColumnNorm& n, void* out) { run(n, nullptr, out); }

void normalize_weights_backward(const ColumnNorm& n, const void* grad, void* out) { run(n, grad, out); }

}  // namespace pixnerd::PIXNERD_ISA
