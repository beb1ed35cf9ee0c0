// Dropout of the low-rank values x A^T, whose mask is a function of its place and is never stored.
//
// Value r of token t is kept when word r % 4 of Philox4x32-10 (Salmon et al., SC 2011) at counter
// (t, r / 4, 0, 0) is at least `threshold`; kept values are multiplied by `keep_scale`. Forward and
// backward draw the same mask from the same key, in any order and on any number of threads.
#ifndef FEDSPINE_CSRC_DROPOUT_H_
#define FEDSPINE_CSRC_DROPOUT_H_

#include <cstdint>

namespace fedspine {

struct Dropout {
  std::uint32_t threshold;  // rate * 2^32; 0 keeps everything.
  float keep_scale;         // 1 / (1 - rate)
  std::uint32_t key[2];
};

}  // namespace fedspine

#endif  // FEDSPINE_CSRC_DROPOUT_H_
