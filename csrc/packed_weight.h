// A frozen weight in the layout of the kernels: panels of 32 outputs, in one of three formats.
//
//   panels[O / 32][I][32], zeros beyond the last output
//
// bfloat16 is float32's upper half, rounded to nearest even: exact for a model that was published
// in it. int8 is a code of -127..127 times a scale of its output: largest |w| / 127 of what is kept
// of that row, or NaN when one of them is not finite. Whatever the format, a product is that of the
// float32 numbers the panels stand for, accumulated in float32.
#ifndef FEDSPINE_CSRC_PACKED_WEIGHT_H_
#define FEDSPINE_CSRC_PACKED_WEIGHT_H_

#include "parallel.h"

namespace fedspine {

// Outputs in a panel of a packed weight; the same for every target, so a weight is packed once.
constexpr Index kPanelWidth = 32;

enum class WeightFormat { kFloat32, kBfloat16, kInt8 };

struct PackedWeight {
  const void* panels;   // float, Bfloat16 or std::int8_t.
  const float* scales;  // [O / 32][32] of int8, zeros beyond the last output; null otherwise.
  WeightFormat format;
};

}  // namespace fedspine

#endif  // FEDSPINE_CSRC_PACKED_WEIGHT_H_
