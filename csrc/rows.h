// Row-wise kernels: rows handed out in chunks, and sums over rows that are the same on any number of threads.
#pragma once

#include "gemm.h"
#include "parallel.h"
#include "scratch.h"
#include "tensors.h"

namespace pixnerd::PIXNERD_ISA {

// Rows of one chunk. Their sums are added up in order; those of the chunks in double, in order too.
constexpr int kChunkRows = 16;

template <class T>
PIXNERD_INLINE std::ptrdiff_t padded(std::int64_t columns) {
  return (columns + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

template <class Storage>
PIXNERD_INLINE const typename Storage::Stored* row_of(Storage, const Matrices& m, std::int64_t batch,
                                                      std::int64_t row) {
  return static_cast<const typename Storage::Stored*>(m.data) + batch * m.patch_stride + row * m.row_stride;
}
template <class Storage>
PIXNERD_INLINE typename Storage::Stored* row_of(Storage, const MutableMatrices& m, std::int64_t batch,
                                                std::int64_t row) {
  return static_cast<typename Storage::Stored*>(m.data) + batch * m.patch_stride + row * m.row_stride;
}

// Call function(a value of the type computed in, the storage of dtype).
template <class Function>
void with_types(DType dtype, Function&& function) {
  if (dtype == DType::kFloat64) {
    with_storage<double>(dtype, [&](auto storage) { function(double{}, storage); });
  } else {
    with_storage<float>(dtype, [&](auto storage) { function(float{}, storage); });
  }
}

// Call function(worker, chunk, batch, first row, rows) for every chunk of [batches, rows].
template <class Function>
void for_row_chunks(std::int64_t batches, std::int64_t rows, int threads, Function&& function) {
  const std::int64_t chunks = (rows + kChunkRows - 1) / kChunkRows;
  parallel_for(batches * chunks, threads, [&](int worker, std::int64_t item) {
    const std::int64_t first = item % chunks * kChunkRows, left = rows - first;
    function(worker, item, item / chunks, first, left < kChunkRows ? left : kChunkRows);
  });
}

// Call function(first column, columns) for every run of at most kRun columns.
constexpr int kRun = 64;
template <class Function>
void for_column_runs(std::int64_t columns, int threads, Function&& function) {
  parallel_for((columns + kRun - 1) / kRun, threads, [&](int, std::int64_t item) {
    const std::int64_t first = item * kRun, left = columns - first;
    function(first, left < kRun ? static_cast<int>(left) : kRun);
  });
}

PIXNERD_INLINE std::int64_t row_chunks(std::int64_t rows) { return (rows + kChunkRows - 1) / kChunkRows; }

// Lines of `columns` numbers, padded to whole vectors: a worker's scratch, or the sums of the chunks.
template <class T>
class Lines {
 public:
  Lines(std::int64_t sets, int lines, std::int64_t columns)
      : stride_(padded<T>(columns)),
        lines_(lines),
        memory_(static_cast<std::size_t>(sets * lines * stride_) * sizeof(T), 1) {}

  T* operator()(std::int64_t set, int line) const {
    return static_cast<T*>(memory_.slice(0)) + (set * lines_ + line) * stride_;
  }
  void clear(std::int64_t set) const {
    T* p = (*this)(set, 0);
    for (std::ptrdiff_t i = 0; i < lines_ * stride_; ++i) p[i] = T(0);
  }
  // The sums of one line over sets first ... first + count - 1, for some columns from `column` on.
  void totals(std::int64_t first, std::int64_t count, int line, std::int64_t column, int columns, double* out) const {
    for (int c = 0; c < columns; ++c) out[c] = 0;
    for (std::int64_t set = first; set < first + count; ++set) {
      const T* values = (*this)(set, line) + column;
      for (int c = 0; c < columns; ++c) out[c] += values[c];
    }
  }

 private:
  std::ptrdiff_t stride_;
  int lines_;
  Scratch memory_;
};

// Columns of a row from c on; zeros where the tensor is absent.
template <class T, class Storage>
PIXNERD_INLINE Vec<T> load_if_there(Storage storage, const Matrices& m, std::int64_t batch, std::int64_t row, int c,
                                    int columns) {
  return m.data ? load_columns<T>(storage, row_of(storage, m, batch, row), c, columns) : Vec<T>{};
}

template <class T>
PIXNERD_INLINE void add_to(T* sums, Vec<T> v) {
  store<T>(sums, load<T>(sums) + v);
}

// 1 / sqrt(mean of squares + eps), from the lane-wise sum of squares of a row.
template <class T>
PIXNERD_INLINE T inverse_rms(Vec<T> squares, std::int64_t columns, double eps) {
  return T(1) / square_root(sum<T>(squares) / static_cast<T>(columns) + static_cast<T>(eps));
}

}  // namespace pixnerd::PIXNERD_ISA
