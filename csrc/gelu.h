// The Gaussian error linear unit, forward and backward.
//
//   y = x P(x),  P(x) = (1 + erf(x / sqrt(2))) / 2      dx = dy (P(x) + x exp(-x^2 / 2) / sqrt(2
//   pi))
//
// float32, N consecutive elements each, N >= 1; nothing is summed, so threads cannot change a bit.
// The backward needs x alone, and takes it as the forward kept it: rounded to bfloat16. GeluAgain
// computes y from that. NaN gives NaN. Outputs must not overlap inputs or each other. No scratch.
#ifndef FEDSPINE_CSRC_GELU_H_
#define FEDSPINE_CSRC_GELU_H_

#include "bfloat16.h"
#include "parallel.h"

namespace fedspine {

struct GeluForwardArgs {
  Index size;  // N
  const float* x;
  float* y;
  Bfloat16* kept;  // Null when not wanted.
  int num_threads;
};

struct GeluAgainArgs {
  Index size;
  const Bfloat16* x;
  float* y;
  int num_threads;
};

struct GeluBackwardArgs {
  Index size;
  const float* dy;
  const Bfloat16* x;
  float* dx;
  int num_threads;
};

}  // namespace fedspine

#endif  // FEDSPINE_CSRC_GELU_H_
