// Root mean square normalisation for one target; rms_norm.h holds the contract.
#ifndef FEDSPINE_CSRC_RMS_NORM_INL_H_
#define FEDSPINE_CSRC_RMS_NORM_INL_H_

#include "elementwise-inl.h"
#include "rms_norm.h"

namespace fedspine {
namespace FEDSPINE_TARGET {
namespace {

inline void NormaliseRow(const RmsNormForwardArgs& args, Index token) {
  const float* const x = args.x + token * args.features;
  float* const y = args.y + token * args.features;
  const float sum = SumVectors(args.features, [&](Index i, Index count) {
    const V value = LoadUpTo(x + i, count);
    return value * value;
  });
  const float mean = sum / static_cast<float>(args.features);
  const float rstd = 1.0f / __builtin_sqrtf(mean + args.epsilon);
  if (args.rstd != nullptr) args.rstd[token] = rstd;
  ForEachVector(0, args.features, [&](Index i, Index count) {
    StoreUpTo(LoadUpTo(x + i, count) * rstd * LoadUpTo(args.weight + i, count), y + i, count);
  });
}

inline void RmsNormForward(const RmsNormForwardArgs& args) {
  ForEachRowInParts(args.tokens, args.features, args.num_threads,
                    [&](Index token) { NormaliseRow(args, token); });
}

inline void NormaliseRowBackward(const RmsNormBackwardArgs& args, Index token) {
  const Index row = token * args.features;
  const float* const x = args.x + row;
  const float* const dy = args.dy + row;
  float* const dx = args.dx + row;
  const float rstd = args.rstd[token];
  const float sum = SumVectors(args.features, [&](Index i, Index count) {
    return LoadUpTo(args.weight + i, count) * LoadUpTo(dy + i, count) * LoadUpTo(x + i, count);
  });
  // In this order no factor leaves the range of float32 before the result does.
  const float along_x = sum * rstd / static_cast<float>(args.features) * rstd;
  ForEachVector(0, args.features, [&](Index i, Index count) {
    const V scaled = LoadUpTo(args.weight + i, count) * LoadUpTo(dy + i, count);
    StoreUpTo((scaled - LoadUpTo(x + i, count) * along_x) * rstd, dx + i, count);
  });
}

inline void RmsNormBackward(const RmsNormBackwardArgs& args) {
  ForEachRowInParts(args.tokens, args.features, args.num_threads,
                    [&](Index token) { NormaliseRowBackward(args, token); });
}

}  // namespace
}  // namespace FEDSPINE_TARGET
}  // namespace fedspine

#endif  // FEDSPINE_CSRC_RMS_NORM_INL_H_
