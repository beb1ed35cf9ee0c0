// The Gaussian error linear unit for one target; gelu.h holds the contract.
#ifndef FEDSPINE_CSRC_GELU_INL_H_
#define FEDSPINE_CSRC_GELU_INL_H_

#include "bfloat16-inl.h"
#include "elementwise-inl.h"
#include "gelu.h"

namespace fedspine {
namespace FEDSPINE_TARGET {
namespace {

// P(x), such that x P(x) is right to 2 ulp above zero and to 5e-8 below. Near the middle
// (1 + erf(t)) / 2 with t = x / sqrt(2) and an odd polynomial for erf; beyond, erfc(|t|) is the
// exponential of a polynomial, which keeps the lower tail where 1 + erf(t) would cancel.
// Coefficients: Norbert Juffa's erff (https://stackoverflow.com/a/35148199).
FEDSPINE_INLINE V NormalBelow(V x) {
  const V a = x * 0.70710678f, t = Absolute(a), s = a * a;
  V middle = -5.96761703e-4f * s + 4.99119423e-3f;
  middle = middle * s - 2.67681349e-2f;
  middle = middle * s + 1.12819925e-1f;
  middle = middle * s - 3.76125336e-1f;
  middle = middle * s + 1.28379166e-1f;
  middle = (middle * a + a) * 0.5f + 0.5f;
  V tail = -1.72853470e-5f * t + 3.83197126e-4f;
  tail = tail * s + (-3.88396438e-3f * t + 2.42546219e-2f);
  tail = tail * t - 1.06777877e-1f;
  tail = tail * t - 6.34846687e-1f;
  tail = tail * t - 1.28717512e-1f;
  const V capped = t < 9.5f ? tail * t - t : Broadcast(-100.0f);  // The polynomial turns up again.
  const V below = Exp(capped) * 0.5f;
  const V outside = a < 0.0f ? below : 1.0f - below;
  return t > 0.927734375f ? outside : middle;  // NaN is not above: the middle passes it on.
}

inline void GeluForward(const GeluForwardArgs& args) {
  ForEachVectorInParts(args.size, args.num_threads, [&](Index i, Index count) {
    const V x = LoadUpTo(args.x + i, count);
    StoreUpTo(x * NormalBelow(x), args.y + i, count);
    if (args.kept != nullptr) StoreKept(x, args.kept + i, count);
  });
}

inline void GeluAgain(const GeluAgainArgs& args) {
  ForEachVectorInParts(args.size, args.num_threads, [&](Index i, Index count) {
    const V x = LoadKept(args.x + i, count);
    StoreUpTo(x * NormalBelow(x), args.y + i, count);
  });
}

inline void GeluBackward(const GeluBackwardArgs& args) {
  constexpr float kDensityAtZero = 0.39894228f;  // 1 / sqrt(2 pi)
  ForEachVectorInParts(args.size, args.num_threads, [&](Index i, Index count) {
    const V x = LoadKept(args.x + i, count);
    const V slope = NormalBelow(x) + x * kDensityAtZero * Exp(x * x * -0.5f);
    StoreUpTo(LoadUpTo(args.dy + i, count) * slope, args.dx + i, count);
  });
}

}  // namespace
}  // namespace FEDSPINE_TARGET
}  // namespace fedspine

#endif  // FEDSPINE_CSRC_GELU_INL_H_
