// Cross-entropy of rows of logits, and its gradient in their place.
//
//   loss = log sum exp(logits) - logits[target]
//   logits <- scale * (softmax(logits) - onehot(target))
//
// logits[T, V] float32, compact; targets[T] int64 in [0, V); loss[T]. A row's sum runs in float32
// over a fixed number of chains of lanes: the same bits for any number of threads. T, V >= 1. A row
// with a NaN becomes NaN, and so does its loss. Needs no scratch.
#ifndef FEDSPINE_CSRC_CROSS_ENTROPY_H_
#define FEDSPINE_CSRC_CROSS_ENTROPY_H_

#include <cstdint>

#include "parallel.h"

namespace fedspine {

struct CrossEntropyArgs {
  Index tokens;   // T
  Index classes;  // V
  float* logits;
  const std::int64_t* targets;
  float scale;
  float* loss;
  int num_threads;
};

}  // namespace fedspine

#endif  // FEDSPINE_CSRC_CROSS_ENTROPY_H_
