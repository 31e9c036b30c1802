// The value of a neural-field block and its tangent in one pass over each patch.
//
// Letters as in the forward, d for tangents, and d w for what the tangent of w * s is but for the factor s:
//   dz = (dn @ w1 + n @ d w1) * s1;   plain: dh = act'(z) * dz;   gated: dh = act(zg) * dz + act'(zg) * dzg * z
//   dy = dx + (dh @ w2 + h @ d w2) * s2
#include "neural_field_forward.h"

namespace pixnerd::PIXNERD_ISA {
namespace {

template <class T>
struct JvpScratch {
  Weight<T> w1, w2, w_gate;
  Panels<T> d_w1, d_w2, d_w_gate;
  Panels<T> n, d_n, h, d_h, gate, d_gate;
  T *norm_weight, *inverse;

  JvpScratch(const NeuralField& f, const Plan<T>& plan, Arena<T>& arena)
      : w1(arena.weight(plan.channels, plan.hidden)), w2(arena.weight(plan.hidden, plan.channels)) {
    d_w1 = arena.matrix(plan.channels, plan.hidden);
    d_w2 = arena.matrix(plan.hidden, plan.channels);
    n = arena.matrix(plan.tile, plan.channels);
    d_n = arena.matrix(plan.tile, plan.channels);
    h = arena.matrix(plan.tile, plan.hidden);
    d_h = arena.matrix(plan.tile, plan.hidden);
    if (plan.gated) {
      w_gate = arena.weight(plan.channels, plan.hidden);
      d_w_gate = arena.matrix(plan.channels, plan.hidden);
      gate = arena.matrix(plan.tile, plan.hidden);
      d_gate = arena.matrix(plan.tile, plan.hidden);
    }
    norm_weight = padded_norm_weight(f, arena);
    inverse = arena.vector(plan.tile);
  }
};

// A weight of one patch and its tangent, if it has one.
template <class T>
void pack_both(const NeuralField& f, const Matrices& w, const Matrices& d_w, std::int64_t patch, int rows,
               int columns, bool normalized, Weight<T>& weight, Panels<T> tangent) {
  pack<T>(w, f.weight_dtype, patch, rows, columns, normalized, f.weight_eps, weight);
  if (!d_w.data) return;
  read_rows<T>(d_w, f.weight_dtype, patch, 0, rows, columns, tangent);
  if (normalized) remove_change_of_norm<T>(weight, tangent, rows, columns);
}

// Replace the rows of x by n, and those of dx by its tangent: with u = x * inverse,
// dn = inverse * (dx - u * mean(u * dx)) * weight.
template <class T>
void rms_norm_jvp(Panels<T> x, Panels<T> d_x, int rows, int columns, T eps, const T* weight, T* inverse) {
  rms_norm<T>(x, rows, columns, eps, nullptr, inverse);
  for (int r = 0; r < rows; ++r) {
    const auto unit = [&](int c) { return load<T>(x.row(c / kPanel<T>, r) + c % kPanel<T>); };
    Vec<T> dot{};
    for_row(d_x, r, columns, [&](int c, T* p) { dot += unit(c) * load<T>(p); });
    const T mean = sum<T>(dot) / T(columns);
    for_row(d_x, r, columns,
            [&](int c, T* p) { store<T>(p, inverse[r] * (load<T>(p) - unit(c) * mean) * load<T>(weight + c)); });
    for_row(x, r, columns, [&](int c, T* p) { store<T>(p, load<T>(p) * load<T>(weight + c)); });
  }
}

// The tangent of A @ W, each finished vector passed through function(vector, column, offset in `out`); A or W may
// have none, with null data.
template <class T, class Function>
void multiply_tangents(int rows, int columns, int depth, Panels<T> a, Panels<T> d_a, Panels<T> w, Panels<T> d_w,
                       Panels<T> out, Function&& function) {
  if (!d_w.data) {
    multiply_into<T>(rows, columns, depth, d_a, w, out, function);
  } else if (!d_a.data) {
    multiply_into<T>(rows, columns, depth, a, d_w, out, function);
  } else {
    multiply_into<T>(rows, columns, depth, d_a, w, out, [](Vec<T> v, int, std::ptrdiff_t) { return v; });
    multiply_into<T>(rows, columns, depth, a, d_w, out,
                     [&](Vec<T> v, int c, std::ptrdiff_t at) { return function(v + load<T>(out.data + at), c, at); });
  }
}

// h and its tangent, from n and its own.
template <class T, class Act>
void hidden_jvp(const Plan<T>& plan, const JvpScratch<T>& s, int rows, Panels<T> d_n, Panels<T> d_w1,
                Panels<T> d_w_gate, Ahead& ahead) {
  const int channels = plan.channels, hidden = plan.hidden;
  multiply_into<T>(rows, hidden, channels, s.n, s.w1.panels, s.h, [&](Vec<T> v, int c, std::ptrdiff_t) {
    ahead.next();
    return v * load<T>(s.w1.scale + c);
  });
  Vec<T> value, slope;
  if (!plan.gated) {
    multiply_tangents<T>(rows, hidden, channels, s.n, d_n, s.w1.panels, d_w1, s.d_h,
                         [&](Vec<T> v, int c, std::ptrdiff_t at) {
                           Act::both(load<T>(s.h.data + at), value, slope);
                           store<T>(s.h.data + at, value);
                           return v * load<T>(s.w1.scale + c) * slope;
                         });
    return;
  }
  multiply_into<T>(rows, hidden, channels, s.n, s.w_gate.panels, s.gate,
                   [&](Vec<T> v, int c, std::ptrdiff_t) { return v * load<T>(s.w_gate.scale + c); });
  multiply_tangents<T>(rows, hidden, channels, s.n, d_n, s.w_gate.panels, d_w_gate, s.d_gate,
                       [&](Vec<T> v, int c, std::ptrdiff_t) { return v * load<T>(s.w_gate.scale + c); });
  multiply_tangents<T>(rows, hidden, channels, s.n, d_n, s.w1.panels, d_w1, s.d_h,
                       [&](Vec<T> v, int c, std::ptrdiff_t at) {
                         const Vec<T> z = load<T>(s.h.data + at);
                         Act::both(load<T>(s.gate.data + at), value, slope);
                         store<T>(s.h.data + at, value * z);
                         return v * load<T>(s.w1.scale + c) * value + slope * load<T>(s.d_gate.data + at) * z;
                       });
}

template <class T, class Act>
void jvp_tile(const NeuralField& f, const NeuralFieldTangents& d, const Plan<T>& plan, const JvpScratch<T>& s,
              std::int64_t patch, int first, Ahead& ahead) {
  const int rows = at_most(plan.tile, plan.pixels - first), channels = plan.channels, hidden = plan.hidden;
  read_rows<T>(f.x, f.dtype, patch, first, rows, channels, s.n);
  if (d.x.data) {
    read_rows<T>(d.x, f.dtype, patch, first, rows, channels, s.d_n);
    if (s.norm_weight) rms_norm_jvp<T>(s.n, s.d_n, rows, channels, T(f.norm_eps), s.norm_weight, s.inverse);
  } else if (s.norm_weight) {
    rms_norm<T>(s.n, rows, channels, T(f.norm_eps), s.norm_weight, s.inverse);
  }
  const bool weights = d.w1.data != nullptr;
  hidden_jvp<T, Act>(plan, s, rows, d.x.data ? s.d_n : Panels<T>{}, weights ? s.d_w1 : Panels<T>{},
                     weights ? s.d_w_gate : Panels<T>{}, ahead);
  const auto scaled = [&](Vec<T> v, int c, std::ptrdiff_t) { return v * load<T>(s.w2.scale + c); };
  multiply_into<T>(rows, channels, hidden, s.h, s.w2.panels, s.n, scaled);
  multiply_tangents<T>(rows, channels, hidden, s.h, s.d_h, s.w2.panels, weights ? s.d_w2 : Panels<T>{}, s.d_n,
                       scaled);
  write_rows<T>(s.n, f.residual ? &f.x : nullptr, f.dtype, patch, first, rows, channels, d.y);
  const bool through = f.residual && d.x.data;
  write_rows<T>(s.d_n, through ? &d.x : nullptr, f.dtype, patch, first, rows, channels, d.y_tangent);
}

template <class T, class Act>
void jvp(const NeuralField& f, const NeuralFieldTangents& d) {
  const bool gated = f.w_gate.data != nullptr;
  const Plan<T> plan(f, 2, gated ? 4 : 2, 192 << 10);
  over_tiles<T, JvpScratch<T>>(
      f, plan,
      [&](Ahead& ahead, std::int64_t patch) {
        add_weights_ahead(f, plan, patch, ahead);
        add_ahead(ahead, d.w1, f.weight_dtype, patch, plan.channels, plan.hidden);
        add_ahead(ahead, d.w2, f.weight_dtype, patch, plan.hidden, plan.channels);
        add_ahead(ahead, d.w_gate, f.weight_dtype, patch, plan.channels, plan.hidden);
        add_ahead(ahead, f.x, f.dtype, patch, plan.pixels, plan.channels);
        add_ahead(ahead, d.x, f.dtype, patch, plan.pixels, plan.channels);
        add_ahead(ahead, d.y, f.dtype, patch, plan.pixels, plan.channels);
        add_ahead(ahead, d.y_tangent, f.dtype, patch, plan.pixels, plan.channels);
      },
      [&](JvpScratch<T>& s, std::int64_t patch) {
        pack_both<T>(f, f.w1, d.w1, patch, plan.channels, plan.hidden, f.normalize_w1, s.w1, s.d_w1);
        pack_both<T>(f, f.w2, d.w2, patch, plan.hidden, plan.channels, f.normalize_w2, s.w2, s.d_w2);
        if (gated)
          pack_both<T>(f, f.w_gate, d.w_gate, patch, plan.channels, plan.hidden, f.normalize_w_gate, s.w_gate,
                       s.d_w_gate);
      },
      [&](const JvpScratch<T>& s, std::int64_t patch, int first, Ahead& ahead) {
        jvp_tile<T, Act>(f, d, plan, s, patch, first, ahead);
      });
}

}  // namespace

void neural_field_mlp_jvp(const NeuralField& field, const NeuralFieldTangents& tangents) {
  dispatch(field.dtype, field.activation,
           [&]<class T, class O, class Act>(Types<T, O, Act>) { jvp<T, Act>(field, tangents); });
}

}  // namespace pixnerd::PIXNERD_ISA
