// Importance for one target; importance.h holds the contract.
//
// Tiles are transposed: rows are inputs, columns the outputs of one panel of W. The gradient is a
// product of depth 2R; the effective weight is a tile that starts from the panel itself.
#ifndef FEDSPINE_CSRC_IMPORTANCE_INL_H_
#define FEDSPINE_CSRC_IMPORTANCE_INL_H_

#include "blocking-inl.h"
#include "importance.h"
#include "packed_weight-inl.h"

namespace fedspine {
namespace FEDSPINE_TARGET {
namespace {

struct ImportanceScratch {
  float* right;         // [A - dA ; dA]: [2R, I]
  float* left;          // [dB, B]: [O, 2R]
  float* scaled_b;      // s B: [O, R]
  float* right_panels;  // [2R / 32][I][32]
  float* left_panels;   // [O / 32][2R][32]
  float* a_panels;      // [R / 32][I][32]
  float* b_panels;      // Of s B: [O / 32][R][32]
  float* sums;          // Doubles: [I] when inputs are scored.
};

inline ImportanceScratch LayOutImportance(const LinearShape& shape, ScratchCursor* cursor) {
  ImportanceScratch layout;
  layout.right = cursor->Take(2 * shape.rank * shape.in_features);
  layout.left = cursor->Take(shape.out_features * 2 * shape.rank);
  layout.scaled_b = cursor->Take(shape.out_features * shape.rank);
  layout.right_panels = cursor->Take(PanelFloats(2 * shape.rank, shape.in_features));
  layout.left_panels = cursor->Take(PanelFloats(shape.out_features, 2 * shape.rank));
  layout.a_panels = cursor->Take(PanelFloats(shape.rank, shape.in_features));
  layout.b_panels = cursor->Take(PanelFloats(shape.out_features, shape.rank));
  layout.sums = cursor->Take(2 * shape.in_features);
  return layout;
}

inline Index ImportanceScratchFloats(const LinearShape& shape) {
  ScratchCursor cursor{nullptr, 0};
  LayOutImportance(shape, &cursor);
  return cursor.taken;
}

// The blocks of 32 features that are looked at: first, first + step, ...
struct Sample {
  Index first;
  Index step;
};

inline Sample SampleOf(const ImportanceArgs& args) {
  const Index features = args.by_output ? args.shape.in_features : args.shape.out_features;
  const Index step = Min(args.share, NumPanels(features));
  return {args.phase % step, step};
}

inline void PackImportance(const ImportanceArgs& args, const ImportanceScratch& scratch) {
  const Index rank = args.shape.rank;
  const Index in_features = args.shape.in_features;
  const Index out_features = args.shape.out_features;
  const Index floats = rank * in_features;
  for (Index i = 0; i < floats; ++i) scratch.right[i] = args.lora_a[i] - args.dlora_a[i];
  CopyMatrix(args.dlora_a, in_features, rank, in_features, scratch.right + floats, in_features);
  CopyMatrix(args.dlora_b, rank, out_features, rank, scratch.left, 2 * rank);
  CopyMatrix(args.lora_b, rank, out_features, rank, scratch.left + rank, 2 * rank);
  for (Index i = 0; i < out_features * rank; ++i)
    scratch.scaled_b[i] = args.scaling * args.lora_b[i];
  PackTransposed(scratch.right, in_features, 2 * rank, in_features, scratch.right_panels);
  PackTransposed(scratch.left, 2 * rank, out_features, 2 * rank, scratch.left_panels);
  PackTransposed(args.lora_a, in_features, rank, in_features, scratch.a_panels);
  PackTransposed(scratch.scaled_b, rank, out_features, rank, scratch.b_panels);
}

// A tile of S, kTileColumns wide, into `gradient`; `weight` is overwritten.
struct ScoreTile {
  alignas(64) float gradient[kTileRows * kTileColumns];
  alignas(64) float weight[kTileRows * kTileColumns];
  alignas(64) float panel[kTileRows * kPanelWidth];  // Of W, when it is not float32.
};

// Scores inputs [rows) by outputs [output, output + kTileColumns).
inline void ComputeScores(const ImportanceArgs& args, const ImportanceScratch& scratch, Range rows,
                          Index output, ScoreTile* scores) {
  const Index rank = args.shape.rank;
  const Index in_features = args.shape.in_features;
  const Index first = output / kPanelWidth * kPanelWidth;
  const Index num_rows = rows.end - rows.begin;
  Tile call = {};
  call.main = {scratch.right_panels + rows.begin * kPanelWidth, in_features * kPanelWidth,
               scratch.left_panels + first * 2 * rank + (output - first), kPanelWidth, 2 * rank};
  call.scale = 1;
  call.out = scores->gradient;
  call.out_stride = kTileColumns;
  call.columns = kTileColumns;
  RunTile<false>(num_rows, call);
  call.main = {scratch.a_panels + rows.begin * kPanelWidth, in_features * kPanelWidth,
               scratch.b_panels + first * rank + (output - first), kPanelWidth, rank};
  call.init = PanelRows(args.weight, in_features, first, rows.begin, num_rows, scores->panel) +
              (output - first);
  call.init_stride = kPanelWidth;
  call.out = scores->weight;
  RunTile<false>(num_rows, call);
  for (Index i = 0; i < num_rows * kTileColumns; i += kLanes) {
    Store(Absolute(Load(scores->gradient + i) * Load(scores->weight + i)), scores->gradient + i);
  }
}

// out[o] for the outputs of one tile: down the inputs, a tile's rows in float32, tiles in double.
inline void ScoreOutputs(const ImportanceArgs& args, const ImportanceScratch& scratch,
                         Index output) {
  double sums[kTileColumns] = {};
  ScoreTile scores;
  const Sample sample = SampleOf(args);
  for (Index block = sample.first; block < NumPanels(args.shape.in_features);
       block += sample.step) {
    const Index begin = block * kPanelWidth;
    const Index inputs = Min(kPanelWidth, args.shape.in_features - begin);
    for (Index tile = 0; tile < NumTiles(inputs); ++tile) {
      const Range range = TileRange(inputs, tile);
      ComputeScores(args, scratch, {begin + range.begin, begin + range.end}, output, &scores);
      for (Index column = 0; column < kTileColumns; column += kLanes) {
        V sum = {};
        for (Index row = 0; row < range.end - range.begin; ++row) {
          sum += Load(scores.gradient + row * kTileColumns + column);
        }
        for (Index lane = 0; lane < kLanes; ++lane)
          sums[column + lane] += static_cast<double>(sum[lane]);
      }
    }
  }
  for (Index column = 0; column < Min(kTileColumns, args.shape.out_features - output); ++column) {
    args.out[output + column] = static_cast<float>(sums[column]);
  }
}

// Adds the outputs of one tile to the sums of a range of inputs: columns in float32.
inline void AddOutputs(const ImportanceArgs& args, const ImportanceScratch& scratch, Range inputs,
                       Index output, double* sums) {
  ScoreTile scores;
  for (Index first = inputs.begin; first < inputs.end; first += kTileRows) {
    const Range rows = {first, Min(first + kTileRows, inputs.end)};
    ComputeScores(args, scratch, rows, output, &scores);
    for (Index row = 0; row < rows.end - rows.begin; ++row) {
      V sum = {};
      for (Index column = 0; column < kTileColumns; column += kLanes) {
        sum += Load(scores.gradient + row * kTileColumns + column);
      }
      sums[rows.begin + row] += static_cast<double>(SumLanes(sum));
    }
  }
}

// out[i] for a range of inputs: across the panels, which add up in double.
inline void ScoreInputs(const ImportanceArgs& args, const ImportanceScratch& scratch,
                        Range inputs) {
  double* const sums = reinterpret_cast<double*>(scratch.sums);
  for (Index i = inputs.begin; i < inputs.end; ++i) sums[i] = 0;
  const Sample sample = SampleOf(args);
  for (Index block = sample.first; block < NumPanels(args.shape.out_features);
       block += sample.step) {
    const Index end = Min((block + 1) * kPanelWidth, args.shape.out_features);
    for (Index output = block * kPanelWidth; output < end; output += kTileColumns) {
      AddOutputs(args, scratch, inputs, output, sums);
    }
  }
  for (Index i = inputs.begin; i < inputs.end; ++i) args.out[i] = static_cast<float>(sums[i]);
}

inline void Importance(const ImportanceArgs& args, float* scratch_memory) {
  const LinearShape& shape = args.shape;
  ScratchCursor cursor{scratch_memory, 0};
  const ImportanceScratch scratch = LayOutImportance(shape, &cursor);
  PackImportance(args, scratch);
  const double flops =
      6.0 * static_cast<double>(shape.rank) * static_cast<double>(shape.in_features) *
      static_cast<double>(shape.out_features) / static_cast<double>(SampleOf(args).step);
  const Index parts = UsefulParts(flops, args.num_threads);
  RunParts(parts, [&](Index part) {
    if (args.by_output) {
      const Range outputs = PartRange(shape.out_features, kPanelWidth, part, parts);
      for (Index o = outputs.begin; o < outputs.end; o += kTileColumns)
        ScoreOutputs(args, scratch, o);
    } else {
      ScoreInputs(args, scratch, PartRange(shape.in_features, kTileRows, part, parts));
    }
  });
}

}  // namespace
}  // namespace FEDSPINE_TARGET
}  // namespace fedspine

#endif  // FEDSPINE_CSRC_IMPORTANCE_INL_H_
