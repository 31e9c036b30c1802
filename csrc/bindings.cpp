// The only file that knows Python: addresses and sizes in, nothing else. The callers in pixnerd_kernels/ops
// have checked every shape.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>

#include "coordinate_encoding.h"
#include "gated_residual.h"
#include "isa.h"
#include "matmul.h"
#include "modulated_rms_norm.h"
#include "neural_field_mlp.h"
#include "normalize_weights.h"
#include "pages.h"
#include "parallel.h"
#include "pixel_decoder.h"
#include "qk_norm_rope.h"
#include "swiglu.h"

namespace py = pybind11;

namespace {

using pixnerd::DType;

const void* address(std::int64_t value) { return reinterpret_cast<const void*>(value); }
void* mutable_address(std::int64_t value) { return reinterpret_cast<void*>(value); }

// A tensor as (address, patch stride, row stride); address 0 for an absent one.
using Strided = std::array<std::int64_t, 3>;

pixnerd::Matrices input(const Strided& t) { return {address(t[0]), t[1], t[2]}; }
pixnerd::MutableMatrices output(const Strided& t) { return {mutable_address(t[0]), t[1], t[2]}; }

// A tensor of heads as (address, batch stride, token stride, head stride).
using StridedHeads = std::array<std::int64_t, 4>;

pixnerd::Heads input(const StridedHeads& t) { return {address(t[0]), t[1], t[2], t[3]}; }
pixnerd::MutableHeads output(const StridedHeads& t) { return {mutable_address(t[0]), t[1], t[2], t[3]}; }

pixnerd::NeuralField field(std::int64_t patches, std::int64_t pixels, int channels, int hidden, int dtype,
                           int weight_dtype, int activation, bool residual, std::array<bool, 3> normalize,
                           double norm_eps, double weight_eps, int threads, const Strided& x, const Strided& w1,
                           const Strided& w2, const Strided& w_gate, std::int64_t norm_weight) {
  return {.patches = patches,
          .pixels = pixels,
          .channels = channels,
          .hidden = hidden,
          .dtype = static_cast<DType>(dtype),
          .weight_dtype = static_cast<DType>(weight_dtype),
          .activation = static_cast<pixnerd::Activation>(activation),
          .residual = residual,
          .normalize_w1 = normalize[0],
          .normalize_w2 = normalize[1],
          .normalize_w_gate = normalize[2],
          .norm_eps = norm_eps,
          .weight_eps = weight_eps,
          .threads = threads,
          .x = input(x),
          .w1 = input(w1),
          .w2 = input(w2),
          .w_gate = input(w_gate),
          .norm_weight = address(norm_weight)};
}

pixnerd::Operand operand(const Strided& t, int dtype) {
  return {address(t[0]), t[1], t[2], static_cast<DType>(dtype)};
}

// An image as (address, image stride, channel stride, row stride, column stride).
using Image = std::array<std::int64_t, 5>;

pixnerd::Planes planes(const Image& t) { return {address(t[0]), t[1], t[2], t[3], t[4]}; }
pixnerd::MutablePlanes mutable_planes(const Image& t) { return {mutable_address(t[0]), t[1], t[2], t[3], t[4]}; }

pixnerd::PixelDecoder decoder(std::int64_t first, std::int64_t count, std::array<std::int64_t, 2> grid,
                              std::array<int, 2> patch, std::array<int, 4> sizes, int blocks, bool gated, int dtype,
                              int activation, std::array<bool, 3> normalize, double norm_eps, double weight_eps,
                              int threads, const Image& image, const Strided& generated,
                              std::array<std::int64_t, 6> dense) {
  return {.first = first,
          .count = count,
          .rows = grid[0],
          .columns = grid[1],
          .height = patch[0],
          .width = patch[1],
          .image_channels = sizes[0],
          .channels = sizes[1],
          .hidden = sizes[2],
          .out_channels = sizes[3],
          .blocks = blocks,
          .gated = gated,
          .dtype = static_cast<DType>(dtype),
          .activation = static_cast<pixnerd::Activation>(activation),
          .normalize_w1 = normalize[0],
          .normalize_w2 = normalize[1],
          .normalize_w_gate = normalize[2],
          .norm_eps = norm_eps,
          .weight_eps = weight_eps,
          .threads = threads,
          .image = planes(image),
          .generated = {address(generated[0]), generated[1], generated[2]},
          .pixel_weight = address(dense[0]),
          .table = address(dense[1]),
          .norm_weights = address(dense[2]),
          .final_norm = address(dense[3]),
          .linear_weight = address(dense[4]),
          .linear_bias = address(dense[5])};
}

// The pixel decoder, and the products around it.
void define_pixel_decoder(py::module_& m) {
  m.def(
      "matmul",
      [](std::int64_t rows, std::int64_t columns, std::int64_t depth, const Strided& a, int a_dtype, const Strided& b,
         int b_dtype, std::int64_t bias, std::int64_t c, std::int64_t row_stride, int dtype, bool accumulate,
         bool row_invariant, int threads) {
        py::gil_scoped_release release;
        pixnerd::matmul({.rows = rows,
                         .columns = columns,
                         .depth = depth,
                         .a = operand(a, a_dtype),
                         .b = operand(b, b_dtype),
                         .bias = address(bias),
                         .c = mutable_address(c),
                         .row_stride = row_stride,
                         .dtype = static_cast<DType>(dtype),
                         .accumulate = accumulate,
                         .row_invariant = row_invariant,
                         .threads = threads});
      },
      py::kw_only(), py::arg("rows"), py::arg("columns"), py::arg("depth"), py::arg("a"), py::arg("a_dtype"),
      py::arg("b"), py::arg("b_dtype"), py::arg("bias"), py::arg("c"), py::arg("row_stride"), py::arg("dtype"),
      py::arg("accumulate"), py::arg("row_invariant"), py::arg("threads"));

  py::class_<pixnerd::PixelDecoder>(m, "PixelDecoder", "Sizes, options and addresses of one run of patches.")
      .def(py::init(&decoder), py::kw_only(), py::arg("first"), py::arg("count"), py::arg("grid"), py::arg("patch"),
           py::arg("sizes"), py::arg("blocks"), py::arg("gated"), py::arg("dtype"), py::arg("activation"),
           py::arg("normalize"), py::arg("norm_eps"), py::arg("weight_eps"), py::arg("threads"), py::arg("image"),
           py::arg("generated"), py::arg("dense"))
      .def_property_readonly("sums", &pixnerd::pixel_decoder_sums, "Doubles that backward's `sums` must hold.");
  m.def(
      "pixel_decoder_forward",
      [](const pixnerd::PixelDecoder& decoder, const Image& out) {
        py::gil_scoped_release release;
        pixnerd::pixel_decoder_forward(decoder, mutable_planes(out));
      },
      py::arg("decoder"), py::arg("out"));
  m.def(
      "pixel_decoder_backward",
      [](const pixnerd::PixelDecoder& decoder, const Image& grad, const Image& d_image, const Strided& d_generated,
         std::int64_t sums) {
        py::gil_scoped_release release;
        pixnerd::pixel_decoder_backward(
            decoder, {.out = planes(grad),
                      .image = mutable_planes(d_image),
                      .generated = {mutable_address(d_generated[0]), d_generated[1], d_generated[2]},
                      .sums = reinterpret_cast<double*>(sums)});
      },
      py::arg("decoder"), py::arg("grad"), py::arg("d_image"), py::arg("d_generated"), py::arg("sums"));
}

// The ops of the transformer's blocks.
void define_transformer_ops(py::module_& m) {
  using pixnerd::GatedResidual, pixnerd::ModulatedNorm, pixnerd::QkNormRope, pixnerd::Swiglu;
  py::class_<ModulatedNorm>(m, "ModulatedNorm", "Sizes and addresses of one call.")
      .def(py::init([](const std::array<std::int64_t, 3>& sizes, int dtype, double eps, int threads, const Strided& x,
                       const Strided& y, const Strided& gate, const Strided& shift, const Strided& scale,
                       std::int64_t weight) {
             return ModulatedNorm{sizes[0],    sizes[1],     sizes[2],     static_cast<DType>(dtype),
                                  eps,         threads,      input(x),     input(y),
                                  input(gate), input(shift), input(scale), address(weight)};
           }),
           py::kw_only(), py::arg("sizes"), py::arg("dtype"), py::arg("eps"), py::arg("threads"), py::arg("x"),
           py::arg("y"), py::arg("gate"), py::arg("shift"), py::arg("scale"), py::arg("weight"));
  m.def(
      "modulated_rms_norm_forward",
      [](const ModulatedNorm& norm, const Strided& z, const Strided& out) {
        py::gil_scoped_release release;
        pixnerd::modulated_rms_norm_forward(norm, output(z), output(out));
      },
      py::arg("norm"), py::arg("z"), py::arg("out"));
  m.def(
      "modulated_rms_norm_backward",
      [](const ModulatedNorm& norm, const Strided& grad, const Strided& grad_z, const Strided& dx, const Strided& dy,
         const Strided& d_gate, const Strided& d_shift, const Strided& d_scale, std::int64_t d_weight) {
        py::gil_scoped_release release;
        pixnerd::modulated_rms_norm_backward(
            norm, {input(grad), input(grad_z), output(dx), output(dy), output(d_gate), output(d_shift),
                   output(d_scale), mutable_address(d_weight)});
      },
      py::arg("norm"), py::arg("grad"), py::arg("grad_z"), py::arg("dx"), py::arg("dy"), py::arg("d_gate"),
      py::arg("d_shift"), py::arg("d_scale"), py::arg("d_weight"));

  m.def(
      "modulated_rms_norm_jvp",
      [](const ModulatedNorm& norm, const Strided& x, const Strided& y, const Strided& gate, const Strided& shift,
         const Strided& scale, const Strided& z, const Strided& z_tangent, const Strided& out,
         const Strided& out_tangent) {
        py::gil_scoped_release release;
        pixnerd::modulated_rms_norm_jvp(norm, {input(x), input(y), input(gate), input(shift), input(scale), output(z),
                                               output(z_tangent), output(out), output(out_tangent)});
      },
      py::arg("norm"), py::kw_only(), py::arg("x"), py::arg("y"), py::arg("gate"), py::arg("shift"), py::arg("scale"),
      py::arg("z"), py::arg("z_tangent"), py::arg("out"), py::arg("out_tangent"));

  py::class_<GatedResidual>(m, "GatedResidual", "Sizes and addresses of one call.")
      .def(py::init([](const std::array<std::int64_t, 3>& sizes, int dtype, int threads, const Strided& y,
                       const Strided& gate) {
             return GatedResidual{sizes[0], sizes[1], sizes[2],   static_cast<DType>(dtype),
                                  threads,  input(y), input(gate)};
           }),
           py::kw_only(), py::arg("sizes"), py::arg("dtype"), py::arg("threads"), py::arg("y"), py::arg("gate"));
  m.def(
      "gated_residual_forward",
      [](const GatedResidual& g, const Strided& x, const Strided& out) {
        py::gil_scoped_release release;
        pixnerd::gated_residual_forward(g, input(x), output(out));
      },
      py::arg("residual"), py::arg("x"), py::arg("out"));
  m.def(
      "gated_residual_backward",
      [](const GatedResidual& g, const Strided& grad, const Strided& dy, const Strided& d_gate) {
        py::gil_scoped_release release;
        pixnerd::gated_residual_backward(g, input(grad), output(dy), output(d_gate));
      },
      py::arg("residual"), py::arg("grad"), py::arg("dy"), py::arg("d_gate"));

  m.def(
      "gated_residual_jvp",
      [](const GatedResidual& g, const Strided& x, const Strided& x_tangent, const Strided& y_tangent,
         const Strided& gate_tangent, const Strided& out, const Strided& out_tangent) {
        py::gil_scoped_release release;
        pixnerd::gated_residual_jvp(
            g, input(x), {input(x_tangent), input(y_tangent), input(gate_tangent), output(out), output(out_tangent)});
      },
      py::arg("residual"), py::kw_only(), py::arg("x"), py::arg("x_tangent"), py::arg("y_tangent"),
      py::arg("gate_tangent"), py::arg("out"), py::arg("out_tangent"));

  py::class_<QkNormRope>(m, "QkNormRope", "Sizes and addresses of one call.")
      .def(
          py::init([](const std::array<std::int64_t, 5>& sizes, int dtype, double eps, int threads,
                      const StridedHeads& q, const StridedHeads& k, const StridedHeads& v, const StridedHeads& text_k,
                      const StridedHeads& text_v, std::int64_t q_weight, std::int64_t k_weight, std::int64_t rope) {
            return QkNormRope{sizes[0],      sizes[1],          sizes[2],
                              sizes[3],      sizes[4],          static_cast<DType>(dtype),
                              eps,           threads,           input(q),
                              input(k),      input(v),          input(text_k),
                              input(text_v), address(q_weight), address(k_weight),
                              address(rope)};
          }),
          py::kw_only(), py::arg("sizes"), py::arg("dtype"), py::arg("eps"), py::arg("threads"), py::arg("q"),
          py::arg("k"), py::arg("v"), py::arg("text_k"), py::arg("text_v"), py::arg("q_weight"), py::arg("k_weight"),
          py::arg("rope"));
  m.def(
      "qk_norm_rope_forward",
      [](const QkNormRope& a, const StridedHeads& q, const StridedHeads& k, const StridedHeads& v) {
        py::gil_scoped_release release;
        pixnerd::qk_norm_rope_forward(a, output(q), output(k), output(v));
      },
      py::arg("call"), py::arg("q"), py::arg("k"), py::arg("v"));
  m.def(
      "qk_norm_rope_backward",
      [](const QkNormRope& a, const StridedHeads& q, const StridedHeads& k, const StridedHeads& v,
         const StridedHeads& d_q, const StridedHeads& d_k, const StridedHeads& d_v, const StridedHeads& d_text_k,
         const StridedHeads& d_text_v, std::int64_t d_q_weight, std::int64_t d_k_weight) {
        py::gil_scoped_release release;
        pixnerd::qk_norm_rope_backward(
            a, {input(q), input(k), input(v), output(d_q), output(d_k), output(d_v), output(d_text_k),
                output(d_text_v), mutable_address(d_q_weight), mutable_address(d_k_weight)});
      },
      py::arg("call"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("d_q"), py::arg("d_k"), py::arg("d_v"),
      py::arg("d_text_k"), py::arg("d_text_v"), py::arg("d_q_weight"), py::arg("d_k_weight"));

  m.def(
      "qk_norm_rope_jvp",
      [](const QkNormRope& a, const std::array<StridedHeads, 5>& tangents, const std::array<StridedHeads, 3>& values,
         const std::array<StridedHeads, 3>& their_tangents) {
        const auto& [q, k, v, text_k, text_v] = tangents;
        const auto& [d_q, d_k, d_v] = their_tangents;
        py::gil_scoped_release release;
        pixnerd::qk_norm_rope_jvp(
            a, {input(q), input(k), input(v), input(text_k), input(text_v), output(d_q), output(d_k), output(d_v)},
            output(values[0]), output(values[1]), output(values[2]));
      },
      py::arg("call"), py::arg("tangents"), py::arg("values"), py::arg("their_tangents"),
      "tangents: of q, k, v, text_k and text_v; values: q, k and v.");

  py::class_<Swiglu>(m, "Swiglu", "Sizes and addresses of one call.")
      .def(py::init([](std::int64_t rows, std::int64_t columns, int dtype, int threads, const Strided& gate,
                       const Strided& up) {
             return Swiglu{rows, columns, static_cast<DType>(dtype), threads, input(gate), input(up)};
           }),
           py::kw_only(), py::arg("rows"), py::arg("columns"), py::arg("dtype"), py::arg("threads"), py::arg("gate"),
           py::arg("up"));
  m.def(
      "swiglu_forward",
      [](const Swiglu& s, const Strided& out) {
        py::gil_scoped_release release;
        pixnerd::swiglu_forward(s, output(out));
      },
      py::arg("call"), py::arg("out"));
  m.def(
      "swiglu_jvp",
      [](const Swiglu& s, const Strided& gate_tangent, const Strided& up_tangent, const Strided& out,
         const Strided& out_tangent) {
        py::gil_scoped_release release;
        pixnerd::swiglu_jvp(s, {input(gate_tangent), input(up_tangent), output(out), output(out_tangent)});
      },
      py::arg("call"), py::arg("gate_tangent"), py::arg("up_tangent"), py::arg("out"), py::arg("out_tangent"));
  m.def(
      "swiglu_backward",
      [](const Swiglu& s, const Strided& grad, const Strided& d_gate, const Strided& d_up) {
        py::gil_scoped_release release;
        pixnerd::swiglu_backward(s, input(grad), output(d_gate), output(d_up));
      },
      py::arg("call"), py::arg("grad"), py::arg("d_gate"), py::arg("d_up"));
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "The compiled CPU core of pixnerd_kernels.";
  m.def("isa", &pixnerd::current_isa, "The instruction set in use.");
  m.def("isas", &pixnerd::supported_isas, "The instruction sets that this processor runs, slowest first.");
  m.def("set_isa", &pixnerd::set_isa, py::arg("name"), "Use this instruction set; 'auto' is the fastest.");
  m.def(
      "advise_huge_pages",
      [](std::int64_t block, std::int64_t bytes) {
        pixnerd::advise_huge_pages(mutable_address(block), static_cast<std::size_t>(bytes));
      },
      py::arg("address"), py::arg("bytes"), "Ask for huge pages under a large new block.");
  m.def("multiply_adds", &pixnerd::multiply_adds, py::arg("steps"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>(),
        "Multiply-adds on registers alone, the processor's limit: the floating-point operations done.");
  m.def("openmp_runtime", &pixnerd::openmp_runtime, "Path of the OpenMP runtime in use, or an empty string.");

  py::class_<pixnerd::NeuralField>(m, "NeuralField", "Sizes, options and addresses of one call.")
      .def(py::init(&field), py::kw_only(), py::arg("patches"), py::arg("pixels"), py::arg("channels"),
           py::arg("hidden"), py::arg("dtype"), py::arg("weight_dtype"), py::arg("activation"), py::arg("residual"),
           py::arg("normalize"), py::arg("norm_eps"), py::arg("weight_eps"), py::arg("threads"), py::arg("x"),
           py::arg("w1"), py::arg("w2"), py::arg("w_gate"), py::arg("norm_weight"));
  m.def(
      "neural_field_mlp_forward",
      [](const pixnerd::NeuralField& field, const Strided& y) {
        py::gil_scoped_release release;
        pixnerd::neural_field_mlp_forward(field, output(y));
      },
      py::arg("field"), py::arg("y"));
  m.def(
      "neural_field_mlp_backward",
      [](const pixnerd::NeuralField& field, const Strided& grad, const Strided& dx, const Strided& d_w1,
         const Strided& d_w2, const Strided& d_w_gate, std::int64_t d_norm_weight) {
        py::gil_scoped_release release;
        pixnerd::neural_field_mlp_backward(field, {.y = input(grad),
                                                   .x = output(dx),
                                                   .w1 = output(d_w1),
                                                   .w2 = output(d_w2),
                                                   .w_gate = output(d_w_gate),
                                                   .norm_weight = mutable_address(d_norm_weight)});
      },
      py::arg("field"), py::arg("grad"), py::arg("dx"), py::arg("d_w1"), py::arg("d_w2"), py::arg("d_w_gate"),
      py::arg("d_norm_weight"));
  m.def(
      "neural_field_mlp_jvp",
      [](const pixnerd::NeuralField& field, const Strided& x, const Strided& w1, const Strided& w2,
         const Strided& w_gate, const Strided& y, const Strided& y_tangent) {
        py::gil_scoped_release release;
        pixnerd::neural_field_mlp_jvp(field, {.x = input(x),
                                              .w1 = input(w1),
                                              .w2 = input(w2),
                                              .w_gate = input(w_gate),
                                              .y = output(y),
                                              .y_tangent = output(y_tangent)});
      },
      py::arg("field"), py::arg("x"), py::arg("w1"), py::arg("w2"), py::arg("w_gate"), py::arg("y"),
      py::arg("y_tangent"));
  m.def(
      "normalize_weights",
      [](std::int64_t outer, std::int64_t rows, std::int64_t columns, int dtype, double eps, int threads,
         std::int64_t w, std::int64_t grad, std::int64_t out) {
        const pixnerd::ColumnNorm norm{outer, rows, columns, static_cast<DType>(dtype), eps, threads, address(w)};
        py::gil_scoped_release release;
        if (grad) {
          pixnerd::normalize_weights_backward(norm, address(grad), mutable_address(out));
        } else {
          pixnerd::normalize_weights_forward(norm, mutable_address(out));
        }
      },
      py::arg("outer"), py::arg("rows"), py::arg("columns"), py::arg("dtype"), py::arg("eps"), py::arg("threads"),
      py::arg("w"), py::arg("grad"), py::arg("out"), "Forward where grad is 0, else backward.");
  m.def(
      "coordinate_encoding",
      [](int height, int width, int max_freqs, int kind, double scale_x, double scale_y, std::int64_t out) {
        py::gil_scoped_release release;
        pixnerd::coordinate_encoding(height, width, max_freqs, static_cast<pixnerd::Encoding>(kind), scale_x, scale_y,
                                     reinterpret_cast<double*>(out));
      },
      py::arg("height"), py::arg("width"), py::arg("max_freqs"), py::arg("kind"), py::arg("scale_x"),
      py::arg("scale_y"), py::arg("out"));
  define_pixel_decoder(m);
  define_transformer_ops(m);
}
