// Masks of dropout for one target; dropout.h says which.
#ifndef FEDSPINE_CSRC_DROPOUT_INL_H_
#define FEDSPINE_CSRC_DROPOUT_INL_H_

#include "dropout.h"
#include "gemm-inl.h"

namespace fedspine {
namespace FEDSPINE_TARGET {
namespace {

// ---------------------------------------------------------------------------------------

constexpr int kPhiloxLanes = 8;  // Tokens whose words are drawn together.
constexpr int kPhiloxWords = 4;

// The factors of values 4 group to 4 group + 3 of tokens `token` to `token` + 7: 0 or keep_scale.
struct KeepFactors {
  float of[kPhiloxWords][kPhiloxLanes];
};

inline KeepFactors DrawFactors(const Dropout& dropout, Index token, Index group) {
  std::uint32_t words[kPhiloxWords][kPhiloxLanes] = {};
  for (int lane = 0; lane < kPhiloxLanes; ++lane) {
    words[0][lane] = static_cast<std::uint32_t>(token + lane);
    words[1][lane] = static_cast<std::uint32_t>(group);
  }
  std::uint32_t key0 = dropout.key[0], key1 = dropout.key[1];
  for (int round = 0; round < 10; ++round) {
    for (int lane = 0; lane < kPhiloxLanes; ++lane) {
      const std::uint64_t even = std::uint64_t{0xD2511F53} * words[0][lane];
      const std::uint64_t odd = std::uint64_t{0xCD9E8D57} * words[2][lane];
      words[0][lane] = static_cast<std::uint32_t>(odd >> 32) ^ words[1][lane] ^ key0;
      words[1][lane] = static_cast<std::uint32_t>(odd);
      words[2][lane] = static_cast<std::uint32_t>(even >> 32) ^ words[3][lane] ^ key1;
      words[3][lane] = static_cast<std::uint32_t>(even);
    }
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  KeepFactors factors;
  for (int word = 0; word < kPhiloxWords; ++word) {
    for (int lane = 0; lane < kPhiloxLanes; ++lane) {
      factors.of[word][lane] = words[word][lane] < dropout.threshold ? 0 : dropout.keep_scale;
    }
  }
  return factors;
}

// Multiplies the values of tokens `tokens`; that of rank r and the n-th token is at
// panels + r / 32 * panel_stride + r % 32 * rank_stride + n * token_stride.
struct DroppedValues {
  float* panels;
  Index panel_stride;
  Index rank_stride;
  Index token_stride;
};

inline void DropValues(const Dropout& dropout, Range tokens, Index rank,
                       const DroppedValues& values) {
  if (dropout.threshold == 0) return;
  for (Index t = tokens.begin; t < tokens.end; t += kPhiloxLanes) {
    const Index lanes = Min(kPhiloxLanes, tokens.end - t);
    for (Index r = 0; r < rank; r += kPhiloxWords) {
      const KeepFactors factors = DrawFactors(dropout, t, r / kPhiloxWords);
      float* const first = values.panels + r / kPanelWidth * values.panel_stride +
                           r % kPanelWidth * values.rank_stride +
                           (t - tokens.begin) * values.token_stride;
      for (Index word = 0; word < Min(kPhiloxWords, rank - r); ++word) {
        for (Index lane = 0; lane < lanes; ++lane) {
          first[word * values.rank_stride + lane * values.token_stride] *= factors.of[word][lane];
        }
      }
    }
  }
}

}  // namespace
}  // namespace FEDSPINE_TARGET
}  // namespace fedspine

#endif  // FEDSPINE_CSRC_DROPOUT_INL_H_
