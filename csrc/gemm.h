// Small matrix products on panel matrices, with the work on each finished block left to the caller.
//
// A panel matrix stores an R x C matrix as ceil(C / W) panels of R x W elements, each row-major, W =
// kPanel<T> (two vectors). Element (r, c) is at (c / W) * panel_stride + r * W + c % W. All strides inside a
// panel are constants, a panel's rows are whole vectors, and one layout serves as the left operand, the right
// operand and the result of the next product.
#pragma once

#include <type_traits>

#include "simd.h"

namespace pixnerd::PIXNERD_ISA {

template <class T>
inline constexpr int kPanel = 2 * kLanes<T>;

// Rows of a register block: kRows x 2 accumulators, plus operands, fill the register file.
#if defined(PIXNERD_ISA_AVX512)
inline constexpr int kRows = 8;
#elif defined(PIXNERD_ISA_AVX2)
inline constexpr int kRows = 6;
#else
inline constexpr int kRows = 4;
#endif

PIXNERD_INLINE int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }
PIXNERD_INLINE int at_most(int value, int limit) { return value < limit ? value : limit; }

template <class T>
PIXNERD_INLINE int panels(int columns) {
  return (columns + kPanel<T> - 1) / kPanel<T>;
}

// A panel matrix: its data and the distance in elements from one panel to the next.
template <class T>
struct Panels {
  T* data;
  std::ptrdiff_t stride;

  PIXNERD_INLINE T* panel(int p) const { return data + p * stride; }
  PIXNERD_INLINE T* row(int p, int r) const { return data + p * stride + r * kPanel<T>; }
};

// One block of accumulators: Rows x Vectors vectors.
template <class T, int Rows, int Vectors>
struct Block {
  Vec<T> v[Rows][Vectors];

  PIXNERD_INLINE Block() {
    for (int i = 0; i < Rows; ++i) {
      for (int j = 0; j < Vectors; ++j) v[i][j] = Vec<T>{};
    }
  }
};

// acc += A[0:Rows, 0:depth] @ B[0:depth, 0:Vectors] for a left operand whose columns are the summed index.
template <int Rows, int Vectors, class T, class O>
PIXNERD_INLINE void accumulate_rows(Block<T, Rows, Vectors>& acc, const O* a, std::ptrdiff_t a_panel, const O* b,
                                    int depth) {
  for (int k0 = 0; k0 < depth; k0 += kPanel<T>, a += a_panel) {
    const int count = at_most(kPanel<T>, depth - k0);
    for (int k = 0; k < count; ++k, b += kPanel<T>) {
      Vec<O> right[Vectors];
      for (int j = 0; j < Vectors; ++j) right[j] = load<O>(b + j * kLanes<T>);
      for (int i = 0; i < Rows; ++i) {
        const Vec<O> left = broadcast(a[i * kPanel<T> + k]);
        for (int j = 0; j < Vectors; ++j) acc.v[i][j] = multiply_add<T, O>(acc.v[i][j], left, right[j]);
      }
    }
  }
}

// acc += A[0:depth, 0:Rows]^T @ B[0:depth, 0:Vectors] for a left operand whose rows are the summed index.
template <int Rows, int Vectors, class T, class O>
PIXNERD_INLINE void accumulate_columns(Block<T, Rows, Vectors>& acc, const O* a, const O* b, int depth) {
  for (int k = 0; k < depth; ++k, a += kPanel<T>, b += kPanel<T>) {
    Vec<O> right[Vectors];
    for (int j = 0; j < Vectors; ++j) right[j] = load<O>(b + j * kLanes<T>);
    for (int i = 0; i < Rows; ++i) {
      const Vec<O> left = broadcast(a[i]);
      for (int j = 0; j < Vectors; ++j) acc.v[i][j] = multiply_add<T, O>(acc.v[i][j], left, right[j]);
    }
  }
}

template <int Vectors, class T, class O, class Epilogue>
PIXNERD_INLINE void multiply_panel(int p, int rows, int depth, Panels<O> a, const O* b, Epilogue& epilogue) {
  for (int r = 0; r < rows; r += kRows) {
    Block<T, kRows, Vectors> acc;
    accumulate_rows(acc, a.data + r * kPanel<T>, a.stride, b, depth);
    epilogue(r, p, acc);
  }
}

// C = A @ B with A [rows, depth] and B [depth, columns]. epilogue(r, p, block) receives rows r ... r + kRows
// - 1 of panel p. Rows are computed in whole blocks: A must have round_up(rows, kRows) readable rows.
template <class T, class O, class Epilogue>
PIXNERD_INLINE void multiply(int rows, int columns, int depth, Panels<O> a, Panels<O> b, Epilogue&& epilogue) {
  for (int p = 0; p < panels<T>(columns); ++p) {
    if (columns - p * kPanel<T> > kLanes<T>) {
      multiply_panel<2, T>(p, rows, depth, a, b.panel(p), epilogue);
    } else {
      multiply_panel<1, T>(p, rows, depth, a, b.panel(p), epilogue);
    }
  }
}

template <int Rows, int Vectors, class T, class O>
PIXNERD_INLINE void add_outer_block(T* c, const O* a, const O* b, int depth, bool add) {
  Block<T, Rows, Vectors> acc;
  accumulate_columns(acc, a, b, depth);
  for (int i = 0; i < Rows; ++i) {
    for (int j = 0; j < Vectors; ++j) {
      T* p = c + i * kPanel<T> + j * kLanes<T>;
      store<T>(p, add ? load<T>(p) + acc.v[i][j] : acc.v[i][j]);
    }
  }
}

template <int Vectors, class T, class O>
PIXNERD_INLINE void outer_panel(int rows, int depth, Panels<O> a, const O* b, T* c, bool add) {
  constexpr int kRest = kPanel<T> % kRows;
  for (int q = 0; q < panels<T>(rows); ++q) {
    const int wanted = at_most(kPanel<T>, rows - q * kPanel<T>);
    T* target = c + static_cast<std::ptrdiff_t>(q) * kPanel<T> * kPanel<T>;
    int r = 0;
    for (; r < wanted && r + kRows <= kPanel<T>; r += kRows) {
      add_outer_block<kRows, Vectors>(target + r * kPanel<T>, a.panel(q) + r, b, depth, add);
    }
    if constexpr (kRest != 0) {
      if (r < wanted) {
        add_outer_block<kRest, Vectors>(target + r * kPanel<T>, a.panel(q) + r, b, depth, add);
      }
    }
  }
}

// C [rows, columns] = A^T @ B, or += with `add`, for A [depth, rows] and B [depth, columns]. C must have
// round_up(rows, kPanel<T>) rows.
template <class T, class O>
PIXNERD_INLINE void multiply_transposed(int rows, int columns, int depth, Panels<O> a, Panels<O> b, Panels<T> c,
                                        bool add) {
  for (int p = 0; p < panels<T>(columns); ++p) {
    if (columns - p * kPanel<T> > kLanes<T>) {
      outer_panel<2>(rows, depth, a, b.panel(p), c.panel(p), add);
    } else {
      outer_panel<1>(rows, depth, a, b.panel(p), c.panel(p), add);
    }
  }
}

// Operands of products are numbers of the computed type T, or pairs of them in bfloat16, of which a product takes one
// for the other with half the depth: pairs of columns in a left operand whose columns are the summed index, pairs of
// rows in one whose rows are, and in right operands. An odd row or column has a zero beside it.
template <class T, class O>
PIXNERD_INLINE int depth_of(int count) {
  return std::is_same_v<T, O> ? count : (count + 1) / 2;
}

// [rows, columns] as a left operand of `multiply`: itself, or in `room`, [round_up(rows, kRows), columns / 2].
template <class O, class T>
PIXNERD_INLINE Panels<O> by_columns(int rows, int columns, Panels<T> source, [[maybe_unused]] Panels<O> room) {
  if constexpr (std::is_same_v<T, O>) {
    return source;
  } else {
    for (int p = 0; p < panels<T>(columns); ++p) {
      for (int r = 0; r < round_up(rows, kRows); ++r) {
        const T* row = source.row(p, r);
        store<O>(room.row(p / 2, r) + p % 2 * kLanes<T>, pairs_of_neighbours(load<T>(row), load<T>(row + kLanes<T>)));
      }
    }
    return room;
  }
}

// [rows, columns] as any other operand: itself, or in `room`, [rows / 2, columns].
template <class O, class T>
PIXNERD_INLINE Panels<O> by_rows(int rows, int columns, Panels<T> source, [[maybe_unused]] Panels<O> room) {
  if constexpr (std::is_same_v<T, O>) {
    return source;
  } else {
    for (int p = 0; p < panels<T>(columns); ++p) {
      for (int r = 0; r < rows; r += 2) {
        for (int j = 0; j < kPanel<T>; j += kLanes<T>) {
          const Vec<T> second = r + 1 < rows ? load<T>(source.row(p, r + 1) + j) : Vec<T>{};
          store<O>(room.row(p, r / 2) + j, pairs_of_lanes(load<T>(source.row(p, r) + j), second));
        }
      }
    }
    return room;
  }
}

// Row r of a panel matrix from `columns` stored elements; the rest of the last panel becomes zero.
template <class T, class Storage>
PIXNERD_INLINE void unpack_row(Storage, const typename Storage::Stored* source, int columns, Panels<T> target,
                               int r) {
  constexpr int kWidth = kLanes<T>;
  for (int c = 0; c < panels<T>(columns) * kPanel<T>; c += kWidth) {
    T* out = target.row(c / kPanel<T>, r) + c % kPanel<T>;
    if (c + kWidth <= columns) {
      store<T>(out, Storage::load_vector(source + c));
    } else {
      for (int i = 0; i < kWidth; ++i) out[i] = c + i < columns ? Storage::get(source + c + i) : T(0);
    }
  }
}

// Vectors of row r that hold at least one column: function(column, pointer to the vector).
template <class T, class Function>
PIXNERD_INLINE void for_row(Panels<T> m, int r, int columns, Function&& function) {
  for (int c = 0; c < columns; c += kLanes<T>) function(c, m.row(c / kPanel<T>, r) + c % kPanel<T>);
}

// Store a vector of results as columns c ... of a row; only those below `columns` are written.
template <class T, class Storage>
PIXNERD_INLINE void store_columns(Storage storage, typename Storage::Stored* row, int c, int columns, Vec<T> v) {
  if (c + kLanes<T> <= columns) {
    Storage::store_vector(row + c, v);
  } else if (c < columns) {
    store_first<T>(storage, row + c, columns - c, v);
  }
}

// Load columns c ... of a row; columns at and past `columns` are zero.
template <class T, class Storage>
PIXNERD_INLINE Vec<T> load_columns(Storage storage, const typename Storage::Stored* row, int c, int columns) {
  if (c + kLanes<T> <= columns) return Storage::load_vector(row + c);
  return c < columns ? load_first<T>(storage, row + c, columns - c) : Vec<T>{};
}

// Alternate the lanes of a and b: the lower halves, or with Upper the upper halves.
template <class T, bool Upper>
PIXNERD_INLINE Vec<T> interleave(Vec<T> a, Vec<T> b) {
  using I [[maybe_unused]] = typename VectorOf<std::conditional_t<sizeof(T) == 8, std::int64_t, std::int32_t>>::type;
  constexpr int n = kLanes<T>, h = Upper ? n / 2 : 0;
  if constexpr (n == 2) {
    return PIXNERD_SHUFFLE(a, b, I, h, n + h);
  } else if constexpr (n == 4) {
    return PIXNERD_SHUFFLE(a, b, I, h, n + h, h + 1, n + h + 1);
  } else if constexpr (n == 8) {
    return PIXNERD_SHUFFLE(a, b, I, h, n + h, h + 1, n + h + 1, h + 2, n + h + 2, h + 3, n + h + 3);
  } else {
    return PIXNERD_SHUFFLE(a, b, I, h, n + h, h + 1, n + h + 1, h + 2, n + h + 2, h + 3, n + h + 3, h + 4, n + h + 4,
                           h + 5, n + h + 5, h + 6, n + h + 6, h + 7, n + h + 7);
  }
}

// Transpose a square tile in registers, by log2(n) rounds of perfect shuffles.
template <class T>
PIXNERD_INLINE void transpose_tile(Vec<T> (&tile)[kLanes<T>]) {
  constexpr int n = kLanes<T>;
  Vec<T> next[n];
  for (int width = 1; width < n; width *= 2) {
    for (int i = 0; i < n / 2; ++i) {
      next[2 * i] = interleave<T, false>(tile[i], tile[i + n / 2]);
      next[2 * i + 1] = interleave<T, true>(tile[i], tile[i + n / 2]);
    }
    for (int i = 0; i < n; ++i) tile[i] = next[i];
  }
}

// target [columns, rows] = source [rows, columns]^T. Reads whole square tiles: the source needs rows rounded
// up to kLanes<T>, and past its `rows` they must be finite; the target's padding columns receive them.
template <class T>
PIXNERD_INLINE void transpose(int rows, int columns, Panels<T> source, Panels<T> target) {
  constexpr int n = kLanes<T>;
  for (int r = 0; r < rows; r += n) {
    for (int c = 0; c < columns; c += n) {
      Vec<T> tile[n];
      for (int i = 0; i < n; ++i) tile[i] = load<T>(source.row(c / kPanel<T>, r + i) + c % kPanel<T>);
      transpose_tile<T>(tile);
      for (int i = 0; i < n; ++i) store<T>(target.row(r / kPanel<T>, c + i) + r % kPanel<T>, tile[i]);
    }
  }
}

}  // namespace pixnerd::PIXNERD_ISA
