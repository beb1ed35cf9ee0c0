// The body of every target's translation unit: its namespace, its lanes, its table.
#include "attention_backward-inl.h"
#include "attention_forward-inl.h"
#include "cross_entropy-inl.h"
#include "gelu-inl.h"
#include "importance-inl.h"
#include "isa.h"
#include "layer_norm-inl.h"
#include "lora_linear_backward-inl.h"
#include "lora_linear_forward-inl.h"
#include "rms_norm-inl.h"
#include "swiglu-inl.h"

#define FEDSPINE_STRING(text) #text
#define FEDSPINE_NAME(target) FEDSPINE_STRING(target)

namespace fedspine {
namespace FEDSPINE_TARGET {

const KernelTable& Table() {
  static constexpr KernelTable kTable = {
      FEDSPINE_NAME(FEDSPINE_TARGET),
      LoraLinearForwardScratch,
      LoraLinearForward,
      LoraLinearBackwardScratch,
      LoraLinearBackward,
      ImportanceScratchFloats,
      Importance,
      RmsNormForward,
      RmsNormBackward,
      LayerNormForward,
      LayerNormAgain,
      LayerNormBackward,
      SwigluForward,
      SwigluAgain,
      SwigluBackward,
      GeluForward,
      GeluAgain,
      GeluBackward,
      AttentionForwardScratchFloats,
      AttentionForward,
      AttentionBackwardScratchFloats,
      AttentionBackward,
      CrossEntropy,
  };
  return kTable;
}

}  // namespace FEDSPINE_TARGET
}  // namespace fedspine
