// The targets the kernels are compiled for, and the choice between them.
#ifndef FEDSPINE_CSRC_ISA_H_
#define FEDSPINE_CSRC_ISA_H_

#include "attention.h"
#include "cross_entropy.h"
#include "gelu.h"
#include "importance.h"
#include "layer_norm.h"
#include "lora_linear.h"
#include "rms_norm.h"
#include "swiglu.h"

namespace fedspine {

// What each target's translation unit exports. The scratch functions return floats.
struct KernelTable {
  const char* name;
  Index (*lora_linear_forward_scratch)(const LinearShape& shape, int num_threads);
  void (*lora_linear_forward)(const LoraLinearForwardArgs& args, float* scratch);
  Index (*lora_linear_backward_scratch)(const LinearShape& shape, int num_threads);
  void (*lora_linear_backward)(const LoraLinearBackwardArgs& args, float* scratch);
  Index (*importance_scratch)(const LinearShape& shape);
  void (*importance)(const ImportanceArgs& args, float* scratch);
  void (*rms_norm_forward)(const RmsNormForwardArgs& args);
  void (*rms_norm_backward)(const RmsNormBackwardArgs& args);
  void (*layer_norm_forward)(const LayerNormForwardArgs& args);
  void (*layer_norm_again)(const LayerNormAgainArgs& args);
  void (*layer_norm_backward)(const LayerNormBackwardArgs& args);
  void (*swiglu_forward)(const SwigluForwardArgs& args);
  void (*swiglu_again)(const SwigluAgainArgs& args);
  void (*swiglu_backward)(const SwigluBackwardArgs& args);
  void (*gelu_forward)(const GeluForwardArgs& args);
  void (*gelu_again)(const GeluAgainArgs& args);
  void (*gelu_backward)(const GeluBackwardArgs& args);
  Index (*attention_forward_scratch)(const AttentionShape& shape, int num_threads);
  void (*attention_forward)(const AttentionForwardArgs& args, float* scratch);
  Index (*attention_backward_scratch)(const AttentionShape& shape, int num_threads);
  void (*attention_backward)(const AttentionBackwardArgs& args, float* scratch);
  void (*cross_entropy)(const CrossEntropyArgs& args);
};

// Targets this CPU runs, best first; ends with a null.
const KernelTable* const* AvailableKernels();

// The target in use: the best, until UseKernels.
const KernelTable& Kernels();

// Forces a target, for tests; false when this CPU has none of that name.
bool UseKernels(const char* name);

}  // namespace fedspine

#endif  // FEDSPINE_CSRC_ISA_H_
