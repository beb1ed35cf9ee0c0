// LoraLinearForward and LoraLinearBackward for one target; lora_linear.h holds the contract.
#ifndef FEDSPINE_CSRC_LORA_LINEAR_INL_H_
#define FEDSPINE_CSRC_LORA_LINEAR_INL_H_

#include "gemm-inl.h"
#include "lora_linear.h"

namespace fedspine {
namespace FEDSPINE_TARGET {
namespace {

// Block sizes: a block of x or dy stays within half a megabyte of second-level cache beside a
// panel.
constexpr Index kForwardTokens = RoundUp(64, kTileRows);
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

// --- Forward
// ---------------------------------------------------------------------------------------

struct ForwardScratch {
  float* a_panels;      // A transposed: [R / 32][I][32]
  float* b_panels;      // B transposed: [O / 32][R][32]
  float* parts;         // For each part: a block of x, then its hidden rows.
  Index shared_floats;  // All that stands before the parts.
  Index part_floats;
  Index hidden_offset;
};

inline ForwardScratch LayOutForward(const LinearShape& shape, float* scratch) {
  ScratchCursor cursor{scratch, 0};
  ForwardScratch layout;
  layout.a_panels = cursor.Take(PanelFloats(shape.rank, shape.in_features));
  layout.b_panels = cursor.Take(PanelFloats(shape.out_features, shape.rank));
  layout.parts = cursor.Take(0);
  layout.shared_floats = cursor.taken;
  layout.hidden_offset = kForwardTokens * kBlockDepth;
  layout.part_floats = RoundUp(layout.hidden_offset + PanelFloats(shape.rank, kForwardTokens), 16);
  return layout;
}

inline Index LoraLinearForwardScratch(const LinearShape& shape, int num_threads) {
  const ForwardScratch layout = LayOutForward(shape, nullptr);
  return layout.shared_floats + num_threads * layout.part_floats;
}

// Packs the block's x: tile by tile, [tile][depth / 32][rows][32].
inline void PackForwardBlock(const LoraLinearForwardArgs& args, const Block& block,
                             float* x_panels) {
  const Index in_features = args.shape.in_features;
  const Index num_tokens = block.tokens.end - block.tokens.begin;
  const Index depth_floats = RoundUp(block.depth.end - block.depth.begin, kPanelWidth);
  for (Index tile = 0; tile < NumTiles(num_tokens); ++tile) {
    const Range rows = TileRange(num_tokens, tile);
    const Index num_rows = rows.end - rows.begin;
    float* out = x_panels + rows.begin * depth_floats;
    for (Index k = block.depth.begin; k < block.depth.end; k += kPanelWidth) {
      CopyMatrix(args.x + (block.tokens.begin + rows.begin) * in_features + k, in_features,
                 num_rows, Min(kPanelWidth, block.depth.end - k), out, kPanelWidth);
      out += num_rows * kPanelWidth;
    }
  }
}

inline Product ForwardProduct(const Block& block, Range rows, const float* x_panels,
                              const float* panel) {
  const Index num_depth = block.depth.end - block.depth.begin;
  return {x_panels + rows.begin * RoundUp(num_depth, kPanelWidth),
          (rows.end - rows.begin) * kPanelWidth, panel + block.depth.begin * kPanelWidth,
          kPanelWidth, num_depth};
}

// hidden = s x A^T for the block's tokens, as panels [R / 32][tokens][32].
inline void ForwardHidden(const LoraLinearForwardArgs& args, const ForwardScratch& scratch,
                          const Block& block, const float* x_panels, float* hidden) {
  const Index num_tokens = block.tokens.end - block.tokens.begin;
  for (Index r = 0; r < args.shape.rank; r += kTileColumns) {
    const Index panel = r / kPanelWidth;
    const float* a_panel =
        scratch.a_panels + panel * kPanelWidth * args.shape.in_features + r % kPanelWidth;
    for (Index tile = 0; tile < NumTiles(num_tokens); ++tile) {
      const Range rows = TileRange(num_tokens, tile);
      Tile call = {};
      call.main = ForwardProduct(block, rows, x_panels, a_panel);
      call.out = hidden + (panel * num_tokens + rows.begin) * kPanelWidth + r % kPanelWidth;
      call.out_stride = kPanelWidth;
      call.init = block.first ? nullptr : call.out;
      call.init_stride = kPanelWidth;
      call.scale = block.last ? args.scaling : 1;
      call.columns = Min(kTileColumns, args.shape.rank - r);
      RunTile<false>(rows.end - rows.begin, call);
    }
  }
}

inline void ForwardOutputs(const LoraLinearForwardArgs& args, const ForwardScratch& scratch,
                           const Block& block, const float* x_panels, const float* hidden) {
  const LinearShape& shape = args.shape;
  const Index num_tokens = block.tokens.end - block.tokens.begin;
  for (Index o = block.features.begin; o < block.features.end; o += kTileColumns) {
    const Index first = o / kPanelWidth * kPanelWidth;  // Of the panel.
    for (Index tile = 0; tile < NumTiles(num_tokens); ++tile) {
      const Range rows = TileRange(num_tokens, tile);
      Tile call = {};
      call.main = ForwardProduct(block, rows, x_panels,
                                 args.panels + first * shape.in_features + (o - first));
      if (block.last && shape.rank > 0) {
        call.extra = {hidden + rows.begin * kPanelWidth, num_tokens * kPanelWidth,
                      scratch.b_panels + first * shape.rank + (o - first), kPanelWidth, shape.rank};
      }
      call.out = args.y + (block.tokens.begin + rows.begin) * shape.out_features + o;
      call.out_stride = shape.out_features;
      if (!block.first) {
        call.init = call.out;
        call.init_stride = shape.out_features;
      } else if (args.bias != nullptr) {
        call.init = args.bias + o;
      }
      call.scale = 1;
      call.columns = Min(kTileColumns, shape.out_features - o);
      RunTile<false>(rows.end - rows.begin, call);
    }
  }
}

inline void ForwardPart(const LoraLinearForwardArgs& args, const ForwardScratch& scratch, Grid grid,
                        Index part) {
  const LinearShape& shape = args.shape;
  float* const x_panels = scratch.parts + part * scratch.part_floats;
  float* const hidden = x_panels + scratch.hidden_offset;
  const Index token_part = part / grid.feature_parts;
  const Index feature_part = part % grid.feature_parts;
  const Range tokens = PartRange(shape.tokens, 1, token_part, grid.token_parts);
  const Range outputs =
      PartRange(shape.out_features, kPanelWidth, feature_part, grid.feature_parts);
  const Index token_blocks = NumBlocks(tokens.end - tokens.begin, kForwardTokens);
  const Index depth_blocks = NumBlocks(shape.in_features, kBlockDepth);
  for (Index t = 0; t < token_blocks; ++t) {
    const Range block = PartRange(tokens.end - tokens.begin, 1, t, token_blocks);
    const Range block_tokens = {tokens.begin + block.begin, tokens.begin + block.end};
    for (Index d = 0; d < depth_blocks; ++d) {
      const Block step = {block_tokens, PartRange(shape.in_features, kPanelWidth, d, depth_blocks),
                          outputs, d == 0, d + 1 == depth_blocks};
      PackForwardBlock(args, step, x_panels);
      ForwardHidden(args, scratch, step, x_panels, hidden);
      ForwardOutputs(args, scratch, step, x_panels, hidden);
    }
    if (args.hidden == nullptr || feature_part != 0) continue;
    const Index num_tokens = block.end - block.begin;
    for (Index r = 0; r < shape.rank; r += kPanelWidth) {
      CopyMatrix(hidden + r * num_tokens, kPanelWidth, num_tokens, Min(kPanelWidth, shape.rank - r),
                 args.hidden + block_tokens.begin * shape.rank + r, shape.rank);
    }
  }
}

inline void LoraLinearForward(const LoraLinearForwardArgs& args, float* scratch_memory) {
  const LinearShape& shape = args.shape;
  const ForwardScratch scratch = LayOutForward(shape, scratch_memory);
  if (shape.rank > 0) {
    PackTransposed(args.lora_a, shape.in_features, shape.rank, shape.in_features, scratch.a_panels);
    PackTransposed(args.lora_b, shape.rank, shape.out_features, shape.rank, scratch.b_panels);
  }
  const Grid grid = SplitWork(shape, kTileRows, args.num_threads);
  RunParts(grid.token_parts * grid.feature_parts,
           [&](Index part) { ForwardPart(args, scratch, grid, part); });
}

// --- Backward
// --------------------------------------------------------------------------------------

struct BackwardScratch {
  float* a_panels;      // A transposed: [R / 32][I][32]
  float* b_panels;      // B transposed: [O / 32][R][32]
  float* dhidden;       // s B^T dy^T: [T / 32][R][32]
  float* hidden;        // The forward's, transposed: [T / 32][R][32]
  float* dlora_b;       // Transposed: [R, O]
  float* parts;         // For each part: a block of dy^T [tokens / 32][depth][32], then
  Index shared_floats;  // All that stands before the parts.
  Index part_floats;
  Index dhidden_offset;  // its share of dhidden,
  Index
      partial_offset;  // unfinished dx^T [tokens / 32][I][32] when the depth takes several blocks,
  Index strip_offset;  // a strip [kUpdateTokens][32].
};

inline BackwardScratch LayOutBackward(const LinearShape& shape, float* scratch) {
  ScratchCursor cursor{scratch, 0};
  BackwardScratch layout;
  layout.a_panels = cursor.Take(PanelFloats(shape.rank, shape.in_features));
  layout.b_panels = cursor.Take(PanelFloats(shape.out_features, shape.rank));
  layout.dhidden = cursor.Take(PanelFloats(shape.tokens, shape.rank));
  layout.hidden = cursor.Take(PanelFloats(shape.tokens, shape.rank));
  layout.dlora_b = cursor.Take(shape.rank * shape.out_features);
  layout.parts = cursor.Take(0);
  layout.shared_floats = cursor.taken;
  const Index depth = Min(kBlockDepth, RoundUp(shape.out_features, kPanelWidth));
  layout.dhidden_offset = kBackwardTokens * depth;
  layout.partial_offset = layout.dhidden_offset + kBackwardTokens * shape.rank;
  layout.strip_offset = layout.partial_offset;
  if (shape.out_features > kBlockDepth) layout.strip_offset += kBackwardTokens * shape.in_features;
  layout.part_floats = RoundUp(layout.strip_offset + kUpdateTokens * kPanelWidth, 16);
  return layout;
}

inline Index LoraLinearBackwardScratch(const LinearShape& shape, int num_threads) {
  const BackwardScratch layout = LayOutBackward(shape, nullptr);
  return layout.shared_floats + num_threads * layout.part_floats;
}

// dhidden = s B^T dy^T for the tokens of one panel: [R][32].
inline void BackwardHidden(const LoraLinearBackwardArgs& args, const BackwardScratch& scratch,
                           const Block& block, const float* dy_panel, float* dhidden) {
  const Index rank = args.shape.rank;
  for (Index column = 0; column < kPanelWidth; column += kTileColumns) {
    for (Index tile = 0; tile < NumTiles(rank); ++tile) {
      const Range rows = TileRange(rank, tile);
      Tile call = {};
      call.main = {scratch.b_panels + block.depth.begin * rank + rows.begin * kPanelWidth,
                   rank * kPanelWidth, dy_panel + column, kPanelWidth,
                   block.depth.end - block.depth.begin};
      call.scale = block.last ? args.scaling : 1;
      call.out = dhidden + rows.begin * kPanelWidth + column;
      call.out_stride = kPanelWidth;
      call.init = block.first ? nullptr : call.out;
      call.init_stride = kPanelWidth;
      call.columns = kTileColumns;
      RunTile<false>(rows.end - rows.begin, call);
    }
  }
}

// One tile of dx^T: inputs `rows`, tokens from the block's `t`-th.
inline void BackwardTile(const LoraLinearBackwardArgs& args, const BackwardScratch& scratch,
                         const Block& block, Range rows, Index t, const float* dy_panels,
                         const float* dhidden, float* partial) {
  const LinearShape& shape = args.shape;
  const Index panel = t / kPanelWidth * kPanelWidth;
  const Index depth = block.depth.end - block.depth.begin;
  Tile call = {};
  call.main = {args.panels + block.depth.begin * shape.in_features + rows.begin * kPanelWidth,
               shape.in_features * kPanelWidth, dy_panels + panel * depth + (t - panel),
               kPanelWidth, depth};
  call.scale = 1;
  call.columns = kTileColumns;
  call.out = partial + panel * shape.in_features + rows.begin * kPanelWidth + (t - panel);
  call.out_stride = kPanelWidth;
  call.init = block.first ? nullptr : call.out;
  call.init_stride = kPanelWidth;
  if (!block.last) {
    RunTile<false>(rows.end - rows.begin, call);
    return;
  }
  call.extra = {scratch.a_panels + rows.begin * kPanelWidth, shape.in_features * kPanelWidth,
                dhidden + panel * shape.rank + (t - panel), kPanelWidth, shape.rank};
  call.out = args.dx + (block.tokens.begin + t) * shape.in_features + rows.begin;
  call.out_stride = shape.in_features;
  call.columns = Min(kTileColumns, block.tokens.end - block.tokens.begin - t);
  RunTile<true>(rows.end - rows.begin, call);
}

// One block of dx = dy W + dhidden A and of dhidden, in the memory of a part.
inline void BackwardBlock(const LoraLinearBackwardArgs& args, const BackwardScratch& scratch,
                          const Block& block, float* part_memory) {
  const LinearShape& shape = args.shape;
  const Index num_tokens = block.tokens.end - block.tokens.begin;
  const Index depth = block.depth.end - block.depth.begin;
  const Index num_inputs = block.features.end - block.features.begin;
  float* const dhidden = part_memory + scratch.dhidden_offset;
  float* const partial = part_memory + scratch.partial_offset;
  PackTransposed(args.dy + block.tokens.begin * shape.out_features + block.depth.begin,
                 shape.out_features, num_tokens, depth, part_memory);
  for (Index panel = 0; panel < num_tokens; panel += kPanelWidth) {
    BackwardHidden(args, scratch, block, part_memory + panel * depth, dhidden + panel * shape.rank);
  }
  if (args.dx == nullptr) return;
  for (Index tile = 0; tile < NumTiles(num_inputs); ++tile) {
    const Range range = TileRange(num_inputs, tile);
    const Range rows = {block.features.begin + range.begin, block.features.begin + range.end};
    for (Index t = 0; t < num_tokens; t += kTileColumns) {
      BackwardTile(args, scratch, block, rows, t, part_memory, dhidden, partial);
    }
  }
}

inline void BackwardPart(const LoraLinearBackwardArgs& args, const BackwardScratch& scratch,
                         Grid grid, Index part) {
  const LinearShape& shape = args.shape;
  float* const memory = scratch.parts + part * scratch.part_floats;
  const Index feature_part = part % grid.feature_parts;
  const Range tokens =
      PartRange(shape.tokens, kPanelWidth, part / grid.feature_parts, grid.token_parts);
  const Range inputs = PartRange(shape.in_features, 1, feature_part, grid.feature_parts);
  const Index depth_blocks = NumBlocks(shape.out_features, kBlockDepth);
  for (Index t = tokens.begin; t < tokens.end; t += kBackwardTokens) {
    const Range block_tokens = {t, Min(t + kBackwardTokens, tokens.end)};
    for (Index d = 0; d < depth_blocks; ++d) {
      const Range depth = PartRange(shape.out_features, kPanelWidth, d, depth_blocks);
      BackwardBlock(args, scratch, {block_tokens, depth, inputs, d == 0, d + 1 == depth_blocks},
                    memory);
    }
    if (feature_part == 0) {
      const Index floats = RoundUp(block_tokens.end - t, kPanelWidth) * shape.rank;
      CopyMatrix(memory + scratch.dhidden_offset, floats, 1, floats,
                 scratch.dhidden + t * shape.rank, floats);
    }
  }
}

// One of the two rank updates: out[R, columns] = sum over t of factor[t][r] * rows[t][column].
struct RankUpdate {
  const float* factor;  // Panels [T / 32][R][32]; null when the update is not wanted.
  const float* rows;    // [T, columns]
  Index columns;
  float* out;
};

// A 32-wide strip of a rank update over the tokens of one pass.
inline void UpdateStrip(const RankUpdate& update, const LinearShape& shape, Range tokens,
                        Index column, float* strip) {
  const Index num_tokens = tokens.end - tokens.begin;
  const Index width = Min(kPanelWidth, update.columns - column);
  const float* rows = update.rows + tokens.begin * update.columns + column;
  Index stride = update.columns;
  if (width < kPanelWidth) {  // A vector must not reach beyond the last row.
    CopyMatrix(rows, stride, num_tokens, width, strip, kPanelWidth);
    rows = strip;
    stride = kPanelWidth;
  }
  for (Index c = 0; c < width; c += kTileColumns) {
    for (Index tile = 0; tile < NumTiles(shape.rank); ++tile) {
      const Range range = TileRange(shape.rank, tile);
      Tile call = {};
      call.main = {update.factor + (tokens.begin * shape.rank + range.begin * kPanelWidth),
                   shape.rank * kPanelWidth, rows + c, stride, num_tokens};
      call.scale = 1;
      call.out = update.out + range.begin * update.columns + column + c;
      call.out_stride = update.columns;
      call.init = tokens.begin == 0 ? nullptr : call.out;
      call.init_stride = update.columns;
      call.columns = Min(kTileColumns, width - c);
      RunTile<false>(range.end - range.begin, call);
    }
  }
}

inline void UpdateRange(const RankUpdate& update, const LinearShape& shape, Range columns,
                        float* strip) {
  if (update.factor == nullptr) return;
  for (Index t = 0; t < shape.tokens; t += kUpdateTokens) {
    const Range tokens = {t, Min(t + kUpdateTokens, shape.tokens)};
    for (Index column = columns.begin; column < columns.end; column += kPanelWidth) {
      UpdateStrip(update, shape, tokens, column, strip);
    }
  }
}

inline void BackwardFactors(const LoraLinearBackwardArgs& args, const BackwardScratch& scratch,
                            Index parts) {
  const LinearShape& shape = args.shape;
  const RankUpdate update_a = {args.dlora_a == nullptr ? nullptr : scratch.dhidden, args.x,
                               shape.in_features, args.dlora_a};
  const RankUpdate update_b = {args.dlora_b == nullptr ? nullptr : scratch.hidden, args.dy,
                               shape.out_features, scratch.dlora_b};
  RunParts(parts, [&](Index part) {
    float* const strip = scratch.parts + part * scratch.part_floats + scratch.strip_offset;
    UpdateRange(update_a, shape, PartRange(shape.in_features, kPanelWidth, part, parts), strip);
    const Range outputs = PartRange(shape.out_features, kPanelWidth, part, parts);
    UpdateRange(update_b, shape, outputs, strip);
    if (args.dlora_b == nullptr) return;
    TransposeMatrix(scratch.dlora_b + outputs.begin, shape.out_features, shape.rank,
                    outputs.end - outputs.begin, args.dlora_b + outputs.begin * shape.rank,
                    shape.rank);
  });
}

inline void LoraLinearBackward(const LoraLinearBackwardArgs& args, float* scratch_memory) {
  const LinearShape& shape = args.shape;
  const BackwardScratch scratch = LayOutBackward(shape, scratch_memory);
  const bool low_rank = shape.rank > 0;
  if (low_rank) {
    PackTransposed(args.lora_a, shape.in_features, shape.rank, shape.in_features, scratch.a_panels);
    PackTransposed(args.lora_b, shape.rank, shape.out_features, shape.rank, scratch.b_panels);
  }
  const Grid grid = SplitWork(shape, kPanelWidth, args.num_threads);
  const Index parts = grid.token_parts * grid.feature_parts;
  if (args.dx != nullptr || args.dlora_a != nullptr) {
    RunParts(parts, [&](Index part) { BackwardPart(args, scratch, grid, part); });
  }
  if (!low_rank || (args.dlora_a == nullptr && args.dlora_b == nullptr)) return;
  if (args.dlora_b != nullptr) {
    PackTransposed(args.hidden, shape.rank, shape.tokens, shape.rank, scratch.hidden);
  }
  BackwardFactors(args, scratch, parts);
}

}  // namespace
}  // namespace FEDSPINE_TARGET
}  // namespace fedspine

#endif  // FEDSPINE_CSRC_LORA_LINEAR_INL_H_
