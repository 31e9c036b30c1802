#include "swiglu.h"

#include "rows.h"

namespace pixnerd::PIXNERD_ISA {
namespace {

// Columns that a worker takes at a time: few long rows are shared out too.
constexpr std::int64_t kChunkColumns = 4096;

// Call function(row, first column, columns) for every piece.
template <class Function>
void for_pieces(const Swiglu& s, Function&& function) {
  const std::int64_t pieces = (s.columns + kChunkColumns - 1) / kChunkColumns;
  for_row_chunks(pieces, s.rows, s.threads,
                 [&](int, std::int64_t, std::int64_t piece, std::int64_t first, std::int64_t count) {
                   const std::int64_t column = piece * kChunkColumns, left = s.columns - column;
                   const int columns = static_cast<int>(left < kChunkColumns ? left : kChunkColumns);
                   for (std::int64_t r = first; r < first + count; ++r) function(r, column, columns);
                 });
}

template <class T, class Storage>
void forward(Storage storage, const Swiglu& s, MutableMatrices out) {
  for_pieces(s, [&](std::int64_t r, std::int64_t column, int columns) {
    const auto *gate = row_of(storage, s.gate, 0, r) + column, *up = row_of(storage, s.up, 0, r) + column;
    auto* target = row_of(storage, out, 0, r) + column;
    for (int c = 0; c < columns; c += kLanes<T>) {
      const Vec<T> g = load_columns<T>(storage, gate, c, columns);
      const Vec<T> v = times_sigmoid<T>(g, g) * load_columns<T>(storage, up, c, columns);
      store_columns<T>(storage, target, c, columns, v);
    }
  });
}

template <class T, class Storage>
void backward(Storage storage, const Swiglu& s, Matrices grad, MutableMatrices d_gate, MutableMatrices d_up) {
  for_pieces(s, [&](std::int64_t r, std::int64_t column, int columns) {
    const auto *gate = row_of(storage, s.gate, 0, r) + column, *up = row_of(storage, s.up, 0, r) + column;
    const auto* d = row_of(storage, grad, 0, r) + column;
    auto *to_gate = row_of(storage, d_gate, 0, r) + column, *to_up = row_of(storage, d_up, 0, r) + column;
    for (int c = 0; c < columns; c += kLanes<T>) {
      const Vec<T> g = load_columns<T>(storage, gate, c, columns), v = load_columns<T>(storage, d, c, columns);
      Vec<T> sigmoid_g, complement;
      sigmoid<T>(g, sigmoid_g, complement);
      const Vec<T> silu = g * sigmoid_g, slope = sigmoid_g + silu * complement;
      store_columns<T>(storage, to_gate, c, columns, v * load_columns<T>(storage, up, c, columns) * slope);
      store_columns<T>(storage, to_up, c, columns, v * silu);
    }
  });
}

}  // namespace

void swiglu_forward(const Swiglu& s, MutableMatrices out) {
  with_types(s.dtype, [&](auto type, auto storage) { forward<decltype(type)>(storage, s, out); });
}

void swiglu_backward(const Swiglu& s, Matrices grad, MutableMatrices d_gate, MutableMatrices d_up) {
  with_types(s.dtype, [&](auto type, auto storage) { backward<decltype(type)>(storage, s, grad, d_gate, d_up); });
}

}  // namespace pixnerd::PIXNERD_ISA
