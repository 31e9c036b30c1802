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

template <class T>
PIXNERD_INLINE void silu_with_slope(Vec<T> z, Vec<T>& silu, Vec<T>& slope) {
  Vec<T> s, complement;
  sigmoid<T>(z, s, complement);
  silu = z * s;
  slope = s + silu * complement;
}

template <class T, class Storage>
void jvp(Storage storage, const Swiglu& s, const SwigluTangents& t) {
  for_pieces(s, [&](std::int64_t r, std::int64_t column, int columns) {
    const auto *gate = row_of(storage, s.gate, 0, r) + column, *up = row_of(storage, s.up, 0, r) + column;
    const auto* d_gate = t.gate.data ? row_of(storage, t.gate, 0, r) + column : nullptr;
    const auto* d_up = t.up.data ? row_of(storage, t.up, 0, r) + column : nullptr;
    auto *out = row_of(storage, t.out, 0, r) + column, *tangent = row_of(storage, t.out_tangent, 0, r) + column;
    for (int c = 0; c < columns; c += kLanes<T>) {
      const Vec<T> u = load_columns<T>(storage, up, c, columns);
      Vec<T> silu, slope, d{};
      silu_with_slope<T>(load_columns<T>(storage, gate, c, columns), silu, slope);
      if (d_gate) d += load_columns<T>(storage, d_gate, c, columns) * u * slope;
      if (d_up) d += silu * load_columns<T>(storage, d_up, c, columns);
      store_columns<T>(storage, out, c, columns, silu * u);
      store_columns<T>(storage, tangent, c, columns, d);
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
      const Vec<T> v = load_columns<T>(storage, d, c, columns);
      Vec<T> silu, slope;
      silu_with_slope<T>(load_columns<T>(storage, gate, c, columns), silu, slope);
      store_columns<T>(storage, to_gate, c, columns, v * load_columns<T>(storage, up, c, columns) * slope);
      store_columns<T>(storage, to_up, c, columns, v * silu);
    }
  });
}

}  // namespace

void swiglu_forward(const Swiglu& s, MutableMatrices out) {
  with_types(s.dtype, [&](auto type, auto storage) { forward<decltype(type)>(storage, s, out); });
}

void swiglu_jvp(const Swiglu& s, const SwigluTangents& t) {
  with_types(s.dtype, [&](auto type, auto storage) { jvp<decltype(type)>(storage, s, t); });
}

void swiglu_backward(const Swiglu& s, Matrices grad, MutableMatrices d_gate, MutableMatrices d_up) {
  with_types(s.dtype, [&](auto type, auto storage) { backward<decltype(type)>(storage, s, grad, d_gate, d_up); });
}

}  // namespace pixnerd::PIXNERD_ISA
