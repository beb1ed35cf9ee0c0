// The sum of two rows, normalised, with a frozen weight and bias, forward and backward.
//
//   z = x + residual      n = (z - mean(z)) rstd,  rstd = 1 / sqrt(var(z) + epsilon)
//   y = n w + b           dz = rstd (w dy - mean(w dy) - n mean(w dy n)),  the gradient of both
//
// x, residual, y[T, I]  w, b[I]  rstd[T], float32, row-major, compact. The backward takes n as the
// forward kept it: rounded to bfloat16. LayerNormAgain computes y from that. A row's sums run in
// float32 over a fixed number of chains of lanes, in the same order whatever the thread. T, I >= 1.
// NaN and infinity go where the formulas take them. Outputs must not overlap inputs or each other.
// Needs no scratch.
#ifndef FEDSPINE_CSRC_LAYER_NORM_H_
#define FEDSPINE_CSRC_LAYER_NORM_H_

#include "bfloat16.h"
#include "parallel.h"

namespace fedspine {

struct LayerNormForwardArgs {
  Index tokens;    // T
  Index features;  // I
  const float* x;
  const float* residual;  // Null for none.
  const float* weight;
  const float* bias;
  float epsilon;
  float* y;
  Bfloat16* kept;  // n: [T, I]; null, like the next, when not wanted.
  float* rstd;
  int num_threads;
};

struct LayerNormAgainArgs {
  Index tokens;
  Index features;
  const Bfloat16* normalised;
  const float* weight;
  const float* bias;
  float* y;
  int num_threads;
};

struct LayerNormBackwardArgs {
  Index tokens;
  Index features;
  const float* dy;             // [T, I]
  const Bfloat16* normalised;  // The forward's.
  const float* weight;
  const float* rstd;  // The forward's.
  float* dz;          // [T, I]
  int num_threads;
};

}  // namespace fedspine

#endif  // FEDSPINE_CSRC_LAYER_NORM_H_
