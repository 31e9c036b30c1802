#include "matmul.h"

#include "gemm.h"
#include "parallel.h"
#include "scratch.h"

// Both operands are packed into panels whose rows are the summed index. The one along the shorter side of C is packed
// whole and shared; a worker takes one panel of the other at a time, packs it for itself and finishes its stripe of
// C. Meanwhile the panel that it will probably take next comes from memory, and each block of C before it is needed:
// the units that multiply never wait for either.
namespace pixnerd::PIXNERD_ISA {
namespace {

// Depth of one pass over C: a panel of it (kPanel columns) fills a part of the second-level cache.
constexpr std::int64_t kDepth = 1536;
// Depth of the products between two cache lines of the next panel: with 256 rows of the other operand all of it
// comes.
constexpr int kStep = 16;
constexpr int kCacheLine = 64;

// Rows first ... of op(M)^T: element (k, j) of the packed panel is M[k, first + j].
template <class T>
struct Source {
  Operand m;  // as [depth, width]
  std::int64_t width;
};

// Columns first ... first + kPanel of rows k0 ... k0 + depth into one panel; columns past the width are zero.
template <class T>
void pack_panel(const Source<T>& s, std::int64_t k0, int depth, std::int64_t first, T* panel) {
  constexpr int n = kLanes<T>;
  const std::int64_t rest = s.width - first;
  const int columns = rest < kPanel<T> ? static_cast<int>(rest) : kPanel<T>;
  with_storage<T>(s.m.dtype, [&](auto storage) {
    using Stored = typename decltype(storage)::Stored;
    const Stored* base = static_cast<const Stored*>(s.m.data) + k0 * s.m.row_stride + first * s.m.column_stride;
    if (s.m.column_stride == 1) {
      for (int k = 0; k < depth; ++k) {
        const Stored* row = base + k * s.m.row_stride;
        for (int c = 0; c < kPanel<T>; c += n) {
          store<T>(panel + k * kPanel<T> + c, c < columns ? load_columns<T>(storage, row, c, columns) : Vec<T>{});
        }
      }
      return;
    }
    for (int c = 0; c < kPanel<T>; c += n) {
      for (int k = 0; k < depth; k += n) {
        Vec<T> tile[n];
        for (int i = 0; i < n; ++i) {
          tile[i] =
              c + i < columns ? load_columns<T>(storage, base + (c + i) * s.m.column_stride, k, depth) : Vec<T>{};
        }
        transpose_tile<T>(tile);
        for (int i = 0; i < n; ++i) store<T>(panel + (k + i) * kPanel<T> + c, tile[i]);
      }
    }
  });
}

// What `pack_panel` with the same arguments will read, brought near one cache line after the other. Nothing past the
// source's width is.
class Ahead {
 public:
  template <class T>
  Ahead(const Source<T>& s, std::int64_t k0, int depth, std::int64_t first) {
    const std::int64_t rest = s.width - first, columns = rest < kPanel<T> ? rest : kPanel<T>;
    if (columns <= 0) return;
    const int size = bytes_of(s.m.dtype);
    const bool rows = s.m.column_stride == 1;
    left_ = rows ? depth : columns;
    run_ = (rows ? columns : depth) * size;
    step_ = (rows ? s.m.row_stride : s.m.column_stride) * size;
    line_ = static_cast<const char*>(s.m.data) + (k0 * s.m.row_stride + first * s.m.column_stride) * size;
    end_ = line_ + run_;
  }

  PIXNERD_INLINE void next() {
    if (left_ == 0) return;
    __builtin_prefetch(line_, 0, 2);
    line_ += kCacheLine;
    if (line_ >= end_) {
      end_ += step_;
      line_ = end_ - run_;
      --left_;
    }
  }

 private:
  // Runs of neighbours: how many are left, bytes of each, and from the start of one to the next's.
  std::int64_t left_ = 0, run_ = 0, step_ = 0;
  const char *line_ = nullptr, *end_ = nullptr;
};

struct Target {
  const Product& p;
  bool add;  // to what C holds
  bool biased;
};

// Bring the lines of C near that a block will write.
template <class T, int Rows>
PIXNERD_INLINE void prefetch_block(const Target& t, std::int64_t r, std::int64_t c) {
  const int size = bytes_of(t.p.dtype);
  const char* row = static_cast<const char*>(t.p.c) + (r * t.p.row_stride + c) * size;
  for (int i = 0; i < Rows && r + i < t.p.rows; ++i, row += t.p.row_stride * size) {
    for (int byte = 0; byte < kPanel<T> * size; byte += kCacheLine) __builtin_prefetch(row + byte, 1, 3);
  }
}

// One block of C: rows r ..., columns c ... .
template <class T, int Rows>
PIXNERD_INLINE void finish_block(const Target& t, std::int64_t r, std::int64_t c, const T* a, const T* b, int depth,
                                 Ahead& ahead) {
  prefetch_block<T, Rows>(t, r, c);
  Block<T, Rows, 2> acc;
  for (int k = 0; k < depth; k += kStep) {
    ahead.next();
    accumulate_columns(acc, a + k * kPanel<T>, b + k * kPanel<T>, at_most(kStep, depth - k));
  }
  const std::int64_t rest = t.p.columns - c;
  const int columns = rest < kPanel<T> ? static_cast<int>(rest) : kPanel<T>;
  const int rows = t.p.rows - r < Rows ? static_cast<int>(t.p.rows - r) : Rows;
  if (t.biased) {
    with_storage<T>(t.p.b.dtype, [&](auto storage) {
      const auto* bias = static_cast<const typename decltype(storage)::Stored*>(t.p.bias) + c;
      for (int j = 0; j * kLanes<T> < columns; ++j) {
        const Vec<T> v = load_columns<T>(storage, bias, j * kLanes<T>, columns);
        for (int i = 0; i < Rows; ++i) acc.v[i][j] += v;
      }
    });
  }
  with_storage<T>(t.p.dtype, [&](auto storage) {
    auto* out = static_cast<typename decltype(storage)::Stored*>(t.p.c) + r * t.p.row_stride + c;
    for (int i = 0; i < rows; ++i, out += t.p.row_stride) {
      for (int j = 0; j * kLanes<T> < columns; ++j) {
        Vec<T> v = acc.v[i][j];
        if (t.add) v += load_columns<T>(storage, out, j * kLanes<T>, columns);
        store_columns<T>(storage, out, j * kLanes<T>, columns, v);
      }
    }
  });
}

// A panel of rows by a panel of columns.
template <class T>
void finish_panel(const Target& t, std::int64_t row, std::int64_t column, const T* a, const T* b, int depth,
                  Ahead& ahead) {
  constexpr int kRest = kPanel<T> % kRows;
  int r = 0;
  for (; r + kRows <= kPanel<T> && row + r < t.p.rows; r += kRows) {
    finish_block<T, kRows>(t, row + r, column, a + r, b, depth, ahead);
  }
  if constexpr (kRest != 0) {
    if (row + r < t.p.rows) finish_block<T, kRest>(t, row + r, column, a + r, b, depth, ahead);
  }
}

template <class T>
void run(const Product& p) {
  constexpr std::int64_t kWidth = kPanel<T>;
  // A^T and B both have the summed index as rows.
  const Source<T> left{{p.a.data, p.a.column_stride, p.a.row_stride, p.a.dtype}, p.rows};
  const Source<T> right{p.b, p.columns};
  const bool by_columns = p.columns >= p.rows;
  const Source<T>& shared = by_columns ? left : right;
  const Source<T>& own = by_columns ? right : left;
  const std::int64_t shared_panels = (shared.width + kWidth - 1) / kWidth;
  const std::int64_t own_panels = (own.width + kWidth - 1) / kWidth;
  const bool computed = p.dtype == DType::kFloat64 || p.dtype == DType::kFloat32;
  const std::int64_t passes = computed && p.depth > kDepth ? (p.depth + kDepth - 1) / kDepth : 1;
  const std::int64_t step = (p.depth + passes - 1) / passes;
  const std::int64_t panel = (step + kLanes<T> - 1) / kLanes<T> * kLanes<T> * kWidth;
  const Scratch shared_memory(static_cast<std::size_t>(panel * shared_panels) * sizeof(T), 1);
  const int workers = workers_for(own_panels, p.threads);
  const Scratch own_memory(static_cast<std::size_t>(panel) * sizeof(T), workers);
  T* packed = static_cast<T*>(shared_memory.slice(0));
  std::int64_t k0 = 0;
  do {
    const int depth = static_cast<int>(p.depth - k0 < step ? p.depth - k0 : step);
    parallel_for(shared_panels, p.threads,
                 [&](int, std::int64_t i) { pack_panel<T>(shared, k0, depth, i * kWidth, packed + i * panel); });
    const Target target{p, p.accumulate || k0 > 0, p.bias && k0 == 0};
    parallel_for(own_panels, p.threads, [&](int worker, std::int64_t i) {
      T* mine = static_cast<T*>(own_memory.slice(worker));
      pack_panel<T>(own, k0, depth, i * kWidth, mine);
      Ahead ahead(own, k0, depth, (i + workers) * kWidth);
      for (std::int64_t j = 0; j < shared_panels; ++j) {
        const T* other = packed + j * panel;
        if (by_columns) {
          finish_panel<T>(target, j * kWidth, i * kWidth, other, mine, depth, ahead);
        } else {
          finish_panel<T>(target, i * kWidth, j * kWidth, mine, other, depth, ahead);
        }
      }
    });
    k0 += step;
  } while (k0 < p.depth);
}

}  // namespace

void matmul(const Product& p) { p.dtype == DType::kFloat64 ? run<double>(p) : run<float>(p); }

}  // namespace pixnerd::PIXNERD_ISA
