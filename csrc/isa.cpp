#include "isa.h"

#include <cstdlib>
#include <stdexcept>

namespace pixnerd {

#define PIXNERD_DECLARE(isa)                                                       \
  namespace isa {                                                                  \
  void neural_field_mlp_forward(const NeuralField&, MutableMatrices);              \
  void neural_field_mlp_backward(const NeuralField&, const NeuralFieldGradients&); \
  void normalize_weights_forward(const ColumnNorm&, void*);                        \
  void normalize_weights_backward(const ColumnNorm&, const void*, void*);          \
  }
PIXNERD_DECLARE(portable)
#if PIXNERD_HAS_AVX2
PIXNERD_DECLARE(avx2)
PIXNERD_DECLARE(avx512)
#endif
#undef PIXNERD_DECLARE

namespace {

struct Isa {
  const char* name;
  bool supported;
  Kernels kernels;
};

#define PIXNERD_KERNELS(isa)                                                                      \
  {isa::neural_field_mlp_forward, isa::neural_field_mlp_backward, isa::normalize_weights_forward, \
   isa::normalize_weights_backward}

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
void normalize_weights_forward(const ColumnNorm& norm, void* out) { kernels().normalize_weights_forward(norm, out); }
void normalize_weights_backward(const ColumnNorm& norm, const void* grad, void* out) {
  kernels().normalize_weights_backward(norm, grad, out);
}

}  // namespace pixnerd
