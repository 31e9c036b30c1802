// The choice of instruction set: kernels are compiled once for each, one is picked at run time.
#pragma once

#include <string>
#include <vector>

#include "gated_residual.h"
#include "matmul.h"
#include "modulated_rms_norm.h"
#include "neural_field_mlp.h"
#include "normalize_weights.h"
#include "peak.h"
#include "pixel_decoder.h"
#include "qk_norm_rope.h"
#include "swiglu.h"

namespace pixnerd {

// Instruction sets that this build has and this processor runs, slowest first.
std::vector<std::string> supported_isas();

// The one in use. The first use takes the environment variable PIXNERD_ISA, or the fastest.
std::string current_isa();

// Use this one from now on; "auto" is the fastest. Throws std::invalid_argument where it is not supported.
void set_isa(const std::string& name);

// The entry points that every instruction set defines in its namespace.
struct Kernels {
  void (*neural_field_mlp_forward)(const NeuralField&, MutableMatrices);
  void (*neural_field_mlp_backward)(const NeuralField&, const NeuralFieldGradients&);
  void (*neural_field_mlp_jvp)(const NeuralField&, const NeuralFieldTangents&);
  void (*normalize_weights_forward)(const ColumnNorm&, void*);
  void (*normalize_weights_backward)(const ColumnNorm&, const void*, void*);
  void (*matmul)(const Product&);
  std::int64_t (*pixel_decoder_sums)(const PixelDecoder&);
  void (*pixel_decoder_forward)(const PixelDecoder&, const MutablePlanes&);
  void (*pixel_decoder_backward)(const PixelDecoder&, const PixelDecoderGradients&);
  void (*modulated_rms_norm_forward)(const ModulatedNorm&, MutableMatrices, MutableMatrices);
  void (*modulated_rms_norm_backward)(const ModulatedNorm&, const ModulatedNormGradients&);
  void (*modulated_rms_norm_jvp)(const ModulatedNorm&, const ModulatedNormTangents&);
  void (*gated_residual_forward)(const GatedResidual&, Matrices, MutableMatrices);
  void (*gated_residual_backward)(const GatedResidual&, Matrices, MutableMatrices, MutableMatrices);
  void (*gated_residual_jvp)(const GatedResidual&, Matrices, const GatedResidualTangents&);
  void (*qk_norm_rope_forward)(const QkNormRope&, MutableHeads, MutableHeads, MutableHeads);
  void (*qk_norm_rope_backward)(const QkNormRope&, const QkNormRopeGradients&);
  void (*qk_norm_rope_jvp)(const QkNormRope&, const QkNormRopeTangents&, MutableHeads, MutableHeads, MutableHeads);
  void (*swiglu_forward)(const Swiglu&, MutableMatrices);
  void (*swiglu_backward)(const Swiglu&, Matrices, MutableMatrices, MutableMatrices);
  void (*swiglu_jvp)(const Swiglu&, const SwigluTangents&);
  std::int64_t (*multiply_adds)(std::int64_t, int);
};
const Kernels& kernels();

}  // namespace pixnerd
