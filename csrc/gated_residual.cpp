#include "gated_residual.h"

#include "rows.h"

namespace pixnerd::PIXNERD_ISA {
namespace {

template <class T, class Storage>
void forward(Storage storage, const GatedResidual& g, Matrices x, MutableMatrices out) {
  const int columns = static_cast<int>(g.columns);
  for_row_chunks(g.batches, g.rows, g.threads,
                 [&](int, std::int64_t, std::int64_t batch, std::int64_t first, std::int64_t count) {
                   const auto* gate = row_of(storage, g.gate, batch, 0);
                   for (std::int64_t r = first; r < first + count; ++r) {
                     const auto *a = row_of(storage, x, batch, r), *b = row_of(storage, g.y, batch, r);
                     auto* target = row_of(storage, out, batch, r);
                     for (int c = 0; c < columns; c += kLanes<T>) {
                       const Vec<T> v =
                           load_columns<T>(storage, a, c, columns) +
                           load_columns<T>(storage, gate, c, columns) * load_columns<T>(storage, b, c, columns);
                       store_columns<T>(storage, target, c, columns, v);
                     }
                   }
                 });
}

template <class T, class Storage>
void jvp(Storage storage, const GatedResidual& g, Matrices x, const GatedResidualTangents& t) {
  const int columns = static_cast<int>(g.columns);
  for_row_chunks(g.batches, g.rows, g.threads,
                 [&](int, std::int64_t, std::int64_t batch, std::int64_t first, std::int64_t count) {
                   const auto* gate = row_of(storage, g.gate, batch, 0);
                   for (std::int64_t r = first; r < first + count; ++r) {
                     const auto *a = row_of(storage, x, batch, r), *b = row_of(storage, g.y, batch, r);
                     for (int c = 0; c < columns; c += kLanes<T>) {
                       const Vec<T> factor = load_columns<T>(storage, gate, c, columns);
                       const Vec<T> y = load_columns<T>(storage, b, c, columns);
                       const Vec<T> d = load_if_there<T>(storage, t.x, batch, r, c, columns) +
                                        factor * load_if_there<T>(storage, t.y, batch, r, c, columns) +
                                        y * load_if_there<T>(storage, t.gate, batch, 0, c, columns);
                       store_columns<T>(storage, row_of(storage, t.out, batch, r), c, columns,
                                        load_columns<T>(storage, a, c, columns) + factor * y);
                       store_columns<T>(storage, row_of(storage, t.out_tangent, batch, r), c, columns, d);
                     }
                   }
                 });
}

template <class T, class Storage>
void backward(Storage storage, const GatedResidual& g, Matrices grad, MutableMatrices d_y, MutableMatrices d_gate) {
  const int columns = static_cast<int>(g.columns);
  const std::int64_t chunks = row_chunks(g.rows);
  const Lines<T> sums(d_gate.data ? g.batches * chunks : 0, 1, g.columns);
  for_row_chunks(g.batches, g.rows, g.threads,
                 [&](int, std::int64_t chunk, std::int64_t batch, std::int64_t first, std::int64_t count) {
                   const auto* gate = row_of(storage, g.gate, batch, 0);
                   if (d_gate.data) sums.clear(chunk);
                   for (std::int64_t r = first; r < first + count; ++r) {
                     const auto *d = row_of(storage, grad, batch, r), *y = row_of(storage, g.y, batch, r);
                     for (int c = 0; c < columns; c += kLanes<T>) {
                       const Vec<T> v = load_columns<T>(storage, d, c, columns);
                       if (d_gate.data) add_to<T>(sums(chunk, 0) + c, v * load_columns<T>(storage, y, c, columns));
                       if (d_y.data) {
                         store_columns<T>(storage, row_of(storage, d_y, batch, r), c, columns,
                                          v * load_columns<T>(storage, gate, c, columns));
                       }
                     }
                   }
                 });
  if (!d_gate.data) return;
  for_column_runs(g.columns, g.threads, [&](std::int64_t first, int count) {
    double totals[kRun];
    for (std::int64_t batch = 0; batch < g.batches; ++batch) {
      sums.totals(batch * chunks, chunks, 0, first, count, totals);
      auto* target = row_of(storage, d_gate, batch, 0) + first;
      for (int c = 0; c < count; ++c) Storage::put(target + c, static_cast<T>(totals[c]));
    }
  });
}

}  // namespace

void gated_residual_forward(const GatedResidual& g, Matrices x, MutableMatrices out) {
  with_types(g.dtype, [&](auto type, auto storage) { forward<decltype(type)>(storage, g, x, out); });
}

void gated_residual_jvp(const GatedResidual& g, Matrices x, const GatedResidualTangents& t) {
  with_types(g.dtype, [&](auto type, auto storage) { jvp<decltype(type)>(storage, g, x, t); });
}

void gated_residual_backward(const GatedResidual& g, Matrices grad, MutableMatrices d_y, MutableMatrices d_gate) {
  with_types(g.dtype, [&](auto type, auto storage) { backward<decltype(type)>(storage, g, grad, d_y, d_gate); });
}

}  // namespace pixnerd::PIXNERD_ISA
