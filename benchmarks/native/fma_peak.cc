// Multiply-adds a second of one core when nothing but registers is touched, in GF/s on stdout.
//
//   c++ -O3 -march=native -ffp-contract=fast fma_peak.cc     the machine's own widest vectors
#include <chrono>
#include <cstdio>

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kChains = 12;  // More than latency times units on any core so far; all in registers.
constexpr long kSteps = 4000000;
typedef float V __attribute__((vector_size(kLanes * 4)));

}  // namespace

int main() {
  V a = V{} + 0.999f, b = V{} + 0.001f;
  double best = 0;
  for (int run = 0; run < 9; ++run) {
    V sums[kChains];
#pragma GCC unroll 16
    for (int chain = 0; chain < kChains; ++chain) sums[chain] = V{} + static_cast<float>(chain);
    const auto start = std::chrono::steady_clock::now();
    for (long step = 0; step < kSteps; ++step) {
#pragma GCC unroll 16
      for (int chain = 0; chain < kChains; ++chain) sums[chain] = sums[chain] * a + b;
    }
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    volatile float sink = 0;
    for (const V& sum : sums) sink = sink + sum[0];
    const double flops = 2.0 * kLanes * kChains * static_cast<double>(kSteps);
    best = flops / seconds.count() > best ? flops / seconds.count() : best;
  }
  std::printf("%.1f\n", best / 1e9);
  return 0;
}
