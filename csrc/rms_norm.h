// Root mean square normalisation with a frozen weight, forward and backward.
//
//   rstd = 1 / sqrt(mean(x^2) + epsilon)      y = x * rstd * w      x[T, I]  w[I]  rstd[T]  y[T, I]
//   dx = rstd * (w dy - x * rstd^2 * mean(w dy x))
//
// float32, row-major, compact. A row's sum runs in float32 over a fixed number of chains of lanes,
// in the same order whatever the thread: the same bits for any number of threads. T, I >= 1. NaN
// and infinity go where the formulas take them. Outputs must not overlap inputs or each other.
// Needs no scratch.
#ifndef FEDSPINE_CSRC_RMS_NORM_H_
#define FEDSPINE_CSRC_RMS_NORM_H_

#include "parallel.h"

namespace fedspine {

struct RmsNormForwardArgs {
  Index tokens;    // T
  Index features;  // I
  const float* x;
  const float* weight;
  float epsilon;
  float* y;
  float* rstd;  // Null when not wanted.
  int num_threads;
};

struct RmsNormBackwardArgs {
  Index tokens;
  Index features;
  const float* dy;  // [T, I]
  const float* x;
  const float* weight;
  const float* rstd;  // The forward's.
  float* dx;          // [T, I]
  int num_threads;
};

}  // namespace fedspine

#endif  // FEDSPINE_CSRC_RMS_NORM_H_
