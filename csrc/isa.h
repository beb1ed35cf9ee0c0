// The targets the kernels are compiled for, and the choice between them.
#ifndef FEDSPINE_CSRC_ISA_H_
#define FEDSPINE_CSRC_ISA_H_

#include "importance.h"
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
  void (*swiglu_forward)(const SwigluForwardArgs& args);
  void (*swiglu_backward)(const SwigluBackwardArgs& args);
};

// Targets this CPU runs, best first; ends with a null.
const KernelTable* const* AvailableKernels();

// The target in use: the best, until UseKernels.
const KernelTable& Kernels();

// Forces a target, for tests; false when this CPU has none of that name.
bool UseKernels(const char* name);

}  // namespace fedspine

#endif  // FEDSPINE_CSRC_ISA_H_
