#include "matmul.h"

#include <cstdint>
#include <type_traits>

#include "ahead.h"
#include "gemm.h"
#include "matmul_few_rows.h"
#include "parallel.h"
#include "scratch.h"

// One operand is cut into panels, packed so that a row of a panel is two vectors, the other into strips, whose
// elements are broadcast. Where the summed index of the latter is contiguous it is read in place: of two such
// operands the longer one, so that what is packed is the shorter. A block of C is then a strip's rows by a panel's
// columns, or those of C^T, which is transposed on its way out.
//
// The operand along the longer side of C is divided among the workers (`own`), the other one is prepared whole
// (`shared`). While a worker multiplies, what it will probably take next comes from memory, and each block of C
// before it is written: the units that multiply never wait for either.
namespace pixnerd::PIXNERD_ISA {
namespace {

// Depth of one pass over C: a panel and a unit of it fit the second-level cache together. A panel that a worker has
// packed for itself has to stay there while all of the other operand passes by, and may be half as deep.
constexpr std::int64_t kDepth = 3072, kOwnPanelDepth = kDepth / 2;
// Depth of the products between two prefetches of the next piece.
constexpr int kStep = 32;
constexpr int kCacheLine = 64;
// Strips are handled by units: whole blocks and whole vectors of every type.
constexpr int kStrips = 4;
constexpr int kUnit = kStrips * kRows;
static_assert(kUnit % kLanes<float> == 0);

// Indices of one pass.
struct Pass {
  std::int64_t first;
  int depth;
};

// One operand as [depth, width].
template <class T>
struct Source {
  Operand m;
  std::int64_t width;

  // Whether each of its columns is contiguous.
  bool deep() const { return m.row_stride == 1; }
  std::int64_t offset(const Pass& pass, std::int64_t column) const {
    return pass.first * m.row_stride + column * m.column_stride;
  }
};

// Operands of a source from one of its elements on: numbers, or pairs of what is stored in bfloat16. A vector of
// those with summed index k in columns c ..., of which those at and past `columns` are zero, or of those with indices
// k ... in column c, of which those at and past the depth are.
template <class T, class Storage>
struct Numbers {
  const typename Storage::Stored* base;
  std::int64_t row_stride, column_stride;
  int depth;

  PIXNERD_INLINE Vec<T> across(int k, int c, int columns) const {
    return load_columns<T>(Storage{}, base + k * row_stride, c, columns);
  }
  PIXNERD_INLINE Vec<T> along(int k, int c) const {
    return load_columns<T>(Storage{}, base + c * column_stride, k, depth);
  }
};
#if defined(PIXNERD_ISA_AVX512_BF16)
struct Pairs {
  const std::uint16_t* base;
  std::int64_t row_stride, column_stride;
  int depth;  // of numbers; an odd last one has a zero beside it

  PIXNERD_INLINE Vec<Pair> across(int k, int c, int columns) const {
    if (c >= columns) return Vec<Pair>{};
    const int rest = columns - c;
    const __mmask16 mask = static_cast<__mmask16>(rest < kLanes<float> ? (1u << rest) - 1 : 0xffffu);
    const auto row = [&](int index) {
      return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, base + index * row_stride + c));
    };
    const __m512i low = row(2 * k);
    if (2 * k + 1 >= depth) return reinterpret_cast<Vec<Pair>>(low);
    return reinterpret_cast<Vec<Pair>>(_mm512_or_si512(low, _mm512_slli_epi32(row(2 * k + 1), 16)));
  }
  PIXNERD_INLINE Vec<Pair> along(int k, int c) const {
    const int rest = depth - 2 * k;
    if (rest <= 0) return Vec<Pair>{};
    const __mmask32 mask = rest < 2 * kLanes<float> ? (1u << rest) - 1 : 0xffffffffu;
    return reinterpret_cast<Vec<Pair>>(_mm512_maskz_loadu_epi16(mask, base + c * column_stride + 2 * k));
  }
};
#endif

// Call function with the operands of a pass from column `first` on.
template <class O, class T, class Function>
PIXNERD_INLINE void with_operands(const Source<T>& s, const Pass& pass, std::int64_t first, Function&& function) {
#if defined(PIXNERD_ISA_AVX512_BF16)
  if constexpr (std::is_same_v<O, Pair>) {
    const auto* base = static_cast<const std::uint16_t*>(s.m.data) + s.offset(pass, first);
    return function(Pairs{base, s.m.row_stride, s.m.column_stride, pass.depth});
  } else
#endif
    with_storage<T>(s.m.dtype, [&](auto storage) {
      using Storage = decltype(storage);
      const auto* base = static_cast<const typename Storage::Stored*>(s.m.data) + s.offset(pass, first);
      function(Numbers<T, Storage>{base, s.m.row_stride, s.m.column_stride, pass.depth});
    });
}

// Columns first ... first + kPanel of a pass into one panel; columns past the width are zero.
template <class O, class T>
void pack_panel(const Source<T>& s, const Pass& pass, std::int64_t first, O* panel) {
  constexpr int n = kLanes<T>;
  const std::int64_t rest = s.width - first;
  const int columns = rest < kPanel<T> ? static_cast<int>(rest) : kPanel<T>;
  const int depth = depth_of<T, O>(pass.depth);
  with_operands<O>(s, pass, first, [&](auto operands) {
    if (!s.deep()) {
      for (int k = 0; k < depth; ++k) {
        for (int c = 0; c < kPanel<T>; c += n) store<O>(panel + k * kPanel<T> + c, operands.across(k, c, columns));
      }
      return;
    }
    for (int c = 0; c < kPanel<T>; c += n) {
      for (int k = 0; k < depth; k += n) {
        Vec<O> tile[n];
        for (int i = 0; i < n; ++i) tile[i] = c + i < columns ? operands.along(k, c + i) : Vec<O>{};
        transpose_tile<O>(tile);
        for (int i = 0; i < n; ++i) store<O>(panel + (k + i) * kPanel<T> + c, tile[i]);
      }
    }
  });
}

// A unit of strips: element (k, i) of strip s is at data[s * strip + i * row + k] of a deep source, else at
// data[s * strip + k * kRows + i].
template <class O>
struct Unit {
  const O* data;
  std::ptrdiff_t strip, row;
};

// Whether columns first ... first + kUnit can be read where they lie. Pairs have to be whole and aligned.
template <class T, class O>
bool in_place(const Source<T>& s, std::int64_t depth, std::int64_t first) {
  if (!s.deep() || first + kUnit > s.width) return false;
  if constexpr (std::is_same_v<T, O>) {
    return bytes_of(s.m.dtype) == static_cast<int>(sizeof(T));
  } else {
    return depth % 2 == 0 && s.m.column_stride % 2 == 0 &&
           reinterpret_cast<std::uintptr_t>(s.m.data) % sizeof(O) == 0;
  }
}

// Those columns in `space` [kUnit, depth rounded up to vectors]; columns past the width are zero.
template <class O, class T>
void pack_unit(const Source<T>& s, const Pass& pass, std::int64_t first, O* space, std::int64_t space_depth) {
  constexpr int n = kLanes<T>;
  const std::int64_t rest = s.width - first;
  const int columns = rest < kUnit ? static_cast<int>(rest) : kUnit;
  const int depth = depth_of<T, O>(pass.depth);
  with_operands<O>(s, pass, first, [&](auto operands) {
    if (s.deep()) {
      for (int i = 0; i < kUnit; ++i) {
        for (int k = 0; k < depth; k += n) {
          store<O>(space + i * space_depth + k, i < columns ? operands.along(k, i) : Vec<O>{});
        }
      }
      return;
    }
    for (int k = 0; k < depth; ++k) {
      O values[kUnit];
      for (int c = 0; c < kUnit; c += n) store<O>(values + c, operands.across(k, c, columns));
      for (int strip = 0; strip < kStrips; ++strip) {
        O* to = space + (strip * space_depth + k) * kRows;
        for (int i = 0; i < kRows; ++i) to[i] = values[strip * kRows + i];
      }
    }
  });
}

template <class O, class T>
Unit<O> unit_at(const Source<T>& s, const Pass& pass, std::int64_t first, bool placed, const O* space,
                std::int64_t space_depth) {
  if (!placed) return {space, kRows * space_depth, space_depth};
  constexpr int kNumbers = std::is_same_v<T, O> ? 1 : 2;
  const std::int64_t stride = s.m.column_stride / kNumbers;
  return {static_cast<const O*>(s.m.data) + s.offset(pass, first) / kNumbers, kRows * stride, stride};
}

// Everything that will be read of columns first ... first + count, in `calls` steps.
template <class T>
Ahead ahead_of(const Source<T>& s, const Pass& pass, std::int64_t first, int count, std::int64_t calls) {
  Ahead ahead;
  const std::int64_t rest = s.width - first, columns = rest < count ? rest : count;
  if (columns <= 0) return ahead;
  const int size = bytes_of(s.m.dtype);
  const char* data = static_cast<const char*>(s.m.data) + s.offset(pass, first) * size;
  if (s.deep()) {
    ahead.add(data, columns, pass.depth * size, s.m.column_stride * size);
  } else {
    ahead.add(data, pass.depth, columns * size, s.m.row_stride * size);
  }
  ahead.spread(calls);
  return ahead;
}

template <class T>
struct Target {
  const Product& p;
  const T* bias;  // null for none
  bool add;       // to what C holds
  bool flipped;   // strips are C's columns, panels its rows

  // Bring the lines of some rows near that will be written.
  PIXNERD_INLINE void prefetch(std::int64_t r, int rows, std::int64_t c, int columns) const {
    const int size = bytes_of(p.dtype);
    const char* row = static_cast<const char*>(p.c) + (r * p.row_stride + c) * size;
    for (int i = 0; i < rows && r + i < p.rows; ++i, row += p.row_stride * size) {
      for (int byte = 0; byte < columns * size; byte += kCacheLine) __builtin_prefetch(row + byte, 1, 3);
    }
  }

  // `count` vectors of row r, from column c.
  template <class Storage>
  PIXNERD_INLINE void put(Storage storage, std::int64_t r, std::int64_t c, const Vec<T>* values, int count) const {
    const std::int64_t rest = p.columns - c;
    const int columns = rest < count * kLanes<T> ? static_cast<int>(rest) : count * kLanes<T>;
    auto* out = static_cast<typename Storage::Stored*>(p.c) + r * p.row_stride + c;
    for (int j = 0; j < count && j * kLanes<T> < columns; ++j) {
      Vec<T> v = values[j];
      if (bias) v += load_columns<T>(Native<T>{}, bias + c, j * kLanes<T>, columns);
      if (add) v += load_columns<T>(storage, out, j * kLanes<T>, columns);
      store_columns<T>(storage, out, j * kLanes<T>, columns, v);
    }
  }
};

// acc += the products of a strip and a panel at one of their summed indices.
template <bool Deep, int Vectors, class T, class O>
PIXNERD_INLINE void accumulate(Block<T, kRows, Vectors>& acc, const O* strip, std::ptrdiff_t row, const O* panel,
                               std::ptrdiff_t k) {
  Vec<O> right[Vectors];
  for (int j = 0; j < Vectors; ++j) right[j] = load<O>(panel + k * kPanel<T> + j * kLanes<T>);
  for (int i = 0; i < kRows; ++i) {
    const Vec<O> left = broadcast(Deep ? strip[i * row + k] : strip[k * kRows + i]);
    for (int j = 0; j < Vectors; ++j) acc.v[i][j] = multiply_add<T, O>(acc.v[i][j], left, right[j]);
  }
}

// The blocks of a unit, from column `s` of the strips' operand on, and the first vectors of a panel, from column `p`
// of the panels'.
template <bool Deep, int Vectors, class T, class O>
void finish_vectors(const Target<T>& t, std::int64_t s, const Unit<O>& unit, std::int64_t p, const O* panel,
                    int depth, Ahead& ahead) {
  constexpr int n = kLanes<T>, kQuarter = kPanel<T> / kStrips;
  const std::int64_t width = (t.flipped ? t.p.columns : t.p.rows) - s;
  Vec<T> turned[Vectors][kUnit];
  for (int i = 0; i < kStrips && (t.flipped || i * kRows < width); ++i) {
    if (t.flipped) {
      t.prefetch(p + i * kQuarter, kQuarter, s, kUnit);
    } else {
      t.prefetch(s + i * kRows, kRows, p, kPanel<T>);
    }
    Block<T, kRows, Vectors> acc;
    const O* strip = unit.data + i * unit.strip;
    int k = 0;
    for (; k + kStep <= depth; k += kStep) {
      ahead.next();
#pragma GCC unroll 16
      for (int step = 0; step < kStep; ++step) accumulate<Deep>(acc, strip, unit.row, panel, k + step);
    }
    for (; k < depth; ++k) accumulate<Deep>(acc, strip, unit.row, panel, k);
    if (t.flipped) {
      for (int r = 0; r < kRows; ++r) {
        for (int j = 0; j < Vectors; ++j) turned[j][i * kRows + r] = acc.v[r][j];
      }
    } else {
      with_storage<T>(t.p.dtype, [&](auto storage) {
        for (int r = 0; r < kRows && i * kRows + r < width; ++r) {
          t.put(storage, s + i * kRows + r, p, acc.v[r], Vectors);
        }
      });
    }
  }
  if (!t.flipped) return;
  with_storage<T>(t.p.dtype, [&](auto storage) {
    for (int c = 0; c < kUnit && c < width; c += n) {
      for (int j = 0; j < Vectors; ++j) {
        Vec<T> tile[n];
        for (int i = 0; i < n; ++i) tile[i] = turned[j][c + i];
        transpose_tile<T>(tile);
        for (int i = 0; i < n && p + j * n + i < t.p.rows; ++i) t.put(storage, p + j * n + i, s + c, tile + i, 1);
      }
    }
  });
}

// All of a panel, of which the half without columns is left out.
template <bool Deep, class T, class O>
void finish(const Target<T>& t, std::int64_t s, const Unit<O>& unit, std::int64_t p, const O* panel, int depth,
            Ahead& ahead) {
  if ((t.flipped ? t.p.rows : t.p.columns) - p > kLanes<T>) {
    finish_vectors<Deep, 2>(t, s, unit, p, panel, depth, ahead);
  } else {
    finish_vectors<Deep, 1>(t, s, unit, p, panel, depth, ahead);
  }
}

template <bool Deep, class O, class T>
void run(const Product& p, const Source<T>& strips, const Source<T>& panels, bool flipped, const T* bias) {
  const bool own_strips = flipped == (p.columns >= p.rows);
  const bool computed = p.dtype == DType::kFloat64 || p.dtype == DType::kFloat32;
  const std::int64_t deepest = own_strips && !p.row_invariant ? kDepth : kOwnPanelDepth;
  const std::int64_t passes = computed && p.depth > deepest ? (p.depth + deepest - 1) / deepest : 1;
  constexpr int kNumbers = std::is_same_v<T, O> ? 1 : 2;  // of one operand that are multiplied at a time
  const std::int64_t step = ((p.depth + passes - 1) / passes + kNumbers - 1) / kNumbers * kNumbers;
  const std::int64_t space_depth = (step / kNumbers + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  const std::int64_t units = (strips.width + kUnit - 1) / kUnit, unit_size = space_depth * kUnit;
  const std::int64_t columns = (panels.width + kPanel<T> - 1) / kPanel<T>, panel_size = space_depth * kPanel<T>;
  const int workers = workers_for(own_strips ? units : columns, p.threads);
  const Scratch panel_memory(static_cast<std::size_t>(panel_size) * sizeof(O),
                             own_strips ? static_cast<int>(columns) : workers);
  // The last unit, if it is not whole, is the only one that may have to be packed of a source that is read in place.
  const auto lies_ready = [&](std::int64_t i) { return in_place<T, O>(strips, p.depth, i * kUnit); };
  const bool placed = lies_ready(0);
  const Scratch unit_memory(static_cast<std::size_t>(unit_size) * sizeof(O), own_strips ? workers
                                                                             : placed   ? 1
                                                                                        : static_cast<int>(units));
  const auto panel_space = [&](std::int64_t i) { return static_cast<O*>(panel_memory.slice(static_cast<int>(i))); };
  const auto unit_space = [&](std::int64_t i) { return static_cast<O*>(unit_memory.slice(static_cast<int>(i))); };
  std::int64_t k0 = 0;
  do {
    const Pass pass{k0, static_cast<int>(p.depth - k0 < step ? p.depth - k0 : step)};
    const Target<T> target{p, k0 == 0 ? bias : nullptr, p.accumulate || k0 > 0, flipped};
    const int depth = depth_of<T, O>(pass.depth);
    const std::int64_t blocks_deep = kStrips * ((depth + kStep - 1) / kStep);
    if (own_strips) {
      parallel_for(columns, p.threads,
                   [&](int, std::int64_t j) { pack_panel(panels, pass, j * kPanel<T>, panel_space(j)); });
      parallel_for(units, p.threads, [&](int worker, std::int64_t i) {
        O* space = unit_space(worker);
        if (!lies_ready(i)) pack_unit(strips, pass, i * kUnit, space, space_depth);
        const Unit<O> unit = unit_at<O>(strips, pass, i * kUnit, lies_ready(i), space, space_depth);
        Ahead ahead = ahead_of(strips, pass, (i + workers) * kUnit, kUnit, columns * blocks_deep);
        for (std::int64_t j = 0; j < columns; ++j) {
          finish<Deep>(target, i * kUnit, unit, j * kPanel<T>, panel_space(j), depth, ahead);
        }
      });
    } else {
      parallel_for(units, p.threads, [&](int, std::int64_t i) {
        if (!lies_ready(i)) pack_unit(strips, pass, i * kUnit, unit_space(placed ? 0 : i), space_depth);
      });
      parallel_for(columns, p.threads, [&](int worker, std::int64_t j) {
        O* panel = panel_space(worker);
        pack_panel(panels, pass, j * kPanel<T>, panel);
        Ahead ahead = ahead_of(panels, pass, (j + workers) * kPanel<T>, kPanel<T>, units * blocks_deep);
        for (std::int64_t i = 0; i < units; ++i) {
          const O* space = unit_space(placed ? 0 : i);
          const Unit<O> unit = unit_at<O>(strips, pass, i * kUnit, lies_ready(i), space, space_depth);
          finish<Deep>(target, i * kUnit, unit, j * kPanel<T>, panel, depth, ahead);
        }
      });
    }
    k0 += step;
  } while (k0 < p.depth);
}

template <class T, class O>
void run(const Product& p) {
  const Source<T> left{{p.a.data, p.a.column_stride, p.a.row_stride, p.a.dtype}, p.rows};
  const Source<T> right{p.b, p.columns};
  const Scratch memory(static_cast<std::size_t>(p.bias ? p.columns : 0) * sizeof(T), 1);
  T* bias = p.bias ? static_cast<T*>(memory.slice(0)) : nullptr;
  if (bias) {
    with_storage<T>(p.b.dtype, [&](auto storage) {
      const auto* stored = static_cast<const typename decltype(storage)::Stored*>(p.bias);
      for (std::int64_t c = 0; c < p.columns; ++c) bias[c] = storage.get(stored + c);
    });
  }
  if (p.rows > 0 && p.rows <= kFewRows && right.deep() && !p.row_invariant) return multiply_few_rows(p, bias);
  const bool flipped = right.deep() && (!left.deep() || right.width >= left.width);
  const Source<T>& strips = flipped ? right : left;
  const Source<T>& panels = flipped ? left : right;
  strips.deep() ? run<true, O>(p, strips, panels, flipped, bias) : run<false, O>(p, strips, panels, flipped, bias);
}

}  // namespace

void matmul(const Product& p) {
#if defined(PIXNERD_ISA_AVX512_BF16)
  if (p.a.dtype == DType::kBFloat16 && p.b.dtype == DType::kBFloat16) return run<float, Pair>(p);
#endif
  p.dtype == DType::kFloat64 ? run<double, double>(p) : run<float, float>(p);
}

}  // namespace pixnerd::PIXNERD_ISA
