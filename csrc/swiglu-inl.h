// The gate of a feed-forward block for one target; swiglu.h holds the contract.
#ifndef FEDSPINE_CSRC_SWIGLU_INL_H_
#define FEDSPINE_CSRC_SWIGLU_INL_H_

#include "elementwise-inl.h"
#include "swiglu.h"

namespace fedspine {
namespace FEDSPINE_TARGET {
namespace {

inline Index SwigluParts(Index size, int num_threads) {
  constexpr double kFlopsPerElement = 64;  // What one costs, in flops of a product.
  return UsefulParts(kFlopsPerElement * static_cast<double>(size), num_threads);
}

FEDSPINE_INLINE V Sigmoid(V value) { return 1.0f / (1.0f + Exp(-value)); }

inline void SwigluForward(const SwigluForwardArgs& args) {
  const Index parts = SwigluParts(args.size, args.num_threads);
  RunParts(parts, [&](Index part) {
    const Range range = PartRange(args.size, kLanes, part, parts);
    ForEachVector(range.begin, range.end, [&](Index i, Index count) {
      const V gate = LoadUpTo(args.gate + i, count);
      StoreUpTo(gate * Sigmoid(gate) * LoadUpTo(args.up + i, count), args.y + i, count);
    });
  });
}

inline void SwigluBackward(const SwigluBackwardArgs& args) {
  const Index parts = SwigluParts(args.size, args.num_threads);
  RunParts(parts, [&](Index part) {
    const Range range = PartRange(args.size, kLanes, part, parts);
    ForEachVector(range.begin, range.end, [&](Index i, Index count) {
      const V dy = LoadUpTo(args.dy + i, count);
      const V gate = LoadUpTo(args.gate + i, count);
      const V sigmoid = Sigmoid(gate);
      const V slope = sigmoid * (1.0f + gate * (1.0f - sigmoid));
      StoreUpTo(dy * LoadUpTo(args.up + i, count) * slope, args.dgate + i, count);
      StoreUpTo(dy * (gate * sigmoid), args.dup + i, count);
    });
  });
}

}  // namespace
}  // namespace FEDSPINE_TARGET
}  // namespace fedspine

#endif  // FEDSPINE_CSRC_SWIGLU_INL_H_
