// The backward of a neural-field block on one patch.
//
// With g the incoming gradient and G = g * s2 (columns):
//   dh = G @ w2^T;   plain: da = dh * act'(z1) * s1;   gated: da = dh * act(zg) * s1, db = dh * z1 * act'(zg)
//   * sg dn = da @ w1^T + db @ w_gate^T dw1 = n^T da, dw_gate = n^T db, dw2 = h^T G, each less w s *
//   columns_sum(w s * itself): the gradient of the scale, since n^T da already carries the factor s of dw.
#pragma once

#include "neural_field_forward.h"

namespace pixnerd::PIXNERD_ISA {

// Memory for what enters a tile's products where that is not what they are computed from.
template <class T, class O>
struct TileOperands {
  Panels<O> g_left, n, g, h, da, db;

  TileOperands(const Plan<T>& plan, Arena<T>& arena) {
    const int half_channels = depth_of<T, O>(plan.channels), half_tile = depth_of<T, O>(plan.tile);
    g_left = arena.template operand<O>(plan.tile, half_channels);
    n = arena.template operand<O>(half_tile, plan.channels);
    g = arena.template operand<O>(half_tile, plan.channels);
    h = arena.template operand<O>(half_tile, plan.hidden);
    da = arena.template operand<O>(half_tile, plan.hidden);
    if (plan.gated) db = arena.template operand<O>(half_tile, plan.hidden);
  }
};

template <class T, class O = T>
struct BackwardScratch {
  using Operand = O;
  Weight<T> w1, w2, w_gate;
  Operands<T, O> right;
  Panels<O> right_w1_t, right_w2_t, right_w_gate_t;
  TileOperands<T, O> tile;
  Panels<O> n_left, h_left;  // h_left is da's and db's in their turn
  Panels<T> w1_t, w2_t, w_gate_t, d_w1, d_w2, d_w_gate;
  Panels<T> n, g, dn, h, da, gate, db;
  T *norm_weight, *inverse, *d_norm;  // d_norm of one tile; tiles add up in double

  BackwardScratch(const NeuralField& f, const Plan<T>& plan, Arena<T>& arena)
      : w1(arena.weight(plan.channels, plan.hidden)),
        w2(arena.weight(plan.hidden, plan.channels)),
        right(plan, arena),
        right_w1_t(arena.template operand<O>(depth_of<T, O>(plan.hidden), plan.channels)),
        right_w2_t(arena.template operand<O>(depth_of<T, O>(plan.channels), plan.hidden)),
        right_w_gate_t(arena.template operand<O>(plan.gated ? depth_of<T, O>(plan.hidden) : 0, plan.channels)),
        tile(plan, arena),
        n_left(arena.template operand<O>(plan.tile, depth_of<T, O>(plan.channels))),
        h_left(arena.template operand<O>(plan.tile, depth_of<T, O>(plan.hidden))) {
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
template <class T, class Act, class O>
void backward_hidden(const Plan<T>& plan, const BackwardScratch<T, O>& s, int rows, Ahead& ahead) {
  const int hidden = plan.hidden, depth = depth_of<T, O>(plan.channels);
  const Panels<O> n = by_columns<O>(rows, plan.channels, s.n, s.n_left),
                  g = by_columns<O>(rows, plan.channels, s.g, s.tile.g_left);
  multiply_into<T>(rows, hidden, depth, n, s.right.w1, s.h, [&](Vec<T> v, int c, std::ptrdiff_t) {
    ahead.next();
    return v * load<T>(s.w1.scale + c);
  });
  if (!plan.gated) {
    multiply_into<T>(rows, hidden, depth, g, s.right_w2_t, s.da, [&](Vec<T> dh, int c, std::ptrdiff_t at) {
      Vec<T> value, slope;
      Act::both(load<T>(s.h.data + at), value, slope);
      store<T>(s.h.data + at, value);
      return dh * slope * load<T>(s.w1.scale + c);
    });
    return;
  }
  multiply_into<T>(rows, hidden, depth, n, s.right.w_gate, s.gate,
                   [&](Vec<T> v, int c, std::ptrdiff_t) { return v * load<T>(s.w_gate.scale + c); });
  multiply_into<T>(rows, hidden, depth, g, s.right_w2_t, s.da, [&](Vec<T> dh, int c, std::ptrdiff_t at) {
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
template <class T, class O>
void rms_norm_backward(const NeuralField& f, const BackwardScratch<T, O>& s, std::int64_t patch, int first,
                       int rows) {
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

template <class T, class Act, class O>
void backward_tile(const NeuralField& f, const NeuralFieldGradients& d, const Plan<T>& plan,
                   const BackwardScratch<T, O>& s, std::int64_t patch, int first, Ahead& ahead) {
  const int rows = at_most(plan.tile, plan.pixels - first), channels = plan.channels, hidden = plan.hidden;
  read_rows<T>(f.x, f.dtype, patch, first, rows, channels, s.n);
  if (s.norm_weight) rms_norm<T>(s.n, rows, channels, T(f.norm_eps), s.norm_weight, s.inverse);
  read_rows<T>(d.y, f.dtype, patch, first, rows, channels, s.g);
  for (int r = 0; r < rows; ++r) {
    for_row(s.g, r, channels, [&](int c, T* p) { store<T>(p, load<T>(p) * load<T>(s.w2.scale + c)); });
  }
  backward_hidden<T, Act>(plan, s, rows, ahead);
  if (d.w1.data) {
    const int depth = depth_of<T, O>(rows);
    const Panels<O> n = by_rows<O>(rows, channels, s.n, s.tile.n), g = by_rows<O>(rows, channels, s.g, s.tile.g),
                    h = by_rows<O>(rows, hidden, s.h, s.tile.h), da = by_rows<O>(rows, hidden, s.da, s.tile.da);
    multiply_transposed<T>(channels, hidden, depth, n, da, s.d_w1, first > 0);
    multiply_transposed<T>(hidden, channels, depth, h, g, s.d_w2, first > 0);
    if (plan.gated) {
      const Panels<O> db = by_rows<O>(rows, hidden, s.db, s.tile.db);
      multiply_transposed<T>(channels, hidden, depth, n, db, s.d_w_gate, first > 0);
    }
  }
  if (!d.x.data && !d.norm_weight) return;
  const int depth = depth_of<T, O>(hidden);
  const Panels<O> da = by_columns<O>(rows, hidden, s.da, s.h_left);
  multiply_into<T>(rows, channels, depth, da, s.right_w1_t, s.dn, [](Vec<T> v, int, std::ptrdiff_t) { return v; });
  if (plan.gated) {
    const Panels<O> db = by_columns<O>(rows, hidden, s.db, s.h_left);
    multiply_into<T>(rows, channels, depth, db, s.right_w_gate_t, s.dn,
                     [&](Vec<T> v, int, std::ptrdiff_t at) { return v + load<T>(s.dn.data + at); });
  }
  if (s.norm_weight) rms_norm_backward<T>(f, s, patch, first, rows);
  if (d.x.data) write_rows<T>(s.dn, f.residual ? &d.y : nullptr, f.dtype, patch, first, rows, channels, d.x);
}

// Finish a weight's gradient and store it.
template <class T>
void write_weight_gradient(const Weight<T>& w, bool normalized, Panels<T> d, DType dtype, std::int64_t patch,
                           int rows, int columns, const MutableMatrices& target) {
  if (normalized) remove_change_of_norm<T>(w, d, rows, columns);
  write_rows<T>(d, nullptr, dtype, patch, 0, rows, columns, target);
}

// Every wanted gradient of one patch; that of the norm weight is added to d_norm (null: not wanted). The gradient of
// x may overwrite that of y, and those of the weights the weights. `ahead` takes one step for each vector of the
// hidden layer.
template <class T, class Act, class O>
void backward_patch(const NeuralField& f, const NeuralFieldGradients& d, const Plan<T>& plan,
                    BackwardScratch<T, O>& s, std::int64_t patch, double* d_norm, Ahead& ahead) {
  const int channels = plan.channels, hidden = plan.hidden;
  pack_weights<T>(f, plan, patch, s);
  transpose<T>(channels, hidden, s.w1.panels, s.w1_t);
  transpose<T>(hidden, channels, s.w2.panels, s.w2_t);
  if (plan.gated) transpose<T>(channels, hidden, s.w_gate.panels, s.w_gate_t);
  s.right_w1_t = by_rows<O>(hidden, channels, s.w1_t, s.right_w1_t);
  s.right_w2_t = by_rows<O>(channels, hidden, s.w2_t, s.right_w2_t);
  if (plan.gated) s.right_w_gate_t = by_rows<O>(hidden, channels, s.w_gate_t, s.right_w_gate_t);
  for (int first = 0; first < plan.pixels; first += plan.tile) {
    for (int c = 0; c < round_up(channels, kLanes<T>); ++c) s.d_norm[c] = T(0);
    backward_tile<T, Act>(f, d, plan, s, patch, first, ahead);
    for (int c = 0; d_norm && c < channels; ++c) d_norm[c] += s.d_norm[c];
  }
  if (d.w1.data) {
    const DType dtype = f.weight_dtype;
    write_weight_gradient<T>(s.w1, f.normalize_w1, s.d_w1, dtype, patch, channels, hidden, d.w1);
    write_weight_gradient<T>(s.w2, f.normalize_w2, s.d_w2, dtype, patch, hidden, channels, d.w2);
    if (plan.gated)
      write_weight_gradient<T>(s.w_gate, f.normalize_w_gate, s.d_w_gate, dtype, patch, channels, hidden, d.w_gate);
  }
}

}  // namespace pixnerd::PIXNERD_ISA
