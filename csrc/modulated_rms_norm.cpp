#include "modulated_rms_norm.h"

#include "rows.h"

namespace pixnerd::PIXNERD_ISA {
namespace {

// Lines of a worker.
enum { kFactor, kShift, kGate, kRow, kSlope, kWorkerLines };
// Lines of a chunk's sums over its rows: of g, of g * n, and of dz * y.
enum { kSumG, kSumGN, kSumZY, kSums };

// Vectors of a batch that all its rows use: weight * (1 + scale), shift and gate.
template <class T, class Storage>
void read_batch(Storage storage, const ModulatedNorm& n, std::int64_t batch, const Lines<T>& lines, int worker) {
  const int columns = static_cast<int>(n.columns);
  const T* weight = static_cast<const T*>(n.weight);
  for (int c = 0; c < columns; c += kLanes<T>) {
    Vec<T> factor = load_columns<T>(Native<T>{}, weight, c, columns), shift{}, gate{};
    if (n.scale.data) factor *= T(1) + load_columns<T>(storage, row_of(storage, n.scale, batch, 0), c, columns);
    if (n.shift.data) shift = load_columns<T>(storage, row_of(storage, n.shift, batch, 0), c, columns);
    if (n.gate.data) gate = load_columns<T>(storage, row_of(storage, n.gate, batch, 0), c, columns);
    store<T>(lines(worker, kFactor) + c, factor);
    store<T>(lines(worker, kShift) + c, shift);
    store<T>(lines(worker, kGate) + c, gate);
  }
}

template <class T, bool Residual, class Storage>
void forward(Storage storage, const ModulatedNorm& n, MutableMatrices z, MutableMatrices out) {
  const int columns = static_cast<int>(n.columns);
  const Lines<T> lines(workers_for(n.batches * row_chunks(n.rows), n.threads), kWorkerLines, n.columns);
  for_row_chunks(
      n.batches, n.rows, n.threads,
      [&](int worker, std::int64_t, std::int64_t batch, std::int64_t first, std::int64_t count) {
        read_batch<T>(storage, n, batch, lines, worker);
        const T *factor = lines(worker, kFactor), *shift = lines(worker, kShift), *gate = lines(worker, kGate);
        T* row = lines(worker, kRow);
        for (std::int64_t r = first; r < first + count; ++r) {
          const auto* x = row_of(storage, n.x, batch, r);
          Vec<T> squares{};
          for (int c = 0; c < columns; c += kLanes<T>) {
            Vec<T> v = load_columns<T>(storage, x, c, columns);
            if constexpr (Residual) {
              v += load<T>(gate + c) * load_columns<T>(storage, row_of(storage, n.y, batch, r), c, columns);
              store_columns<T>(storage, row_of(storage, z, batch, r), c, columns, v);
            }
            store<T>(row + c, v);
            squares += v * v;
          }
          const T inverse = inverse_rms<T>(squares, columns, n.eps);
          auto* target = row_of(storage, out, batch, r);
          for (int c = 0; c < columns; c += kLanes<T>) {
            const Vec<T> v = load<T>(row + c) * inverse * load<T>(factor + c) + load<T>(shift + c);
            store_columns<T>(storage, target, c, columns, v);
          }
        }
      });
}

// Lines of a worker behind the others, for tangents: of the factor, the shift and the gate.
enum { kFactorTangent = kWorkerLines, kShiftTangent, kGateTangent, kTangentLines };

template <class T, class Storage>
void read_batch_tangents(Storage storage, const ModulatedNorm& n, const ModulatedNormTangents& t, std::int64_t batch,
                         const Lines<T>& lines, int worker) {
  const int columns = static_cast<int>(n.columns);
  const T* weight = static_cast<const T*>(n.weight);
  for (int c = 0; c < columns; c += kLanes<T>) {
    const Vec<T> w = load_columns<T>(Native<T>{}, weight, c, columns);
    store<T>(lines(worker, kFactorTangent) + c, w * load_if_there<T>(storage, t.scale, batch, 0, c, columns));
    store<T>(lines(worker, kShiftTangent) + c, load_if_there<T>(storage, t.shift, batch, 0, c, columns));
    store<T>(lines(worker, kGateTangent) + c, load_if_there<T>(storage, t.gate, batch, 0, c, columns));
  }
}

// With n = z / rms and a = weight * (1 + scale), a prime for tangents:
//   n' = (z' - n mean(z' n)) / rms,   out' = n' a + n weight scale' + shift'
template <class T, bool Residual, class Storage>
void jvp(Storage storage, const ModulatedNorm& n, const ModulatedNormTangents& t) {
  const int columns = static_cast<int>(n.columns);
  const Lines<T> lines(workers_for(n.batches * row_chunks(n.rows), n.threads), kTangentLines, n.columns);
  for_row_chunks(n.batches, n.rows, n.threads,
                 [&](int worker, std::int64_t, std::int64_t batch, std::int64_t first, std::int64_t count) {
                   read_batch<T>(storage, n, batch, lines, worker);
                   read_batch_tangents<T>(storage, n, t, batch, lines, worker);
                   const T *factor = lines(worker, kFactor), *shift = lines(worker, kShift),
                           *gate = lines(worker, kGate);
                   const T *d_factor = lines(worker, kFactorTangent), *d_shift = lines(worker, kShiftTangent);
                   const T* d_gate = lines(worker, kGateTangent);
                   T *row = lines(worker, kRow), *slope = lines(worker, kSlope);
                   for (std::int64_t r = first; r < first + count; ++r) {
                     Vec<T> squares{}, products{};
                     for (int c = 0; c < columns; c += kLanes<T>) {
                       Vec<T> v = load_columns<T>(storage, row_of(storage, n.x, batch, r), c, columns);
                       Vec<T> dv = load_if_there<T>(storage, t.x, batch, r, c, columns);
                       if constexpr (Residual) {
                         const Vec<T> y = load_columns<T>(storage, row_of(storage, n.y, batch, r), c, columns);
                         v += load<T>(gate + c) * y;
                         dv += load<T>(gate + c) * load_if_there<T>(storage, t.y, batch, r, c, columns) +
                               load<T>(d_gate + c) * y;
                         store_columns<T>(storage, row_of(storage, t.z, batch, r), c, columns, v);
                         store_columns<T>(storage, row_of(storage, t.z_tangent, batch, r), c, columns, dv);
                       }
                       store<T>(row + c, v);
                       store<T>(slope + c, dv);
                       squares += v * v;
                       products += v * dv;
                     }
                     const T inverse = inverse_rms<T>(squares, columns, n.eps);
                     const T mean = sum<T>(products) / static_cast<T>(columns) * inverse;
                     for (int c = 0; c < columns; c += kLanes<T>) {
                       const Vec<T> v = load<T>(row + c) * inverse, dv = (load<T>(slope + c) - v * mean) * inverse;
                       store_columns<T>(storage, row_of(storage, t.out, batch, r), c, columns,
                                        v * load<T>(factor + c) + load<T>(shift + c));
                       store_columns<T>(storage, row_of(storage, t.out_tangent, batch, r), c, columns,
                                        dv * load<T>(factor + c) + v * load<T>(d_factor + c) + load<T>(d_shift + c));
                     }
                   }
                 });
}

// With n = z / rms, g the gradient of out and a = weight * (1 + scale):
//   dz = (g a - n mean(g a n)) / rms + the incoming gradient of z;   dx = dz, dy = dz * gate
template <class T, bool Residual, class Storage>
void backward_rows(Storage storage, const ModulatedNorm& n, const ModulatedNormGradients& d, const Lines<T>& sums) {
  const int columns = static_cast<int>(n.columns);
  const Lines<T> lines(workers_for(n.batches * row_chunks(n.rows), n.threads), kWorkerLines, n.columns);
  for_row_chunks(
      n.batches, n.rows, n.threads,
      [&](int worker, std::int64_t chunk, std::int64_t batch, std::int64_t first, std::int64_t count) {
        read_batch<T>(storage, n, batch, lines, worker);
        const T *factor = lines(worker, kFactor), *gate = lines(worker, kGate);
        T *row = lines(worker, kRow), *slope = lines(worker, kSlope);
        T *sum_g = sums(chunk, kSumG), *sum_gn = sums(chunk, kSumGN), *sum_zy = sums(chunk, kSumZY);
        sums.clear(chunk);
        for (std::int64_t r = first; r < first + count; ++r) {
          const auto *z = row_of(storage, n.x, batch, r), *g = row_of(storage, d.out, batch, r);
          Vec<T> squares{}, dots{};
          for (int c = 0; c < columns; c += kLanes<T>) {
            const Vec<T> v = load_columns<T>(storage, z, c, columns);
            store<T>(row + c, v);
            squares += v * v;
          }
          const T inverse = inverse_rms<T>(squares, columns, n.eps);
          for (int c = 0; c < columns; c += kLanes<T>) {
            const Vec<T> v = load<T>(row + c) * inverse, grad = load_columns<T>(storage, g, c, columns);
            const Vec<T> dn = grad * load<T>(factor + c);
            add_to<T>(sum_g + c, grad);
            add_to<T>(sum_gn + c, grad * v);
            store<T>(row + c, v);
            store<T>(slope + c, dn);
            dots += dn * v;
          }
          const T mean = sum<T>(dots) / static_cast<T>(columns);
          for (int c = 0; c < columns; c += kLanes<T>) {
            Vec<T> dz = (load<T>(slope + c) - load<T>(row + c) * mean) * inverse;
            if constexpr (Residual) {
              dz += load_columns<T>(storage, row_of(storage, d.z, batch, r), c, columns);
              store_columns<T>(storage, row_of(storage, d.y, batch, r), c, columns, dz * load<T>(gate + c));
              add_to<T>(sum_zy + c, dz * load_columns<T>(storage, row_of(storage, n.y, batch, r), c, columns));
            }
            store_columns<T>(storage, row_of(storage, d.x, batch, r), c, columns, dz);
          }
        }
      });
}

template <class T, class Storage>
void reduce(Storage storage, const ModulatedNorm& n, const ModulatedNormGradients& d, const Lines<T>& sums) {
  const std::int64_t chunks = row_chunks(n.rows);
  for_column_runs(n.columns, n.threads, [&](std::int64_t first, int count) {
    const T* weight = static_cast<const T*>(n.weight) + first;
    double d_weight[kRun] = {}, totals[kRun];
    for (std::int64_t batch = 0; batch < n.batches; ++batch) {
      const auto add_up = [&](int line) { sums.totals(batch * chunks, chunks, line, first, count, totals); };
      const auto put = [&](const MutableMatrices& target, auto&& value) {
        auto* row = row_of(storage, target, batch, 0) + first;
        for (int c = 0; c < count; ++c) Storage::put(row + c, static_cast<T>(value(c)));
      };
      add_up(kSumGN);
      const auto* scale = n.scale.data ? row_of(storage, n.scale, batch, 0) + first : nullptr;
      for (int c = 0; c < count; ++c) d_weight[c] += (1.0 + (scale ? Storage::get(scale + c) : T(0))) * totals[c];
      if (d.scale.data) put(d.scale, [&](int c) { return totals[c] * weight[c]; });
      const auto put_sums = [&](const MutableMatrices& target, int line) {
        if (!target.data) return;
        add_up(line);
        put(target, [&](int c) { return totals[c]; });
      };
      put_sums(d.shift, kSumG);
      put_sums(d.gate, kSumZY);
    }
    for (int c = 0; d.weight && c < count; ++c) static_cast<T*>(d.weight)[first + c] = static_cast<T>(d_weight[c]);
  });
}

}  // namespace

void modulated_rms_norm_forward(const ModulatedNorm& n, MutableMatrices z, MutableMatrices out) {
  with_types(n.dtype, [&](auto type, auto storage) {
    using T = decltype(type);
    n.y.data ? forward<T, true>(storage, n, z, out) : forward<T, false>(storage, n, z, out);
  });
}

void modulated_rms_norm_jvp(const ModulatedNorm& n, const ModulatedNormTangents& t) {
  with_types(n.dtype, [&](auto type, auto storage) {
    using T = decltype(type);
    n.y.data ? jvp<T, true>(storage, n, t) : jvp<T, false>(storage, n, t);
  });
}

void modulated_rms_norm_backward(const ModulatedNorm& n, const ModulatedNormGradients& d) {
  with_types(n.dtype, [&](auto type, auto storage) {
    using T = decltype(type);
    const Lines<T> sums(n.batches * row_chunks(n.rows), kSums, n.columns);
    n.y.data ? backward_rows<T, true>(storage, n, d, sums) : backward_rows<T, false>(storage, n, d, sums);
    reduce<T>(storage, n, d, sums);
  });
}

}  // namespace pixnerd::PIXNERD_ISA
