// C = A @ B (+ bias, + C) of so few rows that time goes into reading B, whose columns are contiguous: each element is
// a dot product.
#pragma once

#include "gemm.h"
#include "matmul.h"
#include "parallel.h"
#include "scratch.h"

namespace pixnerd::PIXNERD_ISA {

inline constexpr std::int64_t kFewRows = 4;

// For `rows` [Rows, row_stride], which are zero past the depth, and a bias of the computed type or null.
template <class T, int Rows>
void few_rows(const Product& p, const T* rows, std::int64_t row_stride, const T* bias) {
  constexpr int n = kLanes<T>, kTogether = 4, kTask = 4 * kTogether;
  with_storage<T>(p.b.dtype, [&](auto stored) {
    using Stored = typename decltype(stored)::Stored;
    const Stored* b = static_cast<const Stored*>(p.b.data);
    parallel_for((p.columns + kTask - 1) / kTask, p.threads, [&](int, std::int64_t task) {
      for (std::int64_t c = task * kTask; c < (task + 1) * kTask && c < p.columns; c += kTogether) {
        const int count = p.columns - c < kTogether ? static_cast<int>(p.columns - c) : kTogether;
        const Stored* column[kTogether];
        for (int j = 0; j < kTogether; ++j) column[j] = b + (c + (j < count ? j : 0)) * p.b.column_stride;
        const Stored* next = c + 2 * kTogether <= p.columns ? column[0] + kTogether * p.b.column_stride : column[0];
        Block<T, Rows, kTogether> acc;
        for (std::int64_t k = 0; k < p.depth; k += n) {
          Vec<T> right[kTogether];
          const int left = p.depth - k < n ? static_cast<int>(p.depth - k) : n;
          for (int j = 0; j < kTogether; ++j) {
            right[j] = load_columns<T>(stored, column[j] + k, 0, left);
            __builtin_prefetch(next + j * p.b.column_stride + k, 0, 2);
          }
          for (int i = 0; i < Rows; ++i) {
            const Vec<T> v = load<T>(rows + i * row_stride + k);
            for (int j = 0; j < kTogether; ++j) acc.v[i][j] += v * right[j];
          }
        }
        with_storage<T>(p.dtype, [&](auto storage) {
          for (int i = 0; i < Rows; ++i) {
            auto* out = static_cast<typename decltype(storage)::Stored*>(p.c) + i * p.row_stride + c;
            for (int j = 0; j < count; ++j) {
              T value = sum<T>(acc.v[i][j]);
              if (bias) value += bias[c + j];
              if (p.accumulate) value += storage.get(out + j);
              storage.put(out + j, value);
            }
          }
        });
      }
    });
  });
}

// p.rows is 1 ... kFewRows.
template <class T>
void multiply_few_rows(const Product& p, const T* bias) {
  const std::int64_t stride = (p.depth + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  const Scratch memory(static_cast<std::size_t>(stride * p.rows) * sizeof(T), 1);
  T* rows = static_cast<T*>(memory.slice(0));
  with_storage<T>(p.a.dtype, [&](auto storage) {
    const auto* a = static_cast<const typename decltype(storage)::Stored*>(p.a.data);
    for (std::int64_t r = 0; r < p.rows; ++r) {
      for (std::int64_t k = 0; k < stride; ++k) {
        rows[r * stride + k] = k < p.depth ? storage.get(a + r * p.a.row_stride + k * p.a.column_stride) : T(0);
      }
    }
  });
  switch (p.rows) {
    case 1:
      return few_rows<T, 1>(p, rows, stride, bias);
    case 2:
      return few_rows<T, 2>(p, rows, stride, bias);
    case 3:
      return few_rows<T, 3>(p, rows, stride, bias);
    default:
      return few_rows<T, kFewRows>(p, rows, stride, bias);
  }
}

}  // namespace pixnerd::PIXNERD_ISA
