// The choice of instruction set: kernels are compiled once for each, one is picked at run time.
#pragma once

#include <string>
#include <vector>

#include "neural_field_mlp.h"
#include "normalize_weights.h"

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
  void (*normalize_weights_forward)(const ColumnNorm&, void*);
  void (*normalize_weights_backward)(const ColumnNorm&, const void*, void*);
};
const Kernels& kernels();

}  // namespace pixnerd
