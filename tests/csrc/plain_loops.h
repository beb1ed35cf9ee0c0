// What the tests of the kernels share: random numbers, plain products in double, comparison.
#ifndef FEDSPINE_TESTS_CSRC_PLAIN_LOOPS_H_
#define FEDSPINE_TESTS_CSRC_PLAIN_LOOPS_H_

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "isa.h"

using fedspine::Index;
using Floats = std::vector<float>;
using Doubles = std::vector<double>;

inline int failures = 0;

inline void Fail(const std::string& what) {
  std::printf("FAIL %s %s\n", fedspine::Kernels().name, what.c_str());
  ++failures;
}

inline std::size_t Size(Index count) { return static_cast<std::size_t>(count); }

// Normal values by Marsaglia's polar method. std::normal_distribution computes logarithms in quad
// precision, for which AArch64 has no instruction: with clang 20 times the instructions of a test.
inline Floats Draw(Index count, unsigned seed) {
  std::mt19937 engine(seed);
  const auto uniform = [&engine] { return 2 * static_cast<float>(engine() >> 8) * 0x1p-24f - 1; };
  Floats values(Size(count));
  for (float& value : values) {
    float x, square;
    do {
      x = uniform();
      const float y = uniform();
      square = x * x + y * y;
    } while (square >= 1 || square == 0);
    value = x * std::sqrt(-2 * std::log(square) / square);
  }
  return values;
}

// [n, m] -> [m, n]
inline Doubles Transposed(const Doubles& a, Index n, Index m) {
  Doubles out(a.size());
  for (Index i = 0; i < n; ++i) {
    for (Index j = 0; j < m; ++j) out[Size(j * n + i)] = a[Size(i * m + j)];
  }
  return out;
}

// [n, k] x [k, m] -> [n, m]
inline Doubles Product(const Doubles& a, const Doubles& b, Index n, Index k, Index m) {
  Doubles out(Size(n * m), 0.0);
  for (Index i = 0; i < n; ++i) {
    for (Index l = 0; l < k; ++l) {
      for (Index j = 0; j < m; ++j) out[Size(i * m + j)] += a[Size(i * k + l)] * b[Size(l * m + j)];
    }
  }
  return out;
}

// Philox4x32-10 of one counter.
inline std::array<std::uint32_t, 4> Philox(std::array<std::uint32_t, 4> counter, std::uint32_t key0,
                                           std::uint32_t key1) {
  for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u) {
    const std::uint64_t even = std::uint64_t{0xD2511F53} * counter[0];
    const std::uint64_t odd = std::uint64_t{0xCD9E8D57} * counter[2];
    counter = {static_cast<std::uint32_t>(odd >> 32) ^ counter[1] ^ key0,
               static_cast<std::uint32_t>(odd),
               static_cast<std::uint32_t>(even >> 32) ^ counter[3] ^ key1,
               static_cast<std::uint32_t>(even)};
  }
  return counter;
}

// What dropout multiplies [tokens, rank] values by.
inline Doubles DropoutFactors(const fedspine::Dropout& dropout, Index tokens, Index rank) {
  Doubles factors(Size(tokens * rank));
  for (Index t = 0; t < tokens; ++t) {
    for (Index r = 0; r < rank; ++r) {
      const std::uint32_t word =
          Philox({static_cast<std::uint32_t>(t), static_cast<std::uint32_t>(r / 4), 0, 0},
                 dropout.key[0], dropout.key[1])[Size(r % 4)];
      factors[Size(t * rank + r)] =
          word < dropout.threshold ? 0 : static_cast<double>(dropout.keep_scale);
    }
  }
  return factors;
}

inline Doubles Times(Doubles values, const Doubles& factors) {
  for (std::size_t i = 0; i < values.size(); ++i) values[i] *= factors[i];
  return values;
}

inline void Add(Doubles* sum, const Doubles& other, double scale) {
  for (std::size_t i = 0; i < sum->size(); ++i) (*sum)[i] += scale * other[i];
}

inline Doubles ToDouble(const Floats& values) { return Doubles(values.begin(), values.end()); }

// Float32 sums of `depth` terms of size 1 are off by about sqrt(depth) ulp; 1e-5 leaves a factor
// of 10.
inline void ExpectClose(const Floats& found, const Doubles& expected, const std::string& what) {
  double largest = 1e-30;
  double error = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    largest = std::max(largest, std::fabs(expected[i]));
    const double difference = std::fabs(static_cast<double>(found[i]) - expected[i]);
    if (!(difference <= error)) error = difference;  // Keeps a NaN.
  }
  if (!(error <= 1e-5 * largest)) Fail(what + " error " + std::to_string(error / largest));
}

// Scratch of exactly the announced size, aligned as the contract says.
class Scratch {
 public:
  explicit Scratch(Index floats)
      : memory_(static_cast<float*>(::operator new(Size(floats) * sizeof(float), kAlignment))) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { ::operator delete(memory_, kAlignment); }
  float* get() const { return memory_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  float* memory_;
};

#endif  // FEDSPINE_TESTS_CSRC_PLAIN_LOOPS_H_
