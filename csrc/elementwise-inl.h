// What the elementwise kernels of one target share: whole vectors, then what is left of one.
#ifndef FEDSPINE_CSRC_ELEMENTWISE_INL_H_
#define FEDSPINE_CSRC_ELEMENTWISE_INL_H_

#include "simd.h"

namespace fedspine {
namespace FEDSPINE_TARGET {
namespace {

constexpr Index kChains = 4;  // Sums side by side hide the latency of an addition.

// The first `count` lanes; a constant kLanes makes it a plain load or store.
FEDSPINE_INLINE V LoadUpTo(const float* from, Index count) {
  return count == kLanes ? Load(from) : LoadFirst(from, count);
}
FEDSPINE_INLINE void StoreUpTo(V value, float* to, Index count) {
  if (count == kLanes) {
    Store(value, to);
  } else {
    StoreFirst(value, to, count);
  }
}

// Calls visit(first, count) for the vectors of [begin, end).
template <typename Visit>
FEDSPINE_INLINE void ForEachVector(Index begin, Index end, const Visit& visit) {
  Index i = begin;
  for (; i + kLanes <= end; i += kLanes) visit(i, kLanes);
  if (i < end) visit(i, end - i);
}

// Sum of the vectors term(first, count) of [0, size), lanes beyond the end being zero.
template <typename Term>
FEDSPINE_INLINE float SumVectors(Index size, const Term& term) {
  V sums[kChains] = {};
  Index i = 0;
  for (; i + kChains * kLanes <= size; i += kChains * kLanes) {
    FEDSPINE_UNROLL(4)
    for (Index chain = 0; chain < kChains; ++chain) sums[chain] += term(i + chain * kLanes, kLanes);
  }
  ForEachVector(i, size, [&](Index first, Index count) { sums[0] += term(first, count); });
  return SumLanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Calls visit(first, count) for the vectors of [0, size), shared out among threads.
template <typename Visit>
inline void ForEachVectorInParts(Index size, int num_threads, const Visit& visit) {
  constexpr double kFlopsPerElement = 64;  // What one costs, in flops of a product.
  const Index parts = UsefulParts(kFlopsPerElement * static_cast<double>(size), num_threads);
  RunParts(parts, [&](Index part) {
    const Range range = PartRange(size, kLanes, part, parts);
    ForEachVector(range.begin, range.end, visit);
  });
}

// Calls visit(row) for every row, shared out among threads.
template <typename Visit>
inline void ForEachRowInParts(Index rows, Index features, int num_threads, const Visit& visit) {
  constexpr double kFlopsPerElement = 32;
  const double elements = static_cast<double>(rows) * static_cast<double>(features);
  const Index parts = UsefulParts(kFlopsPerElement * elements, num_threads);
  RunParts(parts, [&](Index part) {
    const Range range = PartRange(rows, 1, part, parts);
    for (Index row = range.begin; row < range.end; ++row) visit(row);
  });
}

}  // namespace
}  // namespace FEDSPINE_TARGET
}  // namespace fedspine

#endif  // FEDSPINE_CSRC_ELEMENTWISE_INL_H_
