// LoraLinearForward for one target; lora_linear.h holds the contract.
#ifndef FEDSPINE_CSRC_LORA_LINEAR_FORWARD_INL_H_
#define FEDSPINE_CSRC_LORA_LINEAR_FORWARD_INL_H_

#include "blocking-inl.h"
#include "dropout-inl.h"
#include "packed_weight-inl.h"

namespace fedspine {
namespace FEDSPINE_TARGET {
namespace {

// ---------------------------------------------------------------------------------------

struct ForwardScratch {
  float* a_panels;      // A transposed: [R / 32][I][32]
  float* b_panels;      // B transposed: [O / 32][R][32]
  float* parts;         // For each part: a block of x, then its hidden rows, a panel of W.
  Index shared_floats;  // All that stands before the parts.
  Index part_floats;
  Index hidden_offset;
  Index panel_offset;  // Unused when W is float32.
};

inline ForwardScratch LayOutForward(const LinearShape& shape, float* scratch) {
  ScratchCursor cursor{scratch, 0};
  ForwardScratch layout;
  layout.a_panels = cursor.Take(PanelFloats(shape.rank, shape.in_features));
  layout.b_panels = cursor.Take(PanelFloats(shape.out_features, shape.rank));
  layout.parts = cursor.Take(0);
  layout.shared_floats = cursor.taken;
  layout.hidden_offset = kForwardTokens * kBlockDepth;
  layout.panel_offset = RoundUp(layout.hidden_offset + PanelFloats(shape.rank, kForwardTokens), 16);
  layout.part_floats = layout.panel_offset + kPanelWidth * kBlockDepth;
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

// `depth_rows` are the rows of a panel at the block's depth.
inline Product ForwardProduct(const Block& block, Range rows, const float* x_panels,
                              const float* depth_rows) {
  const Index num_depth = block.depth.end - block.depth.begin;
  return {x_panels + rows.begin * RoundUp(num_depth, kPanelWidth),
          (rows.end - rows.begin) * kPanelWidth, depth_rows, kPanelWidth, num_depth};
}

// hidden = s D(x A^T) for the block's tokens, as panels [R / 32][tokens][32].
inline void ForwardHidden(const LoraLinearForwardArgs& args, const ForwardScratch& scratch,
                          const Block& block, const float* x_panels, float* hidden) {
  const Index num_tokens = block.tokens.end - block.tokens.begin;
  for (Index r = 0; r < args.shape.rank; r += kTileColumns) {
    const Index panel = r / kPanelWidth;
    const float* a_rows = scratch.a_panels + panel * kPanelWidth * args.shape.in_features +
                          block.depth.begin * kPanelWidth + r % kPanelWidth;
    for (Index tile = 0; tile < NumTiles(num_tokens); ++tile) {
      const Range rows = TileRange(num_tokens, tile);
      Tile call = {};
      call.main = ForwardProduct(block, rows, x_panels, a_rows);
      call.out = hidden + (panel * num_tokens + rows.begin) * kPanelWidth + r % kPanelWidth;
      call.out_stride = kPanelWidth;
      call.init = block.first ? nullptr : call.out;
      call.init_stride = kPanelWidth;
      call.scale = block.last ? args.scaling : 1;
      call.columns = Min(kTileColumns, args.shape.rank - r);
      RunTile<false>(rows.end - rows.begin, call);
    }
  }
  if (!block.last) return;
  DropValues(args.dropout, block.tokens, args.shape.rank,
             {hidden, num_tokens * kPanelWidth, 1, kPanelWidth});
}

inline void ForwardOutputs(const LoraLinearForwardArgs& args, const ForwardScratch& scratch,
                           const Block& block, const float* x_panels, const float* hidden,
                           float* hot) {
  const LinearShape& shape = args.shape;
  const Index num_tokens = block.tokens.end - block.tokens.begin;
  const float* panel_rows = nullptr;
  for (Index o = block.features.begin; o < block.features.end; o += kTileColumns) {
    const Index first = o / kPanelWidth * kPanelWidth;  // Of the panel.
    if (o == first) {
      panel_rows = PanelRows(args.weight, shape.in_features, first, block.depth.begin,
                             block.depth.end - block.depth.begin, hot);
    }
    for (Index tile = 0; tile < NumTiles(num_tokens); ++tile) {
      const Range rows = TileRange(num_tokens, tile);
      Tile call = {};
      call.main = ForwardProduct(block, rows, x_panels, panel_rows + (o - first));
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
      ForwardOutputs(args, scratch, step, x_panels, hidden, x_panels + scratch.panel_offset);
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

}  // namespace
}  // namespace FEDSPINE_TARGET
}  // namespace fedspine

#endif  // FEDSPINE_CSRC_LORA_LINEAR_FORWARD_INL_H_
