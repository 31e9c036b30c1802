#include "neural_field_mlp.h"

#include "neural_field_backward.h"

// A worker takes one patch at a time. It packs the patch's weights into panels (converting, padding and
// summing squares on the way), then loops over tiles of pixels whose activations stay in cache. No normalised
// weight and no activation of a whole patch is ever stored.
namespace pixnerd::PIXNERD_ISA {
namespace {

template <class T, class O, class Act>
void forward(const NeuralField& f, const MutableMatrices& y) {
  const Plan<T> plan(f, 1, f.w_gate.data ? 2 : 1, 96 << 10);
  over_tiles<T, ForwardScratch<T, O>>(
      f, plan,
      [&](Ahead& ahead, std::int64_t patch) {
        add_weights_ahead(f, plan, patch, ahead);
        add_ahead(ahead, f.x, f.dtype, patch, plan.pixels, plan.channels);
        add_ahead(ahead, y, f.dtype, patch, plan.pixels, plan.channels);
      },
      [&](ForwardScratch<T, O>& s, std::int64_t patch) { pack_weights<T>(f, plan, patch, s); },
      [&](const ForwardScratch<T, O>& s, std::int64_t patch, int first, Ahead& ahead) {
        forward_tile<T, Act>(f, plan, s, patch, first, y, ahead);
      });
}

template <class T, class O, class Act>
void backward(const NeuralField& f, const NeuralFieldGradients& d) {
  const Plan<T> plan(f, 3, f.w_gate.data ? 4 : 2, 192 << 10);
  Arena<T> measure(nullptr);
  BackwardScratch<T, O>(f, plan, measure);
  const int workers = workers_for(f.patches, f.threads);
  const Scratch scratch(measure.used(), workers);
  // One row of sums per patch, added up in the patches' order: the same bits on any number of threads.
  const bool wants_norm = d.norm_weight != nullptr;
  const std::size_t sums = wants_norm ? static_cast<std::size_t>(f.patches) * f.channels : 1;
  const Scratch sums_memory(sums * sizeof(double), 1);
  double* partials = wants_norm ? static_cast<double*>(sums_memory.slice(0)) : nullptr;
  parallel_for(f.patches, f.threads, [&](int worker, std::int64_t patch) {
    Arena<T> arena(scratch.slice(worker));
    BackwardScratch<T, O> s(f, plan, arena);
    double* d_norm = partials ? partials + patch * f.channels : nullptr;
    for (int c = 0; d_norm && c < f.channels; ++c) d_norm[c] = 0;
    Ahead ahead;
    if (patch + workers < f.patches) {
      add_weights_ahead(f, plan, patch + workers, ahead);
      add_ahead(ahead, f.x, f.dtype, patch + workers, plan.pixels, plan.channels);
      add_ahead(ahead, d.y, f.dtype, patch + workers, plan.pixels, plan.channels);
      add_ahead(ahead, d.x, f.dtype, patch + workers, plan.pixels, plan.channels);
    }
    ahead.spread(hidden_vectors(plan));
    backward_patch<T, Act>(f, d, plan, s, patch, d_norm, ahead);
  });
  if (wants_norm) {
    for (int c = 0; c < f.channels; ++c) {
      double total = 0;
      for (std::int64_t patch = 0; patch < f.patches; ++patch) total += partials[patch * f.channels + c];
      static_cast<T*>(d.norm_weight)[c] = static_cast<T>(total);
    }
  }
}

}  // namespace

void neural_field_mlp_forward(const NeuralField& field, MutableMatrices y) {
  dispatch(field.dtype, field.activation,
           [&]<class T, class O, class Act>(Types<T, O, Act>) { forward<T, O, Act>(field, y); });
}

void neural_field_mlp_backward(const NeuralField& field, const NeuralFieldGradients& gradients) {
  dispatch(field.dtype, field.activation,
           [&]<class T, class O, class Act>(Types<T, O, Act>) { backward<T, O, Act>(field, gradients); });
}

}  // namespace pixnerd::PIXNERD_ISA
