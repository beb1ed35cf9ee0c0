#include "gather.h"

#include <algorithm>

namespace fedspine {
namespace {

// Memory-bound work: an element moved counts as this many flops when threads are considered.
constexpr double kFlopsPerElement = 8;

Index PartsFor(Index elements, int num_threads) {
  return UsefulParts(kFlopsPerElement * static_cast<double>(elements), num_threads);
}

Index Kept(const std::int64_t* keep, Index index) {
  return keep == nullptr ? index : static_cast<Index>(keep[index]);
}

}  // namespace

void Gather(const KeptMatrix& matrix, float* out, int num_threads) {
  const Index parts = PartsFor(matrix.rows * matrix.columns, num_threads);
  RunParts(parts, [&](Index part) {
    const Range range = PartRange(matrix.rows, 1, part, parts);
    for (Index row = range.begin; row < range.end; ++row) {
      const float* from = matrix.data + Kept(matrix.keep_rows, row) * matrix.stride;
      float* to = out + row * matrix.columns;
      if (matrix.keep_columns == nullptr) {
        std::copy_n(from, matrix.columns, to);
      } else {
        for (Index column = 0; column < matrix.columns; ++column) {
          to[column] = from[matrix.keep_columns[column]];
        }
      }
    }
  });
}

void PackWeight(const KeptMatrix& weight, float* panels, int num_threads) {
  // Columns in this many steps keep the part of the panel being written in the first-level cache.
  constexpr Index kColumnStep = 64;
  const Index parts = PartsFor(weight.rows * weight.columns, num_threads);
  RunParts(parts, [&](Index part) {
    const Range range = PartRange(weight.rows, kPanelWidth, part, parts);
    for (Index first = range.begin; first < range.end; first += kPanelWidth) {
      float* panel = panels + first * weight.columns;
      const Index rows = std::min(kPanelWidth, weight.rows - first);
      if (rows < kPanelWidth) std::fill_n(panel, weight.columns * kPanelWidth, 0.0f);
      for (Index begin = 0; begin < weight.columns; begin += kColumnStep) {
        const Index end = std::min(begin + kColumnStep, weight.columns);
        for (Index row = 0; row < rows; ++row) {
          const float* from = weight.data + Kept(weight.keep_rows, first + row) * weight.stride;
          for (Index column = begin; column < end; ++column) {
            panel[column * kPanelWidth + row] = from[Kept(weight.keep_columns, column)];
          }
        }
      }
    }
  });
}

void UnpackWeight(const float* panels, Index out_features, Index in_features, float* weight,
                  int num_threads) {
  const Index parts = PartsFor(out_features * in_features, num_threads);
  RunParts(parts, [&](Index part) {
    const Range range = PartRange(out_features, kPanelWidth, part, parts);
    for (Index row = range.begin; row < range.end; ++row) {
      const float* from =
          panels + row / kPanelWidth * kPanelWidth * in_features + row % kPanelWidth;
      float* to = weight + row * in_features;
      for (Index column = 0; column < in_features; ++column)
        to[column] = from[column * kPanelWidth];
    }
  });
}

}  // namespace fedspine
