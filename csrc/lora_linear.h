// A frozen linear layer with a trainable low-rank pair, forward and backward.
//
//   y = x W^T + bias + s D(x A^T) B^T     x[T, I]  W[O, I] packed  A[R, I]  B[O, R]  bias[O]  y[T,
//   O]
//
// D is dropout of the low-rank values (dropout.h), nothing when its threshold is 0.
// float32 but for W (packed_weight.h), row-major, compact; products are accumulated in float32, one
// lane an element, in ascending order of the summed index, so results are bitwise the same for any
// number of threads (targets may differ from each other in the last bits). T, I, O >= 1; R >= 0.
// Outputs must not overlap inputs or each other. Nothing is allocated: `scratch` holds as many
// floats as the *Scratch function says, aligned to 64 bytes.
#ifndef FEDSPINE_CSRC_LORA_LINEAR_H_
#define FEDSPINE_CSRC_LORA_LINEAR_H_

#include "dropout.h"
#include "packed_weight.h"

namespace fedspine {

struct LinearShape {
  Index tokens;        // T
  Index in_features;   // I
  Index out_features;  // O
  Index rank;          // R; 0 for no low-rank pair.
};

struct LoraLinearForwardArgs {
  LinearShape shape;
  const float* x;
  PackedWeight weight;
  const float* bias;    // Null for none.
  const float* lora_a;  // Null when R is 0.
  const float* lora_b;
  float scaling;
  float* y;
  float* hidden;  // [T, R]: scaling * D(x A^T), for the backward; null when not wanted.
  Dropout dropout;
  int num_threads;
};

struct LoraLinearBackwardArgs {
  LinearShape shape;
  const float* dy;  // [T, O]
  const float* x;   // May be null when dlora_a is.
  PackedWeight weight;
  const float* lora_a;
  const float* lora_b;
  const float* hidden;  // The forward's; may be null when dlora_b is.
  float scaling;
  float* dx;        // [T, I], null when not wanted.
  float* dlora_a;   // [R, I], null when not wanted.
  float* dlora_b;   // [O, R], null when not wanted.
  Dropout dropout;  // The forward's.
  int num_threads;
};

}  // namespace fedspine

#endif  // FEDSPINE_CSRC_LORA_LINEAR_H_
