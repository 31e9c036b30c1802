// The only file that knows Python: addresses and sizes in, nothing else. The callers in pixnerd_kernels/ops
// have checked every shape.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>

#include "coordinate_encoding.h"
#include "isa.h"
#include "neural_field_mlp.h"
#include "normalize_weights.h"
#include "parallel.h"

namespace py = pybind11;

namespace {

using pixnerd::DType;

// A tensor as (address, patch stride, row stride); address 0 for an absent one.
using Strided = std::array<std::int64_t, 3>;

pixnerd::Matrices input(const Strided& t) { return {reinterpret_cast<const void*>(t[0]), t[1], t[2]}; }
pixnerd::MutableMatrices output(const Strided& t) { return {reinterpret_cast<void*>(t[0]), t[1], t[2]}; }

pixnerd::NeuralField field(std::int64_t patches, std::int64_t pixels, int channels, int hidden, int dtype,
                           int activation, bool residual, std::array<bool, 3> normalize, double norm_eps,
                           double weight_eps, int threads, const Strided& x, const Strided& w1, const Strided& w2,
                           const Strided& w_gate, std::int64_t norm_weight) {
  return {.patches = patches,
          .pixels = pixels,
          .channels = channels,
          .hidden = hidden,
          .dtype = static_cast<DType>(dtype),
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
          .norm_weight = reinterpret_cast<const void*>(norm_weight)};
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "The compiled CPU core of pixnerd_kernels.";
  m.def("isa", &pixnerd::current_isa, "The instruction set in use.");
  m.def("isas", &pixnerd::supported_isas, "The instruction sets that this processor runs, slowest first.");
  m.def("set_isa", &pixnerd::set_isa, py::arg("name"), "Use this instruction set; 'auto' is the fastest.");
  m.def("openmp_runtime", &pixnerd::openmp_runtime, "Path of the OpenMP runtime in use, or an empty string.");

  py::class_<pixnerd::NeuralField>(m, "NeuralField", "Sizes, options and addresses of one call.")
      .def(py::init(&field), py::kw_only(), py::arg("patches"), py::arg("pixels"), py::arg("channels"),
           py::arg("hidden"), py::arg("dtype"), py::arg("activation"), py::arg("residual"), py::arg("normalize"),
           py::arg("norm_eps"), py::arg("weight_eps"), py::arg("threads"), py::arg("x"), py::arg("w1"), py::arg("w2"),
           py::arg("w_gate"), py::arg("norm_weight"));
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
                                                   .norm_weight = reinterpret_cast<void*>(d_norm_weight)});
      },
      py::arg("field"), py::arg("grad"), py::arg("dx"), py::arg("d_w1"), py::arg("d_w2"), py::arg("d_w_gate"),
      py::arg("d_norm_weight"));
  m.def(
      "normalize_weights",
      [](std::int64_t outer, std::int64_t rows, std::int64_t columns, int dtype, double eps, int threads,
         std::int64_t w, std::int64_t grad, std::int64_t out) {
        const pixnerd::ColumnNorm norm{
            outer, rows, columns, static_cast<DType>(dtype), eps, threads, reinterpret_cast<const void*>(w)};
        py::gil_scoped_release release;
        if (grad) {
          pixnerd::normalize_weights_backward(norm, reinterpret_cast<const void*>(grad),
                                              reinterpret_cast<void*>(out));
        } else {
          pixnerd::normalize_weights_forward(norm, reinterpret_cast<void*>(out));
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
}
