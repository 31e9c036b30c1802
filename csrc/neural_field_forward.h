// The forward of a neural-field block on a tile of one patch's pixels.
#pragma once

#include "neural_field_parts.h"

namespace pixnerd::PIXNERD_ISA {

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

// Pack the weights of one patch.
template <class T, class Scratch>
void pack_weights(const NeuralField& f, const Plan<T>& plan, std::int64_t patch, Scratch& s) {
  const DType dtype = f.weight_dtype;
  pack<T>(f.w1, dtype, patch, plan.channels, plan.hidden, f.normalize_w1, f.weight_eps, s.w1);
  pack<T>(f.w2, dtype, patch, plan.hidden, plan.channels, f.normalize_w2, f.weight_eps, s.w2);
  if (plan.gated)
    pack<T>(f.w_gate, dtype, patch, plan.channels, plan.hidden, f.normalize_w_gate, f.weight_eps, s.w_gate);
}

template <class T>
void add_weights_ahead(const NeuralField& f, const Plan<T>& plan, std::int64_t patch, Ahead& ahead) {
  add_ahead(ahead, f.w1, f.weight_dtype, patch, plan.channels, plan.hidden);
  add_ahead(ahead, f.w2, f.weight_dtype, patch, plan.hidden, plan.channels);
  add_ahead(ahead, f.w_gate, f.weight_dtype, patch, plan.channels, plan.hidden);
}

// Vectors of one patch's hidden layer.
template <class T>
std::int64_t hidden_vectors(const Plan<T>& plan) {
  return static_cast<std::int64_t>(plan.pixels) * ((plan.hidden + kLanes<T> - 1) / kLanes<T>);
}

// Rows first ... of y from those of x, which may be the same memory; `ahead` takes one step for each vector of the
// hidden layer.
template <class T, class Act, class Scratch>
void forward_tile(const NeuralField& f, const Plan<T>& plan, const Scratch& s, std::int64_t patch, int first,
                  const MutableMatrices& y, Ahead& ahead) {
  const int rows = at_most(plan.tile, plan.pixels - first), channels = plan.channels, hidden = plan.hidden;
  read_rows<T>(f.x, f.dtype, patch, first, rows, channels, s.n);
  if (s.norm_weight) rms_norm<T>(s.n, rows, channels, T(f.norm_eps), s.norm_weight, s.inverse);
  if (plan.gated) {
    multiply_into<T>(rows, hidden, channels, s.n, s.w_gate.panels, s.gate,
                     [&](Vec<T> v, int c, std::ptrdiff_t) { return Act::value(v * load<T>(s.w_gate.scale + c)); });
    multiply_into<T>(rows, hidden, channels, s.n, s.w1.panels, s.h, [&](Vec<T> v, int c, std::ptrdiff_t at) {
      ahead.next();
      return v * load<T>(s.w1.scale + c) * load<T>(s.gate.data + at);
    });
  } else {
    multiply_into<T>(rows, hidden, channels, s.n, s.w1.panels, s.h, [&](Vec<T> v, int c, std::ptrdiff_t) {
      ahead.next();
      return Act::value(v * load<T>(s.w1.scale + c));
    });
  }
  multiply_into<T>(rows, channels, hidden, s.h, s.w2.panels, s.n,
                   [&](Vec<T> v, int c, std::ptrdiff_t) { return v * load<T>(s.w2.scale + c); });
  write_rows<T>(s.n, f.residual ? &f.x : nullptr, f.dtype, patch, first, rows, channels, y);
}

}  // namespace pixnerd::PIXNERD_ISA
