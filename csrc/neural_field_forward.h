// The forward of a neural-field block on a tile of one patch's pixels.
#pragma once

#include "neural_field_parts.h"

namespace pixnerd::PIXNERD_ISA {

// A block's weights as right operands.
template <class T, class O>
struct Operands {
  Panels<O> w1, w2, w_gate;

  Operands(const Plan<T>& plan, Arena<T>& arena) {
    w1 = arena.template operand<O>(depth_of<T, O>(plan.channels), plan.hidden);
    w2 = arena.template operand<O>(depth_of<T, O>(plan.hidden), plan.channels);
    if (plan.gated) w_gate = arena.template operand<O>(depth_of<T, O>(plan.channels), plan.hidden);
  }
};

template <class T, class O = T>
struct ForwardScratch {
  using Operand = O;
  Weight<T> w1, w2, w_gate;
  Operands<T, O> right;
  Panels<T> n, h, gate;
  Panels<O> n_left, h_left;
  T *norm_weight, *inverse;

  ForwardScratch(const NeuralField& f, const Plan<T>& plan, Arena<T>& arena)
      : w1(arena.weight(plan.channels, plan.hidden)),
        w2(arena.weight(plan.hidden, plan.channels)),
        right(plan, arena) {
    if (plan.gated) w_gate = arena.weight(plan.channels, plan.hidden);
    n = arena.matrix(plan.tile, plan.channels);
    h = arena.matrix(plan.tile, plan.hidden);
    n_left = arena.template operand<O>(plan.tile, depth_of<T, O>(plan.channels));
    h_left = arena.template operand<O>(plan.tile, depth_of<T, O>(plan.hidden));
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
  using O = typename Scratch::Operand;
  s.right.w1 = by_rows<O>(plan.channels, plan.hidden, s.w1.panels, s.right.w1);
  s.right.w2 = by_rows<O>(plan.hidden, plan.channels, s.w2.panels, s.right.w2);
  if (plan.gated) s.right.w_gate = by_rows<O>(plan.channels, plan.hidden, s.w_gate.panels, s.right.w_gate);
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

// Every tile of every patch: pack(scratch, patch), then tile(scratch, patch, first row, ahead); near(ahead, patch)
// names what a patch reads and writes. Few patches have their tiles shared out too, and are packed again by each
// worker.
template <class T, class Scratches, class Near, class Pack, class Tile>
void over_tiles(const NeuralField& f, const Plan<T>& plan, Near&& near, Pack&& pack, Tile&& tile) {
  Arena<T> measure(nullptr);
  Scratches(f, plan, measure);
  const int tiles = (plan.pixels + plan.tile - 1) / plan.tile;
  int parts = 1;
  while (parts < tiles && f.patches * parts < f.threads) ++parts;
  const std::int64_t count = tiles ? f.patches * parts : 0;
  const int workers = workers_for(count, f.threads);
  const Scratch scratch(measure.used(), workers);
  parallel_for(count, f.threads, [&](int worker, std::int64_t item) {
    Arena<T> arena(scratch.slice(worker));
    Scratches s(f, plan, arena);
    const std::int64_t patch = item / parts;
    const int part = static_cast<int>(item % parts);
    // What the worker will probably read and write next comes near while it computes.
    Ahead ahead;
    if (parts == 1 && patch + workers < f.patches) near(ahead, patch + workers);
    ahead.spread(hidden_vectors(plan));
    pack(s, patch);
    for (int t = part; t < tiles; t += parts) tile(s, patch, t * plan.tile, ahead);
  });
}

// Rows first ... of y from those of x, which may be the same memory; `ahead` takes one step for each vector of the
// hidden layer.
template <class T, class Act, class Scratch>
void forward_tile(const NeuralField& f, const Plan<T>& plan, const Scratch& s, std::int64_t patch, int first,
                  const MutableMatrices& y, Ahead& ahead) {
  const int rows = at_most(plan.tile, plan.pixels - first), channels = plan.channels, hidden = plan.hidden;
  read_rows<T>(f.x, f.dtype, patch, first, rows, channels, s.n);
  if (s.norm_weight) rms_norm<T>(s.n, rows, channels, T(f.norm_eps), s.norm_weight, s.inverse);
  using O = typename Scratch::Operand;
  const Panels<O> n = by_columns<O>(rows, channels, s.n, s.n_left);
  const int depth = depth_of<T, O>(channels);
  if (plan.gated) {
    multiply_into<T>(rows, hidden, depth, n, s.right.w_gate, s.gate,
                     [&](Vec<T> v, int c, std::ptrdiff_t) { return Act::value(v * load<T>(s.w_gate.scale + c)); });
    multiply_into<T>(rows, hidden, depth, n, s.right.w1, s.h, [&](Vec<T> v, int c, std::ptrdiff_t at) {
      ahead.next();
      return v * load<T>(s.w1.scale + c) * load<T>(s.gate.data + at);
    });
  } else {
    multiply_into<T>(rows, hidden, depth, n, s.right.w1, s.h, [&](Vec<T> v, int c, std::ptrdiff_t) {
      ahead.next();
      return Act::value(v * load<T>(s.w1.scale + c));
    });
  }
  const Panels<O> h = by_columns<O>(rows, hidden, s.h, s.h_left);
  multiply_into<T>(rows, channels, depth_of<T, O>(hidden), h, s.right.w2, s.n,
                   [&](Vec<T> v, int c, std::ptrdiff_t) { return v * load<T>(s.w2.scale + c); });
  write_rows<T>(s.n, f.residual ? &f.x : nullptr, f.dtype, patch, first, rows, channels, y);
}

}  // namespace pixnerd::PIXNERD_ISA
