// The thin SIMD wrapper: one vector type V of kLanes floats and the dozen operations the kernels
// use.
//
// Included inside a target's translation unit, which defines FEDSPINE_TARGET (a namespace) and
// FEDSPINE_LANES and is compiled with that target's flags. GCC's and clang's vector extensions
// carry the arithmetic; -ffp-contract=fast turns a * b + c into the FMA. Nothing here, nor in the
// -inl.h files, calls an inline function of the standard library: the linker could pick this
// target's copy of it for code that must run on any CPU.
#ifndef FEDSPINE_CSRC_SIMD_H_
#define FEDSPINE_CSRC_SIMD_H_

#include "parallel.h"

#if FEDSPINE_LANES > 4
#include <immintrin.h>
#endif

#define FEDSPINE_INLINE __attribute__((always_inline)) inline
#if defined(__clang__)
#define FEDSPINE_UNROLL(n) _Pragma("unroll")
#else
#define FEDSPINE_STRINGIFY(text) #text
#define FEDSPINE_UNROLL(n) _Pragma(FEDSPINE_STRINGIFY(GCC unroll n))
#endif

namespace fedspine {
namespace FEDSPINE_TARGET {
namespace {

constexpr Index kLanes = FEDSPINE_LANES;
typedef float V __attribute__((vector_size(FEDSPINE_LANES * 4)));
typedef int Bits __attribute__((vector_size(FEDSPINE_LANES * 4)));
typedef unsigned UnsignedBits __attribute__((vector_size(FEDSPINE_LANES * 4)));
typedef float UnalignedV __attribute__((vector_size(FEDSPINE_LANES * 4), aligned(4), may_alias));

#if FEDSPINE_LANES == 16
// A mask of all: gcc 12 warns of what its unmasked intrinsics leave undefined, and drops the mask.
constexpr __mmask16 kAllLanes = 0xffff;
#endif

// Largest register tile, rows x vectors: what fits the register file without a spill.
#if FEDSPINE_LANES == 16
constexpr int kTileRows = 14;
constexpr int kTileVectors = 2;
#elif defined(__aarch64__)
constexpr int kTileRows = 5;
constexpr int kTileVectors = 4;
#else
constexpr int kTileRows = 6;
constexpr int kTileVectors = 2;
#endif

constexpr Index Min(Index a, Index b) { return a < b ? a : b; }
constexpr Index RoundUp(Index value, Index unit) { return (value + unit - 1) / unit * unit; }

FEDSPINE_INLINE V Load(const float* from) { return *reinterpret_cast<const UnalignedV*>(from); }
FEDSPINE_INLINE void Store(V value, float* to) { *reinterpret_cast<UnalignedV*>(to) = value; }
FEDSPINE_INLINE void Prefetch(const float* from) { __builtin_prefetch(from); }
FEDSPINE_INLINE V Broadcast(float value) { return value - V{}; }
FEDSPINE_INLINE V MultiplyAdd(V a, V b, V sum) { return a * b + sum; }
FEDSPINE_INLINE V Absolute(V value) {
  return reinterpret_cast<V>(reinterpret_cast<Bits>(value) & 0x7fffffff);
}

// The first `count` lanes, 0 < count <= kLanes; the others are zero and their memory is not
// touched.
FEDSPINE_INLINE V LoadFirst(const float* from, Index count) {
#if FEDSPINE_LANES == 16
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
#else
  V value = {};
  for (Index lane = 0; lane < count; ++lane) value[lane] = from[lane];
  return value;
#endif
}

FEDSPINE_INLINE void StoreFirst(V value, float* to, Index count) {
#if FEDSPINE_LANES == 16
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), value);
#elif FEDSPINE_LANES == 8
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  _mm256_maskstore_ps(to, _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lanes),
                      value);
#else
  for (Index lane = 0; lane < count; ++lane) to[lane] = value[lane];
#endif
}

// a0 b0 a1 b1 ... of the lower, or the upper, halves.
#if FEDSPINE_LANES == 16
FEDSPINE_INLINE V ZipLow(V a, V b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
FEDSPINE_INLINE V ZipHigh(V a, V b) {
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15,
                                 31);
}
#elif FEDSPINE_LANES == 8
FEDSPINE_INLINE V ZipLow(V a, V b) {
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
}
FEDSPINE_INLINE V ZipHigh(V a, V b) {
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}
#else
FEDSPINE_INLINE V ZipLow(V a, V b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
FEDSPINE_INLINE V ZipHigh(V a, V b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
#endif

// Transposes kLanes x kLanes in registers: log2(kLanes) rounds of a perfect shuffle of the rows.
FEDSPINE_INLINE void Transpose(V (&rows)[kLanes]) {
  FEDSPINE_UNROLL(4)
  for (Index round = 1; round < kLanes; round *= 2) {
    V next[kLanes];
    FEDSPINE_UNROLL(16)
    for (Index row = 0; row < kLanes / 2; ++row) {
      next[2 * row] = ZipLow(rows[row], rows[row + kLanes / 2]);
      next[2 * row + 1] = ZipHigh(rows[row], rows[row + kLanes / 2]);
    }
    FEDSPINE_UNROLL(16)
    for (Index row = 0; row < kLanes; ++row) rows[row] = next[row];
  }
}

// 2^exponent for exponents of -126 to 127; of any others, some number or other.
FEDSPINE_INLINE V PowerOfTwo(Bits exponent) {
  return reinterpret_cast<V>((reinterpret_cast<UnsignedBits>(exponent) + 127u) << 23);
}

// e^x as mantissa * 2^exponent, for x within +-2^21: x = n ln 2 + r with |r| <= ln 2 / 2; e^r is
// Taylor's polynomial of degree 7, whose rest is below a tenth of an ulp.
struct SplitExp {
  V mantissa;
  Bits exponent;
};

FEDSPINE_INLINE SplitExp ExpParts(V x) {
  constexpr float kLog2E = 1.44269504f;
  constexpr float kLn2High = 0.693359375f;  // Nine bits, so that its product with n is exact.
  constexpr float kLn2Low = -2.12194440e-4f;
  constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23: a sum with it has no fraction bits.
  const V shifted = x * kLog2E + kToInteger;
  const V n = shifted - kToInteger;
  const V r = x - n * kLn2High - n * kLn2Low;
  V sum = r * (1.0f / 5040) + 1.0f / 720;
  sum = sum * r + 1.0f / 120;
  sum = sum * r + 1.0f / 24;
  sum = sum * r + 1.0f / 6;
  sum = sum * r + 0.5f;
  sum = sum * (r * r) + r + 1.0f;
  return {sum, reinterpret_cast<Bits>(shifted) - reinterpret_cast<Bits>(Broadcast(kToInteger))};
}

// e^x to 2 ulp, denormal results to one more of their steps: 0 below -104, infinity above 89, NaN
// of NaN.
FEDSPINE_INLINE V Exp(V x) {
  x = x < -104.0f ? Broadcast(-104.0f) : x;  // A NaN is neither below nor above.
  x = x > 89.0f ? Broadcast(89.0f) : x;
  const SplitExp parts = ExpParts(x);
  // Two steps, because 2^n alone may be out of range where the product is not.
  const Bits half = parts.exponent >> 1;
  return parts.mantissa * PowerOfTwo(half) * PowerOfTwo(parts.exponent - half);
}

// Sum of the lanes, always in the same order.
FEDSPINE_INLINE float SumLanes(V value) {
  float sum = 0;
  FEDSPINE_UNROLL(16)
  for (Index lane = 0; lane < kLanes; ++lane) sum += value[lane];
  return sum;
}

}  // namespace
}  // namespace FEDSPINE_TARGET
}  // namespace fedspine

#endif  // FEDSPINE_CSRC_SIMD_H_
