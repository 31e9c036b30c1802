#include "isa.h"

#include <cstdlib>
#include <stdexcept>

namespace pixnerd {

#define PIXNERD_DECLARE(isa)                                                                                     \
  namespace isa {                                                                                                \
  void neural_field_mlp_forward(const NeuralField&, MutableMatrices);                                            \
  void neural_field_mlp_backward(const NeuralField&, const NeuralFieldGradients&);                               \
  void neural_field_mlp_jvp(const NeuralField&, const NeuralFieldTangents&);                                     \
  void normalize_weights_forward(const ColumnNorm&, void*);                                                      \
  void normalize_weights_backward(const ColumnNorm&, const void*, void*);                                        \
  void matmul(const Product&);                                                                                   \
  std::int64_t pixel_decoder_sums(const PixelDecoder&);                                                          \
  void pixel_decoder_forward(const PixelDecoder&, const MutablePlanes&);                                         \
  void pixel_decoder_backward(const PixelDecoder&, const PixelDecoderGradients&);                                \
  void modulated_rms_norm_forward(const ModulatedNorm&, MutableMatrices, MutableMatrices);                       \
  void modulated_rms_norm_backward(const ModulatedNorm&, const ModulatedNormGradients&);                         \
  void modulated_rms_norm_jvp(const ModulatedNorm&, const ModulatedNormTangents&);                               \
  void gated_residual_forward(const GatedResidual&, Matrices, MutableMatrices);                                  \
  void gated_residual_backward(const GatedResidual&, Matrices, MutableMatrices, MutableMatrices);                \
  void gated_residual_jvp(const GatedResidual&, Matrices, const GatedResidualTangents&);                         \
  void qk_norm_rope_forward(const QkNormRope&, MutableHeads, MutableHeads, MutableHeads);                        \
  void qk_norm_rope_backward(const QkNormRope&, const QkNormRopeGradients&);                                     \
  void qk_norm_rope_jvp(const QkNormRope&, const QkNormRopeTangents&, MutableHeads, MutableHeads, MutableHeads); \
  void swiglu_forward(const Swiglu&, MutableMatrices);                                                           \
  void swiglu_backward(const Swiglu&, Matrices, MutableMatrices, MutableMatrices);                               \
  void swiglu_jvp(const Swiglu&, const SwigluTangents&);                                                         \
  std::int64_t multiply_adds(std::int64_t, int);                                                                 \
  }
PIXNERD_DECLARE(portable)
#if PIXNERD_HAS_AVX2
PIXNERD_DECLARE(avx2)
PIXNERD_DECLARE(avx512)
#endif
#if PIXNERD_HAS_AVX512_BF16
// Other kernels are those of avx512.
namespace avx512_bf16 {
void neural_field_mlp_forward(const NeuralField&, MutableMatrices);
void neural_field_mlp_backward(const NeuralField&, const NeuralFieldGradients&);
void matmul(const Product&);
void pixel_decoder_forward(const PixelDecoder&, const MutablePlanes&);
void pixel_decoder_backward(const PixelDecoder&, const PixelDecoderGradients&);
}  // namespace avx512_bf16
#endif
#undef PIXNERD_DECLARE

namespace {

struct Isa {
  const char* name;
  bool supported;
  Kernels kernels;
};

#define PIXNERD_KERNELS(isa)         \
  {isa::neural_field_mlp_forward,    \
   isa::neural_field_mlp_backward,   \
   isa::neural_field_mlp_jvp,        \
   isa::normalize_weights_forward,   \
   isa::normalize_weights_backward,  \
   isa::matmul,                      \
   isa::pixel_decoder_sums,          \
   isa::pixel_decoder_forward,       \
   isa::pixel_decoder_backward,      \
   isa::modulated_rms_norm_forward,  \
   isa::modulated_rms_norm_backward, \
   isa::modulated_rms_norm_jvp,      \
   isa::gated_residual_forward,      \
   isa::gated_residual_backward,     \
   isa::gated_residual_jvp,          \
   isa::qk_norm_rope_forward,        \
   isa::qk_norm_rope_backward,       \
   isa::qk_norm_rope_jvp,            \
   isa::swiglu_forward,              \
   isa::swiglu_backward,             \
   isa::swiglu_jvp,                  \
   isa::multiply_adds}

const std::vector<Isa>& isas() {
  static const std::vector<Isa> all = [] {
    std::vector<Isa> list{{"portable", true, PIXNERD_KERNELS(portable)}};
#if PIXNERD_HAS_AVX2
    __builtin_cpu_init();
    // Every processor with AVX2 has F16C, which older compilers cannot ask for.
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    list.push_back({"avx2", has_avx2, PIXNERD_KERNELS(avx2)});
    list.push_back({"avx512", has_avx512, PIXNERD_KERNELS(avx512)});
#endif
#if PIXNERD_HAS_AVX512_BF16
    Isa with_bf16{"avx512_bf16", has_avx512 && __builtin_cpu_supports("avx512bf16"), PIXNERD_KERNELS(avx512)};
    with_bf16.kernels.neural_field_mlp_forward = avx512_bf16::neural_field_mlp_forward;
    with_bf16.kernels.neural_field_mlp_backward = avx512_bf16::neural_field_mlp_backward;
    with_bf16.kernels.matmul = avx512_bf16::matmul;
    with_bf16.kernels.pixel_decoder_forward = avx512_bf16::pixel_decoder_forward;
    with_bf16.kernels.pixel_decoder_backward = avx512_bf16::pixel_decoder_backward;
    list.push_back(with_bf16);
#endif
    return list;
  }();
  return all;
}

const Isa* find(const std::string& name) {
  const Isa* found = nullptr;
  for (const Isa& isa : isas()) {
    if (isa.supported && (name == isa.name || name == "auto")) found = &isa;
  }
  if (!found) {
    std::string known = "auto";
    for (const auto& isa : supported_isas()) known += ", " + isa;
    throw std::invalid_argument("instruction set '" + name + "' is not supported here, expected one of " + known);
  }
  return found;
}

const Isa*& current() {
  static const Isa* isa = [] {
    const char* wanted = std::getenv("PIXNERD_ISA");
    try {
      return find(wanted && *wanted ? wanted : "auto");
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument(std::string("PIXNERD_ISA: ") + error.what());
    }
  }();
  return isa;
}

}  // namespace

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas()) {
    if (isa.supported) names.emplace_back(isa.name);
  }
  return names;
}

std::string current_isa() { return current()->name; }
void set_isa(const std::string& name) { current() = find(name); }
const Kernels& kernels() { return current()->kernels; }

void neural_field_mlp_forward(const NeuralField& field, MutableMatrices y) {
  kernels().neural_field_mlp_forward(field, y);
}
void neural_field_mlp_backward(const NeuralField& field, const NeuralFieldGradients& gradients) {
  kernels().neural_field_mlp_backward(field, gradients);
}
void neural_field_mlp_jvp(const NeuralField& field, const NeuralFieldTangents& tangents) {
  kernels().neural_field_mlp_jvp(field, tangents);
}
void normalize_weights_forward(const ColumnNorm& norm, void* out) { kernels().normalize_weights_forward(norm, out); }
void normalize_weights_backward(const ColumnNorm& norm, const void* grad, void* out) {
  kernels().normalize_weights_backward(norm, grad, out);
}
void matmul(const Product& product) { kernels().matmul(product); }
std::int64_t pixel_decoder_sums(const PixelDecoder& decoder) { return kernels().pixel_decoder_sums(decoder); }
void pixel_decoder_forward(const PixelDecoder& decoder, const MutablePlanes& out) {
  kernels().pixel_decoder_forward(decoder, out);
}
void pixel_decoder_backward(const PixelDecoder& decoder, const PixelDecoderGradients& gradients) {
  kernels().pixel_decoder_backward(decoder, gradients);
}
void modulated_rms_norm_forward(const ModulatedNorm& norm, MutableMatrices z, MutableMatrices out) {
  kernels().modulated_rms_norm_forward(norm, z, out);
}
void modulated_rms_norm_backward(const ModulatedNorm& norm, const ModulatedNormGradients& gradients) {
  kernels().modulated_rms_norm_backward(norm, gradients);
}
void modulated_rms_norm_jvp(const ModulatedNorm& norm, const ModulatedNormTangents& tangents) {
  kernels().modulated_rms_norm_jvp(norm, tangents);
}
void gated_residual_forward(const GatedResidual& g, Matrices x, MutableMatrices out) {
  kernels().gated_residual_forward(g, x, out);
}
void gated_residual_backward(const GatedResidual& g, Matrices grad, MutableMatrices d_y, MutableMatrices d_gate) {
  kernels().gated_residual_backward(g, grad, d_y, d_gate);
}
void gated_residual_jvp(const GatedResidual& g, Matrices x, const GatedResidualTangents& tangents) {
  kernels().gated_residual_jvp(g, x, tangents);
}
void qk_norm_rope_forward(const QkNormRope& a, MutableHeads q, MutableHeads k, MutableHeads v) {
  kernels().qk_norm_rope_forward(a, q, k, v);
}
void qk_norm_rope_backward(const QkNormRope& a, const QkNormRopeGradients& d) {
  kernels().qk_norm_rope_backward(a, d);
}
void qk_norm_rope_jvp(const QkNormRope& a, const QkNormRopeTangents& t, MutableHeads q, MutableHeads k,
                      MutableHeads v) {
  kernels().qk_norm_rope_jvp(a, t, q, k, v);
}
void swiglu_forward(const Swiglu& s, MutableMatrices out) { kernels().swiglu_forward(s, out); }
void swiglu_backward(const Swiglu& s, Matrices grad, MutableMatrices d_gate, MutableMatrices d_up) {
  kernels().swiglu_backward(s, grad, d_gate, d_up);
}
void swiglu_jvp(const Swiglu& s, const SwigluTangents& tangents) { kernels().swiglu_jvp(s, tangents); }
std::int64_t multiply_adds(std::int64_t steps, int threads) { return kernels().multiply_adds(steps, threads); }

}  // namespace pixnerd
