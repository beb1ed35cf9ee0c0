// Rows of a packed weight as the register tiles read them: float32, widened where they are not.
//
// Nothing but whole panel rows of 32 is ever read, so there are no tails.
#ifndef FEDSPINE_CSRC_PACKED_WEIGHT_INL_H_
#define FEDSPINE_CSRC_PACKED_WEIGHT_INL_H_

#include <cstdint>

#include "bfloat16-inl.h"
#include "packed_weight.h"

namespace fedspine {
namespace FEDSPINE_TARGET {
namespace {

// A vector of codes; gcc's own conversion goes byte by byte where there is no intrinsic.
FEDSPINE_INLINE V LoadCodes(const std::int8_t* from) {
#if FEDSPINE_LANES == 16
  const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  const Bits whole = reinterpret_cast<Bits>(_mm512_maskz_cvtepi8_epi32(kAllLanes, codes));
#elif FEDSPINE_LANES == 8
  const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  const Bits whole = reinterpret_cast<Bits>(_mm256_cvtepi8_epi32(codes));
#else
  typedef std::int8_t Codes __attribute__((vector_size(FEDSPINE_LANES), aligned(1), may_alias));
  const Bits whole = __builtin_convertvector(*reinterpret_cast<const Codes*>(from), Bits);
#endif
  return __builtin_convertvector(whole, V);
}

inline void WidenBfloat16(const Bfloat16* from, Index rows, float* out) {
  for (Index i = 0; i < rows * kPanelWidth; i += kLanes) Store(LoadKept(from + i, kLanes), out + i);
}

inline void WidenInt8(const std::int8_t* from, const float* scales, Index rows, float* out) {
  V scale[kPanelWidth / kLanes];
  for (Index v = 0; v < kPanelWidth / kLanes; ++v) scale[v] = Load(scales + v * kLanes);
  for (Index row = 0; row < rows; ++row, from += kPanelWidth, out += kPanelWidth) {
    FEDSPINE_UNROLL(8)
    for (Index v = 0; v < kPanelWidth / kLanes; ++v) {
      Store(LoadCodes(from + v * kLanes) * scale[v], out + v * kLanes);
    }
  }
}

// Where inputs [first, first + rows) of the panel of outputs [output, output + 32) stand in
// float32: in the weight itself, or widened into `hot`.
inline const float* PanelRows(const PackedWeight& weight, Index in_features, Index output,
                              Index first, Index rows, float* hot) {
  const Index offset = output * in_features + first * kPanelWidth;
  switch (weight.format) {
    case WeightFormat::kFloat32:
      return static_cast<const float*>(weight.panels) + offset;
    case WeightFormat::kBfloat16:
      WidenBfloat16(static_cast<const Bfloat16*>(weight.panels) + offset, rows, hot);
      break;
    case WeightFormat::kInt8:
      WidenInt8(static_cast<const std::int8_t*>(weight.panels) + offset, weight.scales + output,
                rows, hot);
      break;
  }
  return hot;
}

// Inputs `rows` of the outputs `depth` as a left factor: consecutive panels of those rows.
struct LeftPanels {
  const float* data;
  Index stride;  // Floats from a panel to the next.
};

inline LeftPanels PanelsOfRows(const PackedWeight& weight, Index in_features, Range depth,
                               Range rows, float* hot) {
  if (weight.format == WeightFormat::kFloat32) {
    return {PanelRows(weight, in_features, depth.begin, rows.begin, 0, nullptr),
            in_features * kPanelWidth};
  }
  const Index num_rows = rows.end - rows.begin;
  const Index stride = num_rows * kPanelWidth;
  float* out = hot;
  for (Index output = depth.begin; output < depth.end; output += kPanelWidth, out += stride) {
    PanelRows(weight, in_features, output, rows.begin, num_rows, out);
  }
  return {hot, stride};
}

}  // namespace
}  // namespace FEDSPINE_TARGET
}  // namespace fedspine

#endif  // FEDSPINE_CSRC_PACKED_WEIGHT_INL_H_
