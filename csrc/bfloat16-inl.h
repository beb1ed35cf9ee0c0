// What is kept for the backward in bfloat16: half the bytes, and 8 bits of every number.
#ifndef FEDSPINE_CSRC_BFLOAT16_INL_H_
#define FEDSPINE_CSRC_BFLOAT16_INL_H_

#include "bfloat16.h"
#include "simd.h"

namespace fedspine {
namespace FEDSPINE_TARGET {
namespace {

typedef unsigned short Halves __attribute__((vector_size(FEDSPINE_LANES * 2)));
typedef unsigned short UnalignedHalves
    __attribute__((vector_size(FEDSPINE_LANES * 2), aligned(2), may_alias));

FEDSPINE_INLINE V Widened(Halves halves) {
#if FEDSPINE_LANES == 16  // gcc converts by way of two halves.
  const auto whole = reinterpret_cast<UnsignedBits>(
      _mm512_maskz_cvtepu16_epi32(kAllLanes, reinterpret_cast<__m256i>(halves)));
#elif FEDSPINE_LANES == 8
  const auto whole =
      reinterpret_cast<UnsignedBits>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(halves)));
#else
  const UnsignedBits whole = __builtin_convertvector(halves, UnsignedBits);
#endif
  return reinterpret_cast<V>(whole << 16);
}

// The first `count` lanes, the others being zero.
FEDSPINE_INLINE V LoadKept(const Bfloat16* from, Index count) {
  if (count == kLanes) return Widened(*reinterpret_cast<const UnalignedHalves*>(from));
  Halves halves = {};
  for (Index lane = 0; lane < count; ++lane) halves[lane] = from[lane];
  return Widened(halves);
}

// Rounds to the nearest, ties to even; NaN stays NaN.
FEDSPINE_INLINE void StoreKept(V value, Bfloat16* to, Index count) {
  const UnsignedBits bits = reinterpret_cast<UnsignedBits>(value);
  const UnsignedBits rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const Halves halves =
      __builtin_convertvector(value == value ? rounded : bits >> 16 | 0x40u, Halves);
  if (count == kLanes) {
    *reinterpret_cast<UnalignedHalves*>(to) = halves;
  } else {
    for (Index lane = 0; lane < count; ++lane) to[lane] = halves[lane];
  }
}

}  // namespace
}  // namespace FEDSPINE_TARGET
}  // namespace fedspine

#endif  // FEDSPINE_CSRC_BFLOAT16_INL_H_
