// The gate of a feed-forward block for one target; swiglu.h holds the contract.
#ifndef FEDSPINE_CSRC_SWIGLU_INL_H_
#define FEDSPINE_CSRC_SWIGLU_INL_H_

#include "bfloat16-inl.h"
#include "elementwise-inl.h"
#include "swiglu.h"

namespace fedspine {
namespace FEDSPINE_TARGET {
namespace {

FEDSPINE_INLINE V Sigmoid(V value) { return 1.0f / (1.0f + Exp(-value)); }

inline void SwigluForward(const SwigluForwardArgs& args) {
  ForEachVectorInParts(args.size, args.num_threads, [&](Index i, Index count) {
    const V gate = LoadUpTo(args.gate + i, count), up = LoadUpTo(args.up + i, count);
    StoreUpTo(gate * Sigmoid(gate) * up, args.y + i, count);
    if (args.kept_gate == nullptr) return;
    StoreKept(gate, args.kept_gate + i, count);
    StoreKept(up, args.kept_up + i, count);
  });
}

inline void SwigluAgain(const SwigluAgainArgs& args) {
  ForEachVectorInParts(args.size, args.num_threads, [&](Index i, Index count) {
    const V gate = LoadKept(args.gate + i, count);
    StoreUpTo(gate * Sigmoid(gate) * LoadKept(args.up + i, count), args.y + i, count);
  });
}

inline void SwigluBackward(const SwigluBackwardArgs& args) {
  ForEachVectorInParts(args.size, args.num_threads, [&](Index i, Index count) {
    const V dy = LoadUpTo(args.dy + i, count);
    const V gate = LoadKept(args.gate + i, count);
    const V sigmoid = Sigmoid(gate);
    const V slope = sigmoid * (1.0f + gate * (1.0f - sigmoid));
    StoreUpTo(dy * LoadKept(args.up + i, count) * slope, args.dgate + i, count);
    StoreUpTo(dy * (gate * sigmoid), args.dup + i, count);
  });
}

}  // namespace
}  // namespace FEDSPINE_TARGET
}  // namespace fedspine

#endif  // FEDSPINE_CSRC_SWIGLU_INL_H_
