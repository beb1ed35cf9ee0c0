// Cross-entropy for one target; cross_entropy.h holds the contract.
#ifndef FEDSPINE_CSRC_CROSS_ENTROPY_INL_H_
#define FEDSPINE_CSRC_CROSS_ENTROPY_INL_H_

#include "cross_entropy.h"
#include "elementwise-inl.h"

namespace fedspine {
namespace FEDSPINE_TARGET {
namespace {

inline float HighestOf(const float* values, Index size) {
  V highest = Broadcast(values[0]);
  const auto raise = [&](V value) { highest = highest > value ? highest : value; };
  Index i = 0;
  for (; i + kLanes <= size; i += kLanes) raise(Load(values + i));
  float result = highest[0];
  for (Index lane = 1; lane < kLanes; ++lane) {
    result = result > highest[lane] ? result : highest[lane];
  }
  for (; i < size; ++i) result = result > values[i] ? result : values[i];
  return result;
}

inline void CrossEntropyRow(const CrossEntropyArgs& args, Index token) {
  float* const row = args.logits + token * args.classes;
  const Index target = static_cast<Index>(args.targets[token]);
  const float highest = HighestOf(row, args.classes), chosen = row[target];
  ForEachVector(0, args.classes, [&](Index i, Index count) {
    StoreUpTo(Exp(LoadUpTo(row + i, count) - highest), row + i, count);
  });
  const float total =
      SumVectors(args.classes, [&](Index i, Index count) { return LoadUpTo(row + i, count); });
  const float factor = args.scale / total;
  ForEachVector(0, args.classes, [&](Index i, Index count) {
    StoreUpTo(LoadUpTo(row + i, count) * factor, row + i, count);
  });
  row[target] -= args.scale;
  args.loss[token] = highest + __builtin_logf(total) - chosen;
}

inline void CrossEntropy(const CrossEntropyArgs& args) {
  ForEachRowInParts(args.tokens, 4 * args.classes, args.num_threads,
                    [&](Index token) { CrossEntropyRow(args, token); });
}

}  // namespace
}  // namespace FEDSPINE_TARGET
}  // namespace fedspine

#endif  // FEDSPINE_CSRC_CROSS_ENTROPY_INL_H_
