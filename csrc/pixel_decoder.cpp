#include "pixel_decoder.h"

#include "parallel.h"
#include "pixel_decoder_parts.h"
#include "scratch.h"

// A worker takes one patch at a time and runs it from its pixels to its result: the activations of the patch stay in
// the worker's memory, row by row, and each block works on tiles of them.
namespace pixnerd::PIXNERD_ISA {
namespace {

template <class T, class O>
struct ForwardWorker {
  ForwardScratch<T, O> field;
  Ends<T> ends;
  T* x;

  ForwardWorker(const PixelDecoder& d, const NeuralField& f, const Plan<T>& plan, Arena<T>& arena)
      : field(f, plan, arena), ends(d, plan.tile, arena), x(arena.vector(f.pixels * f.channels)) {}
};

// The weights that a worker will probably need after those of a block: the next block's, or those of the first block
// of the patch `apart` further on.
template <class T>
Ahead next_weights(const PixelDecoder& d, const Plan<T>& plan, std::int64_t patch, int block, std::int64_t apart) {
  Ahead ahead;
  const bool last = block + 1 == d.blocks;
  if (!last || patch + apart < d.count) {
    const NeuralField next = block_field<T>(d, last ? 0 : block + 1, nullptr);
    add_weights_ahead(next, plan, last ? patch + apart : patch, ahead);
  }
  ahead.spread(hidden_vectors(plan));
  return ahead;
}

template <class T, class O, class Act>
void forward(const PixelDecoder& d, const MutablePlanes& out) {
  const NeuralField first_block = block_field<T>(d, 0, nullptr);
  const Plan<T> plan(first_block, 1, d.gated ? 2 : 1, 96 << 10);
  Arena<T> measure(nullptr);
  ForwardWorker<T, O>(d, first_block, plan, measure);
  const int workers = workers_for(d.count, d.threads);
  const Scratch scratch(measure.used(), workers);
  parallel_for(d.count, d.threads, [&](int worker, std::int64_t patch) {
    Arena<T> arena(scratch.slice(worker));
    ForwardWorker<T, O> w(d, first_block, plan, arena);
    const Place place(d, patch);
    const auto for_tiles = [&](auto&& function) { each_tile(plan, function); };
    for_tiles([&](int first, int rows) { embed<T>(d, w.ends, place, first, rows, w.field.n, w.x); });
    for (int k = 0; k < d.blocks; ++k) {
      const NeuralField f = block_field<T>(d, k, w.x);
      pad<T>(f.norm_weight, f.channels, w.field.norm_weight);
      pack_weights<T>(f, plan, patch, w.field);
      Ahead ahead = next_weights<T>(d, plan, patch, k, workers);
      for_tiles(
          [&](int first, int) { forward_tile<T, Act>(f, plan, w.field, patch, first, {w.x, 0, d.channels}, ahead); });
    }
    for_tiles([&](int first, int rows) {
      final_norm<T>(d, w.ends, w.x, first, rows, w.field.n, w.field.inverse);
      write_pixels<T>(d, out, place, d.out_channels, first, rows, project<T>(d, w.ends, rows, w.field.n));
    });
  });
}

// ---- backward ----

// Where each sum begins.
struct Sums {
  std::int64_t table = 0, pixel_weight, norms, final_norm, linear_weight, linear_bias, total;

  explicit Sums(const PixelDecoder& d) {
    const std::int64_t channels = d.channels;
    pixel_weight = table + static_cast<std::int64_t>(d.height) * d.width * channels;
    norms = pixel_weight + d.image_channels * channels;
    final_norm = norms + d.blocks * channels;
    linear_weight = final_norm + channels;
    linear_bias = linear_weight + (d.linear_weight ? d.out_channels * channels : 0);
    total = linear_bias + (d.linear_weight ? d.out_channels : 0);
  }
};

template <class T, class O>
struct BackwardWorker {
  BackwardScratch<T, O> field;
  Ends<T> ends;
  Panels<T> pixel_weight_t, linear_weight_t;  // [channels, image_channels], [out_channels, channels]
  Panels<T> outer;                            // of a tile: pixels^T dx or out^T n
  T *x, *gradient;                            // x of blocks 0 ... blocks, each [pixels, channels]; that of x

  BackwardWorker(const PixelDecoder& d, const NeuralField& f, const Plan<T>& plan, Arena<T>& arena)
      : field(f, plan, arena), ends(d, plan.tile, arena) {
    const int channels = d.channels, inputs = d.image_channels, outputs = d.out_channels;
    pixel_weight_t = arena.matrix(round_up(channels, kPanel<T>), inputs);
    if (pixel_weight_t.data) transpose<T>(inputs, channels, ends.pixel_weight, pixel_weight_t);
    if (d.linear_weight) {
      linear_weight_t = arena.matrix(round_up(outputs, kPanel<T>), channels);
      if (linear_weight_t.data) transpose<T>(channels, outputs, ends.linear_weight, linear_weight_t);
    }
    const int widest = inputs > outputs || !d.linear_weight ? inputs : outputs;
    outer = arena.matrix(round_up(widest, kPanel<T>), channels);
    x = arena.vector((d.blocks + 1) * f.pixels * f.channels);
    gradient = arena.vector(f.pixels * f.channels);
  }
};

// sums[rows, columns] += a matrix.
template <class T>
void add_to(double* sums, int rows, int columns, Panels<T> values) {
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < columns; ++c) {
      sums[static_cast<std::ptrdiff_t>(r) * columns + c] += values.row(c / kPanel<T>, r)[c % kPanel<T>];
    }
  }
}

// From the incoming gradient to that of the last block's result.
template <class T, class O>
void final_backward(const PixelDecoder& d, const PixelDecoderGradients& g, const NeuralField& f,
                    const BackwardWorker<T, O>& w, const Place& place, const Sums& at, double* sums, int first,
                    int rows) {
  const BackwardScratch<T, O>& s = w.field;
  const int channels = d.channels, outputs = d.out_channels;
  const T* x = static_cast<const T*>(f.x.data);
  final_norm<T>(d, w.ends, x, first, rows, s.n, s.inverse);
  if (d.linear_weight) {
    read_pixels<T>(d, g.out, place, outputs, first, rows, w.ends.out);
    multiply_into<T>(rows, channels, outputs, w.ends.out, w.linear_weight_t, s.dn,
                     [](Vec<T> v, int, std::ptrdiff_t) { return v; });
    if (sums) {
      multiply_transposed<T>(outputs, channels, rows, w.ends.out, s.n, w.outer, false);
      add_to<T>(sums + at.linear_weight, outputs, channels, w.outer);
      for (int r = 0; r < rows; ++r)
        add_to<T>(sums + at.linear_bias, 1, outputs, {w.ends.out.row(0, r), w.ends.out.stride});
    }
  } else {
    read_pixels<T>(d, g.out, place, outputs, first, rows, s.dn);
  }
  if (w.ends.final_norm) {
    for (int c = 0; c < round_up(channels, kLanes<T>); ++c) s.d_norm[c] = T(0);
    rms_norm_backward<T>(f, s, 0, first, rows);
    for (int c = 0; sums && c < channels; ++c) sums[at.final_norm + c] += s.d_norm[c];
  }
  write_rows<T>(s.dn, nullptr, kComputed<T>, 0, first, rows, channels, {w.gradient, 0, channels});
}

// From the gradient of the first block's input to those of the embedding and the pixels.
template <class T, class O>
void embed_backward(const PixelDecoder& d, const PixelDecoderGradients& g, const BackwardWorker<T, O>& w,
                    const Place& place, const Sums& at, double* sums, int first, int rows) {
  const int channels = d.channels, inputs = d.image_channels;
  read_rows<T>({w.gradient, 0, channels}, kComputed<T>, 0, first, rows, channels, w.field.dn);
  if (sums) {
    read_pixels<T>(d, d.image, place, inputs, first, rows, w.ends.pixels);
    multiply_transposed<T>(inputs, channels, rows, w.ends.pixels, w.field.dn, w.outer, false);
    add_to<T>(sums + at.pixel_weight, inputs, channels, w.outer);
    const T* row = w.gradient + static_cast<std::ptrdiff_t>(first) * channels;
    double* table = sums + at.table + static_cast<std::ptrdiff_t>(first) * channels;
    for (std::ptrdiff_t i = 0; i < static_cast<std::ptrdiff_t>(rows) * channels; ++i) table[i] += row[i];
  }
  if (g.image.data) {
    multiply_into<T>(rows, inputs, channels, w.field.dn, w.pixel_weight_t, w.ends.pixels,
                     [](Vec<T> v, int, std::ptrdiff_t) { return v; });
    write_pixels<T>(d, g.image, place, inputs, first, rows, w.ends.pixels);
  }
}

template <class T, class Act, class O>
void backward_run(const PixelDecoder& d, const PixelDecoderGradients& g, const Plan<T>& plan, BackwardWorker<T, O>& w,
                  std::int64_t patch, const Sums& at, double* sums) {
  const Place place(d, patch);
  const int channels = d.channels;
  const std::ptrdiff_t size = static_cast<std::ptrdiff_t>(plan.pixels) * channels;
  const auto for_tiles = [&](auto&& function) { each_tile(plan, function); };
  for_tiles([&](int first, int rows) { embed<T>(d, w.ends, place, first, rows, w.field.n, w.x); });
  for (int k = 0; k < d.blocks; ++k) {
    const NeuralField f = block_field<T>(d, k, w.x + k * size);
    pad<T>(f.norm_weight, channels, w.field.norm_weight);
    pack_weights<T>(f, plan, patch, w.field);
    Ahead ahead = next_weights<T>(d, plan, patch, k, d.count);
    for_tiles([&](int first, int) {
      forward_tile<T, Act>(f, plan, w.field, patch, first, {w.x + (k + 1) * size, 0, channels}, ahead);
    });
  }
  if (d.final_norm) pad<T>(d.final_norm, channels, w.field.norm_weight);
  const NeuralField last = block_field<T>(d, 0, w.x + d.blocks * size);
  for_tiles([&](int first, int rows) { final_backward<T>(d, g, last, w, place, at, sums, first, rows); });
  for (int k = d.blocks; k-- > 0;) {
    const NeuralField f = block_field<T>(d, k, w.x + k * size);
    pad<T>(f.norm_weight, channels, w.field.norm_weight);
    NeuralFieldGradients gradients{.y = {w.gradient, 0, channels}, .x = {w.gradient, 0, channels}};
    if (g.generated.data) {
      const auto target = [&](int index, int width) {
        return MutableMatrices{matrix<T>(d, g.generated, k, index), g.generated.patch_stride, width};
      };
      gradients.w1 = target(d.gated ? 1 : 0, d.hidden);
      gradients.w2 = target(d.gated ? 2 : 1, channels);
      if (d.gated) gradients.w_gate = target(0, d.hidden);
    }
    Ahead none;
    double* d_norm = sums ? sums + at.norms + k * channels : nullptr;
    backward_patch<T, Act>(f, gradients, plan, w.field, patch, d_norm, none);
  }
  for_tiles([&](int first, int rows) { embed_backward<T>(d, g, w, place, at, sums, first, rows); });
}

// Patches are summed up in this many groups at most, each in order, and then the groups: the same bits on any number
// of threads. The bytes bound the groups of large tables.
constexpr std::int64_t kGroups = 64, kGroupBytes = 16 << 20;

template <class T, class O, class Act>
void backward(const PixelDecoder& d, const PixelDecoderGradients& g) {
  const NeuralField first_block = block_field<T>(d, 0, nullptr);
  const Plan<T> plan(first_block, 3, d.gated ? 4 : 2, 192 << 10);
  Arena<T> measure(nullptr);
  BackwardWorker<T, O>(d, first_block, plan, measure);
  const Sums at(d);
  std::int64_t groups = d.count;
  if (g.sums) {
    const std::int64_t fit = kGroupBytes / (at.total * static_cast<std::int64_t>(sizeof(double)));
    groups = groups < kGroups ? groups : kGroups;
    groups = groups < fit ? groups : fit < 1 ? 1 : fit;
  }
  const std::size_t bytes = g.sums ? static_cast<std::size_t>(groups * at.total) * sizeof(double) : 1;
  const Scratch sums_memory(bytes, 1);
  double* partials = g.sums ? static_cast<double*>(sums_memory.slice(0)) : nullptr;
  const Scratch scratch(measure.used(), workers_for(groups, d.threads));
  parallel_for(groups, d.threads, [&](int worker, std::int64_t group) {
    Arena<T> arena(scratch.slice(worker));
    BackwardWorker<T, O> w(d, first_block, plan, arena);
    double* sums = partials ? partials + group * at.total : nullptr;
    for (std::int64_t i = 0; sums && i < at.total; ++i) sums[i] = 0;
    for (std::int64_t patch = group * d.count / groups; patch < (group + 1) * d.count / groups; ++patch) {
      backward_run<T, Act>(d, g, plan, w, patch, at, sums);
    }
  });
  for (std::int64_t group = 0; partials && group < groups; ++group) {
    for (std::int64_t i = 0; i < at.total; ++i) g.sums[i] += partials[group * at.total + i];
  }
}

}  // namespace

std::int64_t pixel_decoder_sums(const PixelDecoder& decoder) { return Sums(decoder).total; }

void pixel_decoder_forward(const PixelDecoder& decoder, const MutablePlanes& out) {
  dispatch(decoder.dtype, decoder.activation,
           [&]<class T, class O, class Act>(Types<T, O, Act>) { forward<T, O, Act>(decoder, out); });
}

void pixel_decoder_backward(const PixelDecoder& decoder, const PixelDecoderGradients& gradients) {
  dispatch(decoder.dtype, decoder.activation,
           [&]<class T, class O, class Act>(Types<T, O, Act>) { backward<T, O, Act>(decoder, gradients); });
}

}  // namespace pixnerd::PIXNERD_ISA
