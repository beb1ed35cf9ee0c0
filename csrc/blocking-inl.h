// How a kernel call is cut: parts for threads, blocks for caches, pieces of scratch memory.
#ifndef FEDSPINE_CSRC_BLOCKING_INL_H_
#define FEDSPINE_CSRC_BLOCKING_INL_H_

#include "gemm-inl.h"
#include "lora_linear.h"

namespace fedspine {
namespace FEDSPINE_TARGET {
namespace {

// Block sizes: a block of x or dy stays within half a megabyte of second-level cache beside a
// panel. A weight that is not in a cache is read once for each block of tokens.
constexpr Index kForwardTokens = RoundUp(128, kTileRows);
constexpr Index kBackwardTokens = 128;
constexpr Index kBlockDepth = 1024;   // Of either; longer sums return to their tile once a block.
constexpr Index kUpdateTokens = 256;  // Tokens of one pass over dA and dB.

// How the parts of a call share its work: by tokens, and when tokens are few also by features.
struct Grid {
  Index token_parts;
  Index feature_parts;
};

inline Grid SplitWork(const LinearShape& shape, Index token_unit, int num_threads) {
  const double flops = 2.0 * static_cast<double>(shape.tokens) *
                       static_cast<double>(shape.in_features) *
                       static_cast<double>(shape.out_features);
  const Index parts = UsefulParts(flops, num_threads);
  // Four units a part or more, else the parts would be uneven.
  return shape.tokens >= 4 * token_unit * parts ? Grid{parts, 1} : Grid{1, parts};
}

inline Index PanelFloats(Index features, Index rows) {
  return NumPanels(features) * kPanelWidth * rows;
}

// Hands out consecutive pieces of the scratch memory, each aligned to a cache line; without memory
// it only counts.
struct ScratchCursor {
  float* memory;
  Index taken;
  float* Take(Index floats) {
    float* const piece = memory == nullptr ? nullptr : memory + taken;
    taken += RoundUp(floats, 16);
    return piece;
  }
};

// A block of tokens times a block of the depth, for a range of the features that are computed.
struct Block {
  Range tokens;
  Range depth;
  Range features;
  bool first;  // The first block of the depth starts from nothing or the bias;
  bool last;   // the last adds the low-rank pair.
};

constexpr Index NumBlocks(Index size, Index block) { return (size + block - 1) / block; }

}  // namespace
}  // namespace FEDSPINE_TARGET
}  // namespace fedspine

#endif  // FEDSPINE_CSRC_BLOCKING_INL_H_
