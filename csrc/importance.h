// Importance of a LoRA'd matrix's rows or columns, from its factors and their gradients.
//
//   G = [dB, B] . [A - dA ; dA]      S = |G * (W + s B A)|      out = row sums or column sums of S
//
// A sample of the sums' terms may do: of the other side's features, in blocks of 32, those blocks b
// with b % n == phase % n, n being the smaller of `share` and the number of blocks. Share 1 takes
// all.
// W[O, I] packed (packed_weight.h); A, dA [R, I]; B, dB [O, R]; float32, row-major, compact.
// Neither G nor S is ever stored: both live in tiles. A sum runs in float32 over at most 64 terms,
// then in double, in a fixed order: the same result for any number of threads. R >= 1. Nothing is
// allocated; `scratch` as in lora_linear.h.
#ifndef FEDSPINE_CSRC_IMPORTANCE_H_
#define FEDSPINE_CSRC_IMPORTANCE_H_

#include "lora_linear.h"

namespace fedspine {

struct ImportanceArgs {
  LinearShape shape;  // Without tokens.
  PackedWeight weight;
  const float* lora_a;
  const float* lora_b;
  const float* dlora_a;
  const float* dlora_b;
  float scaling;
  bool by_output;  // Scores of outputs (rows) or of inputs (columns).
  Index share;     // At least 1.
  Index phase;     // At least 0.
  float* out;      // [O] or [I]
  int num_threads;
};

}  // namespace fedspine

#endif  // FEDSPINE_CSRC_IMPORTANCE_H_
