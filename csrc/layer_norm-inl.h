// Layer normalisation for one target; layer_norm.h holds the contract.
#ifndef FEDSPINE_CSRC_LAYER_NORM_INL_H_
#define FEDSPINE_CSRC_LAYER_NORM_INL_H_

#include "bfloat16-inl.h"
#include "elementwise-inl.h"
#include "layer_norm.h"

namespace fedspine {
namespace FEDSPINE_TARGET {
namespace {

inline void CentreAndScaleRow(const LayerNormForwardArgs& args, Index token) {
  const Index row = token * args.features;
  const float count_all = static_cast<float>(args.features);
  float* const y = args.y + row;
  const float sum = SumVectors(args.features, [&](Index i, Index count) {
    V z = LoadUpTo(args.x + row + i, count);
    if (args.residual != nullptr) z += LoadUpTo(args.residual + row + i, count);
    StoreUpTo(z, y + i, count);
    return z;
  });
  const float mean = sum / count_all;
  ForEachVector(0, args.features, [&](Index i, Index count) {
    StoreUpTo(LoadUpTo(y + i, count) - mean, y + i, count);
  });
  const float squares = SumVectors(args.features, [&](Index i, Index count) {
    const V centred = LoadUpTo(y + i, count);
    return centred * centred;
  });
  const float rstd = 1.0f / __builtin_sqrtf(squares / count_all + args.epsilon);
  if (args.rstd != nullptr) args.rstd[token] = rstd;
  ForEachVector(0, args.features, [&](Index i, Index count) {
    const V normalised = LoadUpTo(y + i, count) * rstd;
    StoreUpTo(normalised * LoadUpTo(args.weight + i, count) + LoadUpTo(args.bias + i, count), y + i,
              count);
    if (args.kept != nullptr) StoreKept(normalised, args.kept + row + i, count);
  });
}

inline void LayerNormForward(const LayerNormForwardArgs& args) {
  ForEachRowInParts(args.tokens, args.features, args.num_threads,
                    [&](Index token) { CentreAndScaleRow(args, token); });
}

inline void LayerNormAgain(const LayerNormAgainArgs& args) {
  ForEachRowInParts(args.tokens, args.features, args.num_threads, [&](Index token) {
    const Index row = token * args.features;
    ForEachVector(0, args.features, [&](Index i, Index count) {
      StoreUpTo(LoadKept(args.normalised + row + i, count) * LoadUpTo(args.weight + i, count) +
                    LoadUpTo(args.bias + i, count),
                args.y + row + i, count);
    });
  });
}

inline void LayerNormBackward(const LayerNormBackwardArgs& args) {
  const float count_all = static_cast<float>(args.features);
  ForEachRowInParts(args.tokens, args.features, args.num_threads, [&](Index token) {
    const Index row = token * args.features;
    const float* const dy = args.dy + row;
    const Bfloat16* const normalised = args.normalised + row;
    const float mean =
        SumVectors(args.features,
                   [&](Index i, Index count) {
                     return LoadUpTo(args.weight + i, count) * LoadUpTo(dy + i, count);
                   }) /
        count_all;
    const float along = SumVectors(args.features,
                                   [&](Index i, Index count) {
                                     return LoadUpTo(args.weight + i, count) *
                                            LoadUpTo(dy + i, count) *
                                            LoadKept(normalised + i, count);
                                   }) /
                        count_all;
    const float rstd = args.rstd[token];
    ForEachVector(0, args.features, [&](Index i, Index count) {
      const V scaled = LoadUpTo(args.weight + i, count) * LoadUpTo(dy + i, count);
      StoreUpTo((scaled - mean - LoadKept(normalised + i, count) * along) * rstd, args.dz + row + i,
                count);
    });
  });
}

}  // namespace
}  // namespace FEDSPINE_TARGET
}  // namespace fedspine

#endif  // FEDSPINE_CSRC_LAYER_NORM_INL_H_
