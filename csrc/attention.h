// Softmax attention that stores no probabilities, forward and backward.
//
//   s = scale * rope(q) rope(k)^T + bias      p = softmax(s) over the keys a query sees
//   out = p v                                 lse = log sum exp(s)
//   ds = p * (dout v^T - rowsum(dout * out))  dv = p^T dout,  dq = scale * ds k,  dk = scale * ds^T
//   q
//
// q, out [B, T, H, D]; k, v [B, T, G, D]; H is a multiple of G and query head h reads KV head
// h / (H / G). lse [B, H, T]. All float32 and compact. The backward computes s again from q, k and
// lse.
//
// Keys: those with `valid` set (all when null), and of these, when `causal`, those at or before the
// query. Absent keys are left out when k and v are packed: they cost nothing, and whatever they
// hold, NaN included, reaches no output; their dk and dv are zero. A query that sees no key gets
// zeros, and gives none a gradient. A NaN anywhere else goes where the formulas take it.
//
// Rotation (null for none): rope(x)[i] = x[i] cos[i] - x[i + D/2] sin[i] for i < D/2, and
// x[i] cos[i] + x[i - D/2] sin[i] beyond. D is even then.
//
// Sums run in float32 in ascending order, keys in blocks with a running maximum; a KV head of a row
// of the batch is one thread's: the same bits for any number of threads. B, T, H, G, D >= 1.
// Outputs must not overlap inputs or each other. Scratch is aligned to 64 bytes.
#ifndef FEDSPINE_CSRC_ATTENTION_H_
#define FEDSPINE_CSRC_ATTENTION_H_

#include "parallel.h"

namespace fedspine {

struct AttentionShape {
  Index batch;     // B
  Index tokens;    // T
  Index heads;     // H
  Index kv_heads;  // G
  Index head_dim;  // D
};

// What the forward and the backward both read.
struct AttentionInputs {
  AttentionShape shape;
  const float* q;
  const float* k;
  const float* v;
  const float* cos;            // [T, D] or [B, T, D], null for no rotation.
  const float* sin;            // The same.
  Index rotation_stride;       // Floats from a row of the batch to the next: 0 or T D.
  const float* bias;           // [H, T, T], finite; null for none. It gets no gradient.
  const unsigned char* valid;  // [B, T], 0 where a key is absent; null when none is.
  float scale;
  bool causal;
  int num_threads;
};

struct AttentionForwardArgs {
  AttentionInputs in;
  float* out;
  float* lse;  // Null when not wanted.
};

struct AttentionBackwardArgs {
  AttentionInputs in;
  const float* out;   // The forward's.
  const float* lse;   // The forward's.
  const float* dout;  // [B, T, H, D]
  float* dq;          // [B, T, H, D]
  float* dk;          // [B, T, G, D]
  float* dv;          // [B, T, G, D]
};

}  // namespace fedspine

#endif  // FEDSPINE_CSRC_ATTENTION_H_
