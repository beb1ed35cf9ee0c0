// Work split into parts that do not depend on each other.
//
// Contract: a kernel's result never depends on how many parts there are or which thread runs one; a
// part writes only what no other part touches. The pool is that of the OpenMP runtime which the
// process has loaded: torch's, because a second pool would fight it for the cores; without one, the
// system's libgomp; without that, the calling thread.
#ifndef FEDSPINE_CSRC_PARALLEL_H_
#define FEDSPINE_CSRC_PARALLEL_H_

#include <cstddef>

namespace fedspine {

using Index = std::ptrdiff_t;

// Half-open range of a part.
struct Range {
  Index begin;
  Index end;
};

// Calls task(context, part) once for every part in [0, num_parts), on up to num_parts threads; with
// one part, on the calling thread. Returns when all are done.
void RunParts(Index num_parts, void (*task)(const void* context, Index part), const void* context);

// The same for a callable taking the part. `task` must not throw.
template <typename Task>
void RunParts(Index num_parts, const Task& task) {
  RunParts(
      num_parts,
      [](const void* context, Index part) { (*static_cast<const Task*>(context))(part); }, &task);
}

// The two below are static because every target's unit has its own copy, compiled with its own
// flags.

// The part-th of num_parts nearly equal ranges of [0, size), each boundary a multiple of `unit`.
static constexpr Range PartRange(Index size, Index unit, Index part, Index num_parts) {
  const Index units = (size + unit - 1) / unit;
  const Index begin = units * part / num_parts * unit;
  const Index end = units * (part + 1) / num_parts * unit;
  return {begin < size ? begin : size, end < size ? end : size};
}

// Parts worth waking threads for: 1 when the work takes less than a wake-up costs.
static constexpr Index UsefulParts(double flops, int num_threads) {
  constexpr double kFlopsPerThread = 1e6;  // About 10 us of one core; a fork and join takes 2 to 5.
  const double parts = flops / kFlopsPerThread;
  return parts < 2 ? 1 : parts < num_threads ? static_cast<Index>(parts) : num_threads;
}

}  // namespace fedspine

#endif  // FEDSPINE_CSRC_PARALLEL_H_
