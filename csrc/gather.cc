#include "gather.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "bfloat16.h"

namespace fedspine {
namespace {

// Memory-bound work: an element moved counts as this many flops when threads are considered.
constexpr double kFlopsPerElement = 8;

Index PartsFor(Index elements, int num_threads) {
  return UsefulParts(kFlopsPerElement * static_cast<double>(elements), num_threads);
}

Index Kept(const std::int64_t* keep, Index index) {
  return keep == nullptr ? index : static_cast<Index>(keep[index]);
}

// How a row's elements are stored, and what they stand for.
struct Float32Format {
  using Element = float;
  static Element Store(float value, float /*scale*/) { return value; }
  static float Load(Element element, float /*scale*/) { return element; }
};

struct Bfloat16Format {
  using Element = Bfloat16;
  static Element Store(float value, float /*scale*/) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    // To the nearest, ties to even; NaN stays NaN.
    const std::uint32_t rounded =
        std::isnan(value) ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1u);
    return static_cast<Element>(rounded >> 16);
  }
  static float Load(Element element, float /*scale*/) {
    const std::uint32_t bits = static_cast<std::uint32_t>(element) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }
};

struct Int8Format {
  using Element = std::int8_t;
  static constexpr float kLargest = 127;
  static Element Store(float value, float scale) {
    if (!(scale > 0)) return 0;  // A row of zeros, or one that holds a NaN.
    // A subnormal scale is coarse: its quotient may be beyond the largest code.
    const float code = std::nearbyint(value / scale);
    return static_cast<Element>(std::min(std::max(code, -kLargest), kLargest));
  }
  static float Load(Element element, float scale) { return static_cast<float>(element) * scale; }
};

// The scale of a row of int8: NaN when an element is not finite.
float RowScale(const KeptMatrix& weight, const float* from) {
  float largest = 0;
  for (Index column = 0; column < weight.columns; ++column) {
    const float value = std::fabs(from[Kept(weight.keep_columns, column)]);
    if (!std::isfinite(value)) return std::nanf("");
    largest = std::max(largest, value);
  }
  return largest / Int8Format::kLargest;
}

template <typename Format>
void Pack(const KeptMatrix& weight, typename Format::Element* panels, float* scales, Range range) {
  // Columns in this many steps keep the part of the panel being written in the first-level cache.
  constexpr Index kColumnStep = 64;
  for (Index first = range.begin; first < range.end; first += kPanelWidth) {
    typename Format::Element* const panel = panels + first * weight.columns;
    const Index rows = std::min(kPanelWidth, weight.rows - first);
    if (rows < kPanelWidth) {
      std::fill_n(panel, weight.columns * kPanelWidth, typename Format::Element{});
    }
    const auto row_of = [&](Index row) {
      return weight.data + Kept(weight.keep_rows, first + row) * weight.stride;
    };
    float scale[kPanelWidth] = {};
    if (scales != nullptr) {
      for (Index row = 0; row < rows; ++row) scale[row] = RowScale(weight, row_of(row));
      std::copy_n(scale, kPanelWidth, scales + first);
    }
    for (Index begin = 0; begin < weight.columns; begin += kColumnStep) {
      const Index end = std::min(begin + kColumnStep, weight.columns);
      for (Index row = 0; row < rows; ++row) {
        const float* const from = row_of(row);
        for (Index column = begin; column < end; ++column) {
          panel[column * kPanelWidth + row] =
              Format::Store(from[Kept(weight.keep_columns, column)], scale[row]);
        }
      }
    }
  }
}

template <typename Format>
void Unpack(const PackedWeight& packed, Index in_features, float* weight, Range range) {
  const auto* const panels = static_cast<const typename Format::Element*>(packed.panels);
  for (Index row = range.begin; row < range.end; ++row) {
    const auto* const from =
        panels + row / kPanelWidth * kPanelWidth * in_features + row % kPanelWidth;
    const float scale = packed.scales == nullptr ? 1 : packed.scales[row];
    for (Index column = 0; column < in_features; ++column) {
      weight[row * in_features + column] = Format::Load(from[column * kPanelWidth], scale);
    }
  }
}

}  // namespace

void Gather(const KeptMatrix& matrix, float* out, int num_threads) {
  const Index parts = PartsFor(matrix.rows * matrix.columns, num_threads);
  RunParts(parts, [&](Index part) {
    const Range range = PartRange(matrix.rows, 1, part, parts);
    for (Index row = range.begin; row < range.end; ++row) {
      const float* from = matrix.data + Kept(matrix.keep_rows, row) * matrix.stride;
      float* to = out + row * matrix.columns;
      if (matrix.keep_columns == nullptr) {
        std::copy_n(from, matrix.columns, to);
      } else {
        for (Index column = 0; column < matrix.columns; ++column) {
          to[column] = from[matrix.keep_columns[column]];
        }
      }
    }
  });
}

void PackWeight(const KeptMatrix& weight, const PackedOut& out, int num_threads) {
  const Index parts = PartsFor(weight.rows * weight.columns, num_threads);
  RunParts(parts, [&](Index part) {
    const Range range = PartRange(weight.rows, kPanelWidth, part, parts);
    switch (out.format) {
      case WeightFormat::kFloat32:
        return Pack<Float32Format>(weight, static_cast<float*>(out.panels), nullptr, range);
      case WeightFormat::kBfloat16:
        return Pack<Bfloat16Format>(weight, static_cast<Bfloat16*>(out.panels), nullptr, range);
      case WeightFormat::kInt8:
        return Pack<Int8Format>(weight, static_cast<std::int8_t*>(out.panels), out.scales, range);
    }
  });
}

void UnpackWeight(const PackedWeight& packed, Index out_features, Index in_features, float* weight,
                  int num_threads) {
  const Index parts = PartsFor(out_features * in_features, num_threads);
  RunParts(parts, [&](Index part) {
    const Range range = PartRange(out_features, kPanelWidth, part, parts);
    switch (packed.format) {
      case WeightFormat::kFloat32:
        return Unpack<Float32Format>(packed, in_features, weight, range);
      case WeightFormat::kBfloat16:
        return Unpack<Bfloat16Format>(packed, in_features, weight, range);
      case WeightFormat::kInt8:
        return Unpack<Int8Format>(packed, in_features, weight, range);
    }
  });
}

}  // namespace fedspine
