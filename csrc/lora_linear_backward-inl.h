// LoraLinearBackward for one target; lora_linear.h holds the contract.
#ifndef FEDSPINE_CSRC_LORA_LINEAR_BACKWARD_INL_H_
#define FEDSPINE_CSRC_LORA_LINEAR_BACKWARD_INL_H_

#include "blocking-inl.h"
#include "dropout-inl.h"
#include "packed_weight-inl.h"

namespace fedspine {
namespace FEDSPINE_TARGET {
namespace {

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
  Index strip_offset;  // a strip [kUpdateTokens][32],
  Index rows_offset;   // rows of W [depth / 32][kTileRows][32], unused when W is float32.
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
  layout.rows_offset = RoundUp(layout.strip_offset + kUpdateTokens * kPanelWidth, 16);
  layout.part_floats = layout.rows_offset + kTileRows * depth;
  return layout;
}

inline Index LoraLinearBackwardScratch(const LinearShape& shape, int num_threads) {
  const BackwardScratch layout = LayOutBackward(shape, nullptr);
  return layout.shared_floats + num_threads * layout.part_floats;
}

// dhidden = s D(B^T dy^T) for the tokens of one panel, the first of which is `token`: [R][32].
inline void BackwardHidden(const LoraLinearBackwardArgs& args, const BackwardScratch& scratch,
                           const Block& block, Index token, const float* dy_panel, float* dhidden) {
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
  if (!block.last) return;
  DropValues(args.dropout, {token, token + kPanelWidth}, rank,
             {dhidden, kPanelWidth * kPanelWidth, kPanelWidth, 1});
}

// One tile of dx^T: inputs `rows`, whose weights are `left`, tokens from the block's `t`-th.
inline void BackwardTile(const LoraLinearBackwardArgs& args, const BackwardScratch& scratch,
                         const Block& block, Range rows, const LeftPanels& left, Index t,
                         float* part_memory) {
  const LinearShape& shape = args.shape;
  const Index panel = t / kPanelWidth * kPanelWidth;
  const Index depth = block.depth.end - block.depth.begin;
  const float* const dhidden = part_memory + scratch.dhidden_offset;
  float* const partial = part_memory + scratch.partial_offset;
  Tile call = {};
  call.main = {left.data, left.stride, part_memory + panel * depth + (t - panel), kPanelWidth,
               depth};
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
  PackTransposed(args.dy + block.tokens.begin * shape.out_features + block.depth.begin,
                 shape.out_features, num_tokens, depth, part_memory);
  for (Index panel = 0; panel < num_tokens; panel += kPanelWidth) {
    BackwardHidden(args, scratch, block, block.tokens.begin + panel, part_memory + panel * depth,
                   dhidden + panel * shape.rank);
  }
  if (args.dx == nullptr) return;
  for (Index tile = 0; tile < NumTiles(num_inputs); ++tile) {
    const Range range = TileRange(num_inputs, tile);
    const Range rows = {block.features.begin + range.begin, block.features.begin + range.end};
    const LeftPanels left = PanelsOfRows(args.weight, shape.in_features, block.depth, rows,
                                         part_memory + scratch.rows_offset);
    for (Index t = 0; t < num_tokens; t += kTileColumns) {
      BackwardTile(args, scratch, block, rows, left, t, part_memory);
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

#endif  // FEDSPINE_CSRC_LORA_LINEAR_BACKWARD_INL_H_
