// The gate of a gated feed-forward block, forward and backward.
//
//   s = 1 / (1 + exp(-gate))      y = gate * s * up
//   dgate = dy * up * s * (1 + gate * (1 - s))      dup = dy * gate * s
//
// float32, N consecutive elements each, N >= 1; nothing is summed, so threads cannot change a bit.
// The backward needs gate and up alone, and takes them as the forward kept them: rounded to
// bfloat16. SwigluAgain computes y from these. A gate below -89 gives s = 0; NaN goes where the
// formulas take it. Outputs must not overlap inputs or each other. Needs no scratch.
#ifndef FEDSPINE_CSRC_SWIGLU_H_
#define FEDSPINE_CSRC_SWIGLU_H_

#include "bfloat16.h"
#include "parallel.h"

namespace fedspine {

struct SwigluForwardArgs {
  Index size;  // N
  const float* gate;
  const float* up;
  float* y;
  Bfloat16* kept_gate;  // Null, like the next, when not wanted.
  Bfloat16* kept_up;
  int num_threads;
};

struct SwigluAgainArgs {
  Index size;
  const Bfloat16* gate;
  const Bfloat16* up;
  float* y;
  int num_threads;
};

struct SwigluBackwardArgs {
  Index size;
  const float* dy;
  const Bfloat16* gate;
  const Bfloat16* up;
  float* dgate;
  float* dup;
  int num_threads;
};

}  // namespace fedspine

#endif  // FEDSPINE_CSRC_SWIGLU_H_
