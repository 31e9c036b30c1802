#include "qk_norm_rope.h"

#include "rows.h"

namespace pixnerd::PIXNERD_ISA {
namespace {

// Lines of a worker, and of a chunk's sums.
enum { kQWeight, kKWeight, kRow, kSlope, kWorkerLines };
enum { kSumQ, kSumK, kSums };

// Lanes i -> i ^ 1, i & ~1 and i | 1.
enum class Pair { kSwap, kFirst, kSecond };
template <class T, Pair P>
PIXNERD_INLINE Vec<T> pairs(Vec<T> v) {
  using I [[maybe_unused]] = typename VectorOf<std::conditional_t<sizeof(T) == 8, std::int64_t, std::int32_t>>::type;
  constexpr auto at = [](int i) { return P == Pair::kSwap ? i ^ 1 : P == Pair::kFirst ? i & ~1 : i | 1; };
  constexpr int n = kLanes<T>;
  if constexpr (n == 2) {
    return PIXNERD_SHUFFLE(v, v, I, at(0), at(1));
  } else if constexpr (n == 4) {
    return PIXNERD_SHUFFLE(v, v, I, at(0), at(1), at(2), at(3));
  } else if constexpr (n == 8) {
    return PIXNERD_SHUFFLE(v, v, I, at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7));
  } else {
    return PIXNERD_SHUFFLE(v, v, I, at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), at(9), at(10),
                           at(11), at(12), at(13), at(14), at(15));
  }
}

// Turn pairs (a, b) by the angles of a table's (cos, sin): (a cos - b sin, a sin + b cos), or back.
template <class T, bool Back>
PIXNERD_INLINE Vec<T> turn(Vec<T> v, Vec<T> table) {
  Vec<T> sign;
  for (int i = 0; i < kLanes<T>; ++i) sign[i] = (i % 2 == 0) == Back ? T(1) : T(-1);
  return v * pairs<T, Pair::kFirst>(table) + pairs<T, Pair::kSwap>(v) * (pairs<T, Pair::kSecond>(table) * sign);
}

template <class Storage>
PIXNERD_INLINE const typename Storage::Stored* head_of(Storage, const Heads& m, std::int64_t b, std::int64_t t,
                                                       std::int64_t h) {
  return static_cast<const typename Storage::Stored*>(m.data) + b * m.batch_stride + t * m.token_stride +
         h * m.head_stride;
}
template <class Storage>
PIXNERD_INLINE typename Storage::Stored* head_of(Storage, const MutableHeads& m, std::int64_t b, std::int64_t t,
                                                 std::int64_t h) {
  return static_cast<typename Storage::Stored*>(m.data) + b * m.batch_stride + t * m.token_stride + h * m.head_stride;
}

// row = x, and its inverse root mean square.
template <class T, class Storage>
PIXNERD_INLINE T read_head(Storage storage, const typename Storage::Stored* x, int channels, double eps, T* row) {
  Vec<T> squares{};
  for (int c = 0; c < channels; c += kLanes<T>) {
    const Vec<T> v = load_columns<T>(storage, x, c, channels);
    store<T>(row + c, v);
    squares += v * v;
  }
  return inverse_rms<T>(squares, channels, eps);
}

template <class T, class Storage>
PIXNERD_INLINE void forward_head(Storage storage, const QkNormRope& a, const typename Storage::Stored* x,
                                 const T* weight, const T* table, T* row, typename Storage::Stored* out) {
  const int channels = static_cast<int>(a.channels);
  const T inverse = read_head<T>(storage, x, channels, a.eps, row);
  for (int c = 0; c < channels; c += kLanes<T>) {
    Vec<T> v = load<T>(row + c) * inverse * load<T>(weight + c);
    if (table) v = turn<T, false>(v, load_columns<T>(Native<T>{}, table, c, channels));
    store_columns<T>(storage, out, c, channels, v);
  }
}

// With n = x / rms: n' = (x' - n mean(x' n)) / rms; the rotation is linear. A null tangent is zero.
template <class T, class Storage>
PIXNERD_INLINE void jvp_head(Storage storage, const QkNormRope& a, const typename Storage::Stored* x,
                             const typename Storage::Stored* tangent, const T* weight, const T* table, T* row,
                             T* slope, typename Storage::Stored* out, typename Storage::Stored* out_tangent) {
  const int channels = static_cast<int>(a.channels);
  const T inverse = read_head<T>(storage, x, channels, a.eps, row);
  Vec<T> products{};
  for (int c = 0; c < channels; c += kLanes<T>) {
    const Vec<T> d = tangent ? load_columns<T>(storage, tangent, c, channels) : Vec<T>{};
    store<T>(slope + c, d);
    products += load<T>(row + c) * d;
  }
  const T mean = sum<T>(products) / static_cast<T>(channels) * inverse;
  for (int c = 0; c < channels; c += kLanes<T>) {
    const Vec<T> n = load<T>(row + c) * inverse, factor = load<T>(weight + c);
    Vec<T> v = n * factor, d = (load<T>(slope + c) - n * mean) * inverse * factor;
    if (table) {
      const Vec<T> angles = load_columns<T>(Native<T>{}, table, c, channels);
      v = turn<T, false>(v, angles);
      d = turn<T, false>(d, angles);
    }
    store_columns<T>(storage, out, c, channels, v);
    store_columns<T>(storage, out_tangent, c, channels, d);
  }
}

// sums += the weight's gradient. With n = x / rms and g the gradient turned back:
//   dx = (g weight - n mean(g weight n)) / rms
template <class T, class Storage>
PIXNERD_INLINE void backward_head(Storage storage, const QkNormRope& a, const typename Storage::Stored* x,
                                  const typename Storage::Stored* grad, const T* weight, const T* table, T* row,
                                  T* slope, T* sums, typename Storage::Stored* dx) {
  const int channels = static_cast<int>(a.channels);
  const T inverse = read_head<T>(storage, x, channels, a.eps, row);
  Vec<T> dots{};
  for (int c = 0; c < channels; c += kLanes<T>) {
    Vec<T> g = load_columns<T>(storage, grad, c, channels);
    if (table) g = turn<T, true>(g, load_columns<T>(Native<T>{}, table, c, channels));
    const Vec<T> n = load<T>(row + c) * inverse, dn = g * load<T>(weight + c);
    add_to<T>(sums + c, g * n);
    store<T>(row + c, n);
    store<T>(slope + c, dn);
    dots += dn * n;
  }
  const T mean = sum<T>(dots) / static_cast<T>(channels);
  for (int c = 0; c < channels; c += kLanes<T>) {
    store_columns<T>(storage, dx, c, channels, (load<T>(slope + c) - load<T>(row + c) * mean) * inverse);
  }
}

template <class Storage>
PIXNERD_INLINE void copy_head(Storage, const typename Storage::Stored* from, typename Storage::Stored* to,
                              std::int64_t channels) {
  __builtin_memcpy(to, from, static_cast<std::size_t>(channels) * sizeof(*to));
}

template <class T>
void read_weights(const QkNormRope& a, const Lines<T>& lines, int worker) {
  for (std::int64_t c = 0; c < padded<T>(a.channels); ++c) {
    lines(worker, kQWeight)[c] = c < a.channels ? static_cast<const T*>(a.q_weight)[c] : T(0);
    lines(worker, kKWeight)[c] = c < a.channels ? static_cast<const T*>(a.k_weight)[c] : T(0);
  }
}

// Call function(worker, chunk, batch, token, the token's row of the table or null) for image and text tokens.
template <class T, class Function>
void for_tokens(const QkNormRope& a, Function&& function) {
  for_row_chunks(a.batches, a.tokens + a.text_tokens, a.threads,
                 [&](int worker, std::int64_t chunk, std::int64_t batch, std::int64_t first, std::int64_t count) {
                   for (std::int64_t t = first; t < first + count; ++t) {
                     const T* rope = static_cast<const T*>(a.rope);
                     function(worker, chunk, batch, t, rope && t < a.tokens ? rope + t * a.channels : nullptr);
                   }
                 });
}

template <class T, class Storage>
void forward(Storage storage, const QkNormRope& a, MutableHeads q, MutableHeads k, MutableHeads v) {
  const std::int64_t chunks = a.batches * row_chunks(a.tokens + a.text_tokens);
  const int workers = workers_for(chunks, a.threads);
  const Lines<T> lines(workers, kWorkerLines, a.channels);
  for (int worker = 0; worker < workers; ++worker) read_weights(a, lines, worker);
  for_tokens<T>(a, [&](int worker, std::int64_t, std::int64_t b, std::int64_t t, const T* table) {
    const T *q_weight = lines(worker, kQWeight), *k_weight = lines(worker, kKWeight);
    T* row = lines(worker, kRow);
    const bool image = t < a.tokens;
    const Heads &from_k = image ? a.k : a.text_k, &from_v = image ? a.v : a.text_v;
    const std::int64_t s = image ? t : t - a.tokens;
    for (std::int64_t h = 0; h < a.heads; ++h) {
      if (image) {
        forward_head<T>(storage, a, head_of(storage, a.q, b, t, h), q_weight, table, row,
                        head_of(storage, q, b, t, h));
      }
      forward_head<T>(storage, a, head_of(storage, from_k, b, s, h), k_weight, table, row,
                      head_of(storage, k, b, t, h));
      copy_head(storage, head_of(storage, from_v, b, s, h), head_of(storage, v, b, t, h), a.channels);
    }
  });
}

template <class T, class Storage>
void jvp(Storage storage, const QkNormRope& a, const QkNormRopeTangents& d, MutableHeads q, MutableHeads k,
         MutableHeads v) {
  const std::int64_t chunks = a.batches * row_chunks(a.tokens + a.text_tokens);
  const int workers = workers_for(chunks, a.threads);
  const Lines<T> lines(workers, kWorkerLines, a.channels);
  for (int worker = 0; worker < workers; ++worker) read_weights(a, lines, worker);
  const auto maybe = [&](const Heads& m, std::int64_t b, std::int64_t t, std::int64_t h) {
    return m.data ? head_of(storage, m, b, t, h) : nullptr;
  };
  for_tokens<T>(a, [&](int worker, std::int64_t, std::int64_t b, std::int64_t t, const T* table) {
    T *row = lines(worker, kRow), *slope = lines(worker, kSlope);
    const bool image = t < a.tokens;
    const Heads &from_k = image ? a.k : a.text_k, &from_v = image ? a.v : a.text_v;
    const Heads &along_k = image ? d.k : d.text_k, &along_v = image ? d.v : d.text_v;
    const std::int64_t s = image ? t : t - a.tokens;
    for (std::int64_t h = 0; h < a.heads; ++h) {
      if (image) {
        jvp_head<T>(storage, a, head_of(storage, a.q, b, t, h), maybe(d.q, b, t, h), lines(worker, kQWeight), table,
                    row, slope, head_of(storage, q, b, t, h), head_of(storage, d.d_q, b, t, h));
      }
      jvp_head<T>(storage, a, head_of(storage, from_k, b, s, h), maybe(along_k, b, s, h), lines(worker, kKWeight),
                  table, row, slope, head_of(storage, k, b, t, h), head_of(storage, d.d_k, b, t, h));
      copy_head(storage, head_of(storage, from_v, b, s, h), head_of(storage, v, b, t, h), a.channels);
      auto* d_v = head_of(storage, d.d_v, b, t, h);
      if (along_v.data) {
        copy_head(storage, head_of(storage, along_v, b, s, h), d_v, a.channels);
      } else {
        __builtin_memset(d_v, 0, static_cast<std::size_t>(a.channels) * sizeof(*d_v));
      }
    }
  });
}

template <class T, class Storage>
void backward(Storage storage, const QkNormRope& a, const QkNormRopeGradients& d) {
  const std::int64_t chunks = a.batches * row_chunks(a.tokens + a.text_tokens);
  const int workers = workers_for(chunks, a.threads);
  const Lines<T> lines(workers, kWorkerLines, a.channels), sums(chunks, kSums, a.channels);
  for (int worker = 0; worker < workers; ++worker) read_weights(a, lines, worker);
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) sums.clear(chunk);
  for_tokens<T>(a, [&](int worker, std::int64_t chunk, std::int64_t b, std::int64_t t, const T* table) {
    T *row = lines(worker, kRow), *slope = lines(worker, kSlope);
    const bool image = t < a.tokens;
    const Heads& from_k = image ? a.k : a.text_k;
    const MutableHeads &to_k = image ? d.d_k : d.d_text_k, &to_v = image ? d.d_v : d.d_text_v;
    const std::int64_t s = image ? t : t - a.tokens;
    for (std::int64_t h = 0; h < a.heads; ++h) {
      if (image) {
        backward_head<T>(storage, a, head_of(storage, a.q, b, t, h), head_of(storage, d.q, b, t, h),
                         lines(worker, kQWeight), table, row, slope, sums(chunk, kSumQ),
                         head_of(storage, d.d_q, b, t, h));
      }
      backward_head<T>(storage, a, head_of(storage, from_k, b, s, h), head_of(storage, d.k, b, t, h),
                       lines(worker, kKWeight), table, row, slope, sums(chunk, kSumK),
                       head_of(storage, to_k, b, s, h));
      copy_head(storage, head_of(storage, d.v, b, t, h), head_of(storage, to_v, b, s, h), a.channels);
    }
  });
  const auto put_sums = [&](void* target, int line) {
    if (!target) return;
    for_column_runs(a.channels, 1, [&](std::int64_t first, int count) {
      double totals[kRun];
      sums.totals(0, chunks, line, first, count, totals);
      for (int c = 0; c < count; ++c) static_cast<T*>(target)[first + c] = static_cast<T>(totals[c]);
    });
  };
  put_sums(d.q_weight, kSumQ);
  put_sums(d.k_weight, kSumK);
}

}  // namespace

void qk_norm_rope_forward(const QkNormRope& a, MutableHeads q, MutableHeads k, MutableHeads v) {
  with_types(a.dtype, [&](auto type, auto storage) { forward<decltype(type)>(storage, a, q, k, v); });
}

void qk_norm_rope_jvp(const QkNormRope& a, const QkNormRopeTangents& d, MutableHeads q, MutableHeads k,
                      MutableHeads v) {
  with_types(a.dtype, [&](auto type, auto storage) { jvp<decltype(type)>(storage, a, d, q, k, v); });
}

void qk_norm_rope_backward(const QkNormRope& a, const QkNormRopeGradients& d) {
  with_types(a.dtype, [&](auto type, auto storage) { backward<decltype(type)>(storage, a, d); });
}

}  // namespace pixnerd::PIXNERD_ISA
