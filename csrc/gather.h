// Gathering rows and columns, and the packed form of a frozen weight.
//
// float32, row-major. `keep` is a sorted list of distinct indices, or null for all; indices are not
// checked here. Input and output must not overlap. Results are exact copies, but for what a packed
// weight's format rounds.
#ifndef FEDSPINE_CSRC_GATHER_H_
#define FEDSPINE_CSRC_GATHER_H_

#include <cstdint>

#include "packed_weight.h"

namespace fedspine {

// A matrix and what is kept of it: element (i, j) is data[keep_rows[i] * stride + keep_columns[j]].
struct KeptMatrix {
  const float* data;
  Index stride;  // Floats from a row to the next.
  const std::int64_t* keep_rows;
  const std::int64_t* keep_columns;
  Index rows;  // Kept.
  Index columns;
};

// out[rows, columns], compact.
void Gather(const KeptMatrix& matrix, float* out, int num_threads);

// Where PackWeight writes; as PackedWeight.
struct PackedOut {
  void* panels;
  float* scales;
  WeightFormat format;
};

// Packs a weight; reads the kept elements in place, so a memory-mapped file is not copied first.
void PackWeight(const KeptMatrix& weight, const PackedOut& out, int num_threads);

// weight[O, I], compact, from its panels.
void UnpackWeight(const PackedWeight& packed, Index out_features, Index in_features, float* weight,
                  int num_threads);

}  // namespace fedspine

#endif  // FEDSPINE_CSRC_GATHER_H_
