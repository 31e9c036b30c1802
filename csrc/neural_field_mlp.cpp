#include "neural_field_mlp.h"

#include "neural_field_parts.h"
#include "parallel.h"
#include "scratch.h"

// A worker takes one patch at a time. It packs the patch's weights into panels (converting, padding and
// summing squares on the way), then loops over tiles of pixels whose activations stay in cache. No normalised
// weight and no activation of a whole patch is ever stored.
namespace pixnerd::PIXNERD_ISA {
namespace {

// ---- forward ----

template <class T>
struct ForwardScratch {
  Weight<T> w1, w2, w_gate;
  Panels<T> n, h, gate;
  T *norm_weight, *inverse;

  ForwardScratch(const NeuralField& f, const Plan<T>& plan, Arena<T>& arena)
      : w1(arena.weight(plan.channels, plan.hidden)), w2(arena.weight(plan.hidden, plan.channels)) {
    if (plan.gated) w_gate = arena.weight(plan.channels, plan.hidden);
    n = arena.matrix(plan.tile, plan.channels);
    h = arena.matrix(plan.tile, plan.hidden);
    if (plan.gated) gate = arena.matrix(plan.tile, plan.hidden);
    norm_weight = padded_norm_weight(f, arena);
    inverse = arena.vector(plan.tile);
  }
};

template <class T, class Act>
void forward_tile(const NeuralField& f, const Plan<T>& plan, const ForwardScratch<T>& s, std::int64_t patch,
                  int first, const MutableMatrices& y) {
  const int rows = at_most(plan.tile, plan.pixels - first), channels = plan.channels, hidden = plan.hidden;
  read_rows<T>(f.x, f.dtype, patch, first, rows, channels, s.n);
  if (s.norm_weight) rms_norm<T>(s.n, rows, channels, T(f.norm_eps), s.norm_weight, s.inverse);
  if (plan.gated) {
    multiply_into<T>(rows, hidden, channels, s.n, s.w_gate.panels, s.gate,
                     [&](Vec<T> v, int c, std::ptrdiff_t) { return Act::value(v * load<T>(s.w_gate.scale + c)); });
    multiply_into<T>(rows, hidden, channels, s.n, s.w1.panels, s.h, [&](Vec<T> v, int c, std::ptrdiff_t at) {
      return v * load<T>(s.w1.scale + c) * load<T>(s.gate.data + at);
    });
  } else {
    multiply_into<T>(rows, hidden, channels, s.n, s.w1.panels, s.h,
                     [&](Vec<T> v, int c, std::ptrdiff_t) { return Act::value(v * load<T>(s.w1.scale + c)); });
  }
  multiply_into<T>(rows, channels, hidden, s.h, s.w2.panels, s.n,
                   [&](Vec<T> v, int c, std::ptrdiff_t) { return v * load<T>(s.w2.scale + c); });
  write_rows<T>(s.n, f.residual ? &f.x : nullptr, f.dtype, patch, first, rows, channels, y);
}

template <class T, class Act>
void forward(const NeuralField& f, const MutableMatrices& y) {
  const Plan<T> plan(f, 1, f.w_gate.data ? 2 : 1, 96 << 10);
  Arena<T> measure(nullptr);
  ForwardScratch<T>(f, plan, measure);
  // Few patches: their tiles are shared out too, and the weights packed again by each worker.
  const int tiles = (plan.pixels + plan.tile - 1) / plan.tile;
  int parts = 1;
  while (parts < tiles && f.patches * parts < f.threads) ++parts;
  const std::int64_t count = tiles ? f.patches * parts : 0;
  const Scratch scratch(measure.used(), workers_for(count, f.threads));
  parallel_for(count, f.threads, [&](int worker, std::int64_t item) {
    Arena<T> arena(scratch.slice(worker));
    ForwardScratch<T> s(f, plan, arena);
    const std::int64_t patch = item / parts;
    const int part = static_cast<int>(item % parts);
    pack<T>(f.w1, f.dtype, patch, f.channels, f.hidden, f.normalize_w1, f.weight_eps, s.w1);
    pack<T>(f.w2, f.dtype, patch, f.hidden, f.channels, f.normalize_w2, f.weight_eps, s.w2);
    if (plan.gated) {
      pack<T>(f.w_gate, f.dtype, patch, f.channels, f.hidden, f.normalize_w_gate, f.weight_eps, s.w_gate);
    }
    for (int t = part; t < tiles; t += parts) forward_tile<T, Act>(f, plan, s, patch, t * plan.tile, y);
  });
}

// ---- backward ----
//
// With g the incoming gradient and G = g * s2 (columns):
//   dh = G @ w2^T;   plain: da = dh * act'(z1) * s1;   gated: da = dh * act(zg) * s1, db = dh * z1 * act'(zg)
//   * sg dn = da @ w1^T + db @ w_gate^T dw1 = n^T da, dw_gate = n^T db, dw2 = h^T G, each less w s *
//   columns_sum(w s * itself): the gradient of the scale, since n^T da already carries the factor s of dw.

template <class T>
struct BackwardScratch {
  Weight<T> w1, w2, w_gate;
  Panels<T> w1_t, w2_t, w_gate_t, d_w1, d_w2, d_w_gate;
  Panels<T> n, g, dn, h, da, gate, db;
  T *norm_weight, *inverse, *d_norm;  // d_norm of one tile; tiles add up in double

  BackwardScratch(const NeuralField& f, const Plan<T>& plan, Arena<T>& arena)
      : w1(arena.weight(plan.channels, plan.hidden)), w2(arena.weight(plan.hidden, plan.channels)) {
    const int padded_channels = panels<T>(plan.channels) * kPanel<T>,
              padded_hidden = panels<T>(plan.hidden) * kPanel<T>;
    w1_t = arena.matrix(padded_hidden, plan.channels);
    w2_t = arena.matrix(padded_channels, plan.hidden);
    d_w1 = arena.matrix(padded_channels, plan.hidden);
    d_w2 = arena.matrix(padded_hidden, plan.channels);
    n = arena.matrix(plan.tile, plan.channels);
    g = arena.matrix(plan.tile, plan.channels);
    dn = arena.matrix(plan.tile, plan.channels);
    h = arena.matrix(plan.tile, plan.hidden);
    da = arena.matrix(plan.tile, plan.hidden);
    if (plan.gated) {
      w_gate = arena.weight(plan.channels, plan.hidden);
      w_gate_t = arena.matrix(padded_hidden, plan.channels);
      d_w_gate = arena.matrix(padded_channels, plan.hidden);
      gate = arena.matrix(plan.tile, plan.hidden);
      db = arena.matrix(plan.tile, plan.hidden);
    }
    norm_weight = padded_norm_weight(f, arena);
    inverse = arena.vector(plan.tile);
    d_norm = arena.vector(padded_channels);
  }
};

// Recompute the hidden layer of a tile and its gradient: fills h, da (and db) from n and g.
template <class T, class Act>
void backward_hidden(const Plan<T>& plan, const BackwardScratch<T>& s, int rows) {
  const int channels = plan.channels, hidden = plan.hidden;
  multiply_into<T>(rows, hidden, channels, s.n, s.w1.panels, s.h,
                   [&](Vec<T> v, int c, std::ptrdiff_t) { return v * load<T>(s.w1.scale + c); });
  if (!plan.gated) {
    multiply_into<T>(rows, hidden, channels, s.g, s.w2_t, s.da, [&](Vec<T> dh, int c, std::ptrdiff_t at) {
      Vec<T> value, slope;
      Act::both(load<T>(s.h.data + at), value, slope);
      store<T>(s.h.data + at, value);
      return dh * slope * load<T>(s.w1.scale + c);
    });
    return;
  }
  multiply_into<T>(rows, hidden, channels, s.n, s.w_gate.panels, s.gate,
                   [&](Vec<T> v, int c, std::ptrdiff_t) { return v * load<T>(s.w_gate.scale + c); });
  multiply_into<T>(rows, hidden, channels, s.g, s.w2_t, s.da, [&](Vec<T> dh, int c, std::ptrdiff_t at) {
    const Vec<T> z1 = load<T>(s.h.data + at);
    Vec<T> value, slope;
    Act::both(load<T>(s.gate.data + at), value, slope);
    store<T>(s.h.data + at, value * z1);
    store<T>(s.db.data + at, dh * z1 * slope * load<T>(s.w_gate.scale + c));
    return dh * value * load<T>(s.w1.scale + c);
  });
}

// From dn to the gradient of x, in place, and of the norm weight: with u = x * inverse and d = dn * weight,
// dx = inverse * (d - u * mean(d * u)).
template <class T>
void rms_norm_backward(const NeuralField& f, const BackwardScratch<T>& s, std::int64_t patch, int first, int rows) {
  const int channels = f.channels;
  read_rows<T>(f.x, f.dtype, patch, first, rows, channels, s.g);
  for (int r = 0; r < rows; ++r) {
    Vec<T> dot{};
    for_row(s.dn, r, channels, [&](int c, T* p) {
      const Vec<T> u = load<T>(s.g.row(c / kPanel<T>, r) + c % kPanel<T>) * s.inverse[r];
      const Vec<T> product = load<T>(p) * u;
      store<T>(s.d_norm + c, load<T>(s.d_norm + c) + product);
      dot += product * load<T>(s.norm_weight + c);
    });
    const T mean = sum<T>(dot) / T(channels);
    for_row(s.dn, r, channels, [&](int c, T* p) {
      const Vec<T> u = load<T>(s.g.row(c / kPanel<T>, r) + c % kPanel<T>) * s.inverse[r];
      store<T>(p, s.inverse[r] * (load<T>(p) * load<T>(s.norm_weight + c) - u * mean));
    });
  }
}

template <class T, class Act>
void backward_tile(const NeuralField& f, const NeuralFieldGradients& d, const Plan<T>& plan,
                   const BackwardScratch<T>& s, std::int64_t patch, int first) {
  const int rows = at_most(plan.tile, plan.pixels - first), channels = plan.channels, hidden = plan.hidden;
  read_rows<T>(f.x, f.dtype, patch, first, rows, channels, s.n);
  if (s.norm_weight) rms_norm<T>(s.n, rows, channels, T(f.norm_eps), s.norm_weight, s.inverse);
  read_rows<T>(d.y, f.dtype, patch, first, rows, channels, s.g);
  for (int r = 0; r < rows; ++r) {
    for_row(s.g, r, channels, [&](int c, T* p) { store<T>(p, load<T>(p) * load<T>(s.w2.scale + c)); });
  }
  backward_hidden<T, Act>(plan, s, rows);
  if (d.w1.data) {
    multiply_transposed<T>(channels, hidden, rows, s.n, s.da, s.d_w1, first > 0);
    multiply_transposed<T>(hidden, channels, rows, s.h, s.g, s.d_w2, first > 0);
    if (plan.gated) multiply_transposed<T>(channels, hidden, rows, s.n, s.db, s.d_w_gate, first > 0);
  }
  if (!d.x.data && !d.norm_weight) return;
  multiply_into<T>(rows, channels, hidden, s.da, s.w1_t, s.dn, [](Vec<T> v, int, std::ptrdiff_t) { return v; });
  if (plan.gated) {
    multiply_into<T>(rows, channels, hidden, s.db, s.w_gate_t, s.dn,
                     [&](Vec<T> v, int, std::ptrdiff_t at) { return v + load<T>(s.dn.data + at); });
  }
  if (s.norm_weight) rms_norm_backward<T>(f, s, patch, first, rows);
  if (d.x.data) write_rows<T>(s.dn, f.residual ? &d.y : nullptr, f.dtype, patch, first, rows, channels, d.x);
}

// Finish a weight's gradient and store it: out = d - w s * columns_sum(w s * d).
template <class T>
void write_weight_gradient(const Weight<T>& w, bool normalized, Panels<T> d, DType dtype, std::int64_t patch,
                           int rows, int columns, const MutableMatrices& target) {
  for (int c = 0; normalized && c < columns; c += kLanes<T>) {
    const Vec<T> slope = load<T>(w.slope + c);
    const auto at = [&](Panels<T> m, int r) { return m.row(c / kPanel<T>, r) + c % kPanel<T>; };
    Vec<T> dot{};
    for (int r = 0; r < rows; ++r) dot += load<T>(at(w.panels, r)) * slope * load<T>(at(d, r));
    for (int r = 0; r < rows; ++r) {
      store<T>(at(d, r), load<T>(at(d, r)) - load<T>(at(w.panels, r)) * slope * dot);
    }
  }
  write_rows<T>(d, nullptr, dtype, patch, 0, rows, columns, target);
}

template <class T, class Act>
void backward_patch(const NeuralField& f, const NeuralFieldGradients& d, const Plan<T>& plan, BackwardScratch<T>& s,
                    std::int64_t patch, double* d_norm) {
  const int channels = plan.channels, hidden = plan.hidden;
  pack<T>(f.w1, f.dtype, patch, channels, hidden, f.normalize_w1, f.weight_eps, s.w1);
  pack<T>(f.w2, f.dtype, patch, hidden, channels, f.normalize_w2, f.weight_eps, s.w2);
  transpose<T>(channels, hidden, s.w1.panels, s.w1_t);
  transpose<T>(hidden, channels, s.w2.panels, s.w2_t);
  if (plan.gated) {
    pack<T>(f.w_gate, f.dtype, patch, channels, hidden, f.normalize_w_gate, f.weight_eps, s.w_gate);
    transpose<T>(channels, hidden, s.w_gate.panels, s.w_gate_t);
  }
  for (int c = 0; d_norm && c < channels; ++c) d_norm[c] = 0;
  for (int first = 0; first < plan.pixels; first += plan.tile) {
    for (int c = 0; c < round_up(channels, kLanes<T>); ++c) s.d_norm[c] = T(0);
    backward_tile<T, Act>(f, d, plan, s, patch, first);
    for (int c = 0; d_norm && c < channels; ++c) d_norm[c] += s.d_norm[c];
  }
  if (d.w1.data) {
    write_weight_gradient<T>(s.w1, f.normalize_w1, s.d_w1, f.dtype, patch, channels, hidden, d.w1);
    write_weight_gradient<T>(s.w2, f.normalize_w2, s.d_w2, f.dtype, patch, hidden, channels, d.w2);
    if (plan.gated)
      write_weight_gradient<T>(s.w_gate, f.normalize_w_gate, s.d_w_gate, f.dtype, patch, channels, hidden, d.w_gate);
  }
}

template <class T, class Act>
void backward(const NeuralField& f, const NeuralFieldGradients& d) {
  const Plan<T> plan(f, 3, f.w_gate.data ? 4 : 2, 192 << 10);
  Arena<T> measure(nullptr);
  BackwardScratch<T>(f, plan, measure);
  const Scratch scratch(measure.used(), workers_for(f.patches, f.threads));
  // One row of sums per patch, added up in the patches' order: the same bits on any number of threads.
  const bool wants_norm = d.norm_weight != nullptr;
  const std::size_t sums = wants_norm ? static_cast<std::size_t>(f.patches) * f.channels : 1;
  const Scratch sums_memory(sums * sizeof(double), 1);
  double* partials = wants_norm ? static_cast<double*>(sums_memory.slice(0)) : nullptr;
  parallel_for(f.patches, f.threads, [&](int worker, std::int64_t patch) {
    Arena<T> arena(scratch.slice(worker));
    BackwardScratch<T> s(f, plan, arena);
    backward_patch<T, Act>(f, d, plan, s, patch, partials ? partials + patch * f.channels : nullptr);
  });
  if (wants_norm) {
    for (int c = 0; c < f.channels; ++c) {
      double total = 0;
      for (std::int64_t patch = 0; patch < f.patches; ++patch) total += partials[patch * f.channels + c];
      static_cast<T*>(d.norm_weight)[c] = static_cast<T>(total);
    }
  }
}

// Call function with a tag of the computed type and one of the activation.
template <class T>
struct Type {
  using type = T;
};
template <class Function>
void dispatch(const NeuralField& f, Function&& function) {
  const auto with_type = [&](auto type) {
    using T = typename decltype(type)::type;
    switch (f.activation) {
      case Activation::kGelu:
        return function(type, Type<Gelu<T>>{});
      case Activation::kRelu:
        return function(type, Type<Relu<T>>{});
      default:
        return function(type, Type<Silu<T>>{});
    }
  };
  f.dtype == DType::kFloat64 ? with_type(Type<double>{}) : with_type(Type<float>{});
}

}  // namespace

void neural_field_mlp_forward(const NeuralField& field, MutableMatrices y) {
  dispatch(field, [&](auto type, auto act) {
    forward<typename decltype(type)::type, typename decltype(act)::type>(field, y);
  });
}

void neural_field_mlp_backward(const NeuralField& field, const NeuralFieldGradients& gradients) {
  dispatch(field, [&](auto type, auto act) {
    backward<typename decltype(type)::type, typename decltype(act)::type>(field, gradients);
  });
}

}  // namespace pixnerd::PIXNERD_ISA
