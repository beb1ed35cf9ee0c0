// Every kernel of every target this CPU runs, against plain loops in double. Buffers have exactly
// the size the contracts ask for, so that the address sanitizer sees a read or write beyond them.
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "gather.h"
#include "isa.h"
#include "plain_loops.h"

namespace {

using fedspine::LinearShape;
using fedspine::WeightFormat;

std::string Describe(const char* what, const LinearShape& shape, int threads) {
  return std::string(what) + " T=" + std::to_string(shape.tokens) +
         " I=" + std::to_string(shape.in_features) + " O=" + std::to_string(shape.out_features) +
         " R=" + std::to_string(shape.rank) + " threads=" + std::to_string(threads);
}

constexpr WeightFormat kFormats[] = {WeightFormat::kFloat32, WeightFormat::kBfloat16,
                                     WeightFormat::kInt8};

// A packed weight with its memory, exactly as much as it needs.
struct Packed {
  Packed(const fedspine::KeptMatrix& matrix, WeightFormat weight_format)
      : format(weight_format),
        panels(Size(Padded(matrix.rows) * matrix.columns * Bytes(format)), 0xff),
        scales(format == WeightFormat::kInt8 ? Size(Padded(matrix.rows)) : 0) {
    fedspine::PackWeight(matrix, {panels.data(), Scales(), format}, 1);
  }

  static Index Padded(Index rows) {
    return (rows + fedspine::kPanelWidth - 1) / fedspine::kPanelWidth * fedspine::kPanelWidth;
  }
  static Index Bytes(WeightFormat format) {
    return format == WeightFormat::kFloat32 ? 4 : format == WeightFormat::kBfloat16 ? 2 : 1;
  }
  float* Scales() { return scales.empty() ? nullptr : scales.data(); }
  fedspine::PackedWeight Get() const {
    return {panels.data(), scales.empty() ? nullptr : scales.data(), format};
  }

  WeightFormat format;
  std::vector<unsigned char> panels;
  Floats scales;
};

Packed Pack(const Floats& weight, Index rows, Index columns, WeightFormat format) {
  return Packed({weight.data(), columns, nullptr, nullptr, rows, columns}, format);
}

Floats Unpack(const Packed& packed, Index rows, Index columns, int threads) {
  Floats weight(Size(rows * columns));
  fedspine::UnpackWeight(packed.Get(), rows, columns, weight.data(), threads);
  return weight;
}

struct Outputs {
  Floats y, hidden, dx, da, db;
};

struct Layer {
  explicit Layer(const LinearShape& s, WeightFormat format = WeightFormat::kFloat32,
                 const fedspine::Dropout& dropped = {0, 1, {}})
      : shape(s),
        dropout(dropped),
        x(Draw(s.tokens * s.in_features, 1)),
        bias(Draw(s.out_features, 3)),
        a(Draw(s.rank * s.in_features, 4)),
        b(Draw(s.out_features * s.rank, 5)),
        dy(Draw(s.tokens * s.out_features, 6)),
        packed(
            Pack(Draw(s.out_features * s.in_features, 2), s.out_features, s.in_features, format)),
        w(Unpack(packed, s.out_features, s.in_features, 1)) {}

  Outputs Run(int threads) const {
    const fedspine::KernelTable& kernels = fedspine::Kernels();
    Outputs out;
    out.y.resize(dy.size());
    out.hidden.resize(Size(shape.tokens * shape.rank));
    out.dx.resize(x.size());
    out.da.resize(a.size());
    out.db.resize(b.size());
    const bool low_rank = shape.rank > 0;
    {
      const Scratch scratch(kernels.lora_linear_forward_scratch(shape, threads));
      kernels.lora_linear_forward(
          {shape, x.data(), packed.Get(), bias.data(), a.data(), b.data(), kScaling, out.y.data(),
           low_rank ? out.hidden.data() : nullptr, dropout, threads},
          scratch.get());
    }
    const Scratch scratch(kernels.lora_linear_backward_scratch(shape, threads));
    kernels.lora_linear_backward(
        {shape, dy.data(), x.data(), packed.Get(), a.data(), b.data(), out.hidden.data(), kScaling,
         out.dx.data(), low_rank ? out.da.data() : nullptr, low_rank ? out.db.data() : nullptr,
         dropout, threads},
        scratch.get());
    return out;
  }

  void Check(const Outputs& out, const char* name, int threads) const {
    const auto [t, i, o, r] = shape;
    const Doubles x64 = ToDouble(x), w64 = ToDouble(w), a64 = ToDouble(a), b64 = ToDouble(b);
    const Doubles dy64 = ToDouble(dy);
    const double s = static_cast<double>(kScaling);
    const Doubles factors = DropoutFactors(dropout, t, r);
    const Doubles hidden = Times(Product(x64, Transposed(a64, r, i), t, i, r), factors);
    Doubles y = Product(x64, Transposed(w64, o, i), t, i, o);
    Add(&y, Product(hidden, Transposed(b64, o, r), t, r, o), s);
    for (Index n = 0; n < t * o; ++n) y[Size(n)] += static_cast<double>(bias[Size(n % o)]);
    const Doubles dhidden = Times(Product(dy64, b64, t, o, r), factors);
    Doubles dx = Product(dy64, w64, t, o, i);
    Add(&dx, Product(dhidden, a64, t, r, i), s);
    Doubles da(a.size(), 0.0), db(b.size(), 0.0);
    Add(&da, Product(Transposed(dhidden, t, r), x64, r, t, i), s);
    Add(&db, Product(Transposed(dy64, t, o), hidden, o, t, r), s);
    const std::string where = Describe(name, shape, threads);
    ExpectClose(out.y, y, where + " y");
    ExpectClose(out.dx, dx, where + " dx");
    ExpectClose(out.da, da, where + " da");
    ExpectClose(out.db, db, where + " db");
  }

  static constexpr float kScaling = 2.0f;
  LinearShape shape;
  fedspine::Dropout dropout;
  Floats x, bias, a, b, dy;
  Packed packed;
  Floats w;  // What the panels stand for.
};

void TestLayerMatchesPlainLoops() {
  for (const Index tokens : {1, 7, 33, 97}) {
    for (const Index in_features : {1, 7, 97}) {
      for (const Index out_features : {1, 17, 97}) {
        for (const Index rank : {0, 1, 3, 16, 33}) {
          const Layer layer({tokens, in_features, out_features, rank});
          layer.Check(layer.Run(1), "layer", 1);
        }
      }
    }
  }
  for (const WeightFormat format : kFormats) {
    // More than two blocks of depth, forward and backward; more than two of tokens; no low-rank.
    for (const LinearShape& shape : {LinearShape{40, 1100, 33, 8}, LinearShape{7, 33, 1100, 3},
                                     LinearShape{600, 40, 33, 17}, LinearShape{1, 1, 1, 0}}) {
      const Layer layer(shape, format);
      layer.Check(layer.Run(1), "formats", 1);
    }
  }
}

constexpr fedspine::Dropout kQuarter = {1u << 30, 4.0f / 3, {7, 11}};

void TestDropoutMatchesPlainLoops() {
  // Random123's known answers.
  if (Philox({0, 0, 0, 0}, 0, 0) !=
          std::array<std::uint32_t, 4>{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8} ||
      Philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, 0xa4093822, 0x299f31d0) !=
          std::array<std::uint32_t, 4>{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}) {
    Fail("Philox");
  }
  for (const LinearShape& shape : {LinearShape{97, 33, 17, 33}, LinearShape{1, 7, 1, 1},
                                   LinearShape{700, 40, 1100, 6}, LinearShape{40, 1100, 33, 70}}) {
    const Layer layer(shape, WeightFormat::kFloat32, kQuarter);
    const Outputs one = layer.Run(1), two = layer.Run(2);
    layer.Check(one, "dropout", 1);
    if (one.y != two.y || one.hidden != two.hidden || one.dx != two.dx || one.da != two.da ||
        one.db != two.db) {
      Fail(Describe("bits of dropout differ", shape, 2));
    }
  }
}

void TestThreadsDoNotChangeABit() {
  for (const LinearShape& shape : {LinearShape{16, 384, 384, 16}, LinearShape{301, 97, 161, 17},
                                   LinearShape{700, 96, 100, 8}}) {
    for (const WeightFormat format : kFormats) {
      const Layer layer(shape, format);
      const Outputs one = layer.Run(1);
      layer.Check(one, "threads", 1);
      for (const int threads : {2, 3, 5}) {
        const Outputs many = layer.Run(threads);
        if (many.y != one.y || many.hidden != one.hidden || many.dx != one.dx ||
            many.da != one.da || many.db != one.db) {
          Fail(Describe("bits differ", shape, threads));
        }
      }
    }
  }
}

void TestImportanceMatchesPlainLoops(WeightFormat format) {
  for (const LinearShape& shape : {LinearShape{1, 1, 1, 1}, LinearShape{1, 97, 33, 3},
                                   LinearShape{1, 31, 130, 17}, LinearShape{1, 300, 200, 8}}) {
    const auto [t, i, o, r] = shape;
    const Layer layer(shape, format);
    const Floats da = Draw(r * i, 7), db = Draw(o * r, 8);
    const Doubles a64 = ToDouble(layer.a), b64 = ToDouble(layer.b);
    Doubles gradient = Product(ToDouble(db), a64, o, r, i);
    Add(&gradient, Product(b64, ToDouble(da), o, r, i), 1);
    Add(&gradient, Product(ToDouble(db), ToDouble(da), o, r, i), -1);
    Doubles weight = ToDouble(layer.w);
    Add(&weight, Product(b64, a64, o, r, i), static_cast<double>(Layer::kScaling));
    for (const auto& [share, phase] : {std::pair<Index, Index>{1, 0}, {4, 6}, {100, 1}}) {
      const auto taken = [&, n = share, at = phase](Index feature, Index features) {
        const Index step = std::min(n, (features + 31) / 32);
        return feature / 32 % step == at % step;
      };
      Doubles rows(Size(o), 0.0), columns(Size(i), 0.0);
      for (Index n = 0; n < o * i; ++n) {
        const double score = std::fabs(gradient[Size(n)] * weight[Size(n)]);
        if (taken(n % i, i)) rows[Size(n / i)] += score;
        if (taken(n / i, o)) columns[Size(n % i)] += score;
      }
      Floats first;
      for (const bool by_output : {true, false}) {
        for (const int threads : {1, 2, 3}) {
          const fedspine::KernelTable& kernels = fedspine::Kernels();
          const Scratch scratch(kernels.importance_scratch(shape));
          Floats out(Size(by_output ? o : i));
          kernels.importance(
              {shape, layer.packed.Get(), layer.a.data(), layer.b.data(), da.data(), db.data(),
               Layer::kScaling, by_output, share, phase, out.data(), threads},
              scratch.get());
          ExpectClose(out, by_output ? rows : columns, Describe("importance", shape, threads));
          if (threads == 1) first = out;
          if (out != first) Fail(Describe("importance bits differ", shape, threads));
        }
      }
    }
  }
}

void TestRmsNormMatchesPlainLoops() {
  constexpr float kEpsilon = 1e-2f;  // Large, so that one feature alone does not cancel.
  for (const Index tokens : {1, 7, 301}) {
    for (const Index features : {1, 7, 15, 64, 97, 577}) {
      const Floats x = Draw(tokens * features, 1), weight = Draw(features, 2);
      const Floats dy = Draw(tokens * features, 3);
      Doubles rstd, y(x.size()), dx(x.size());
      for (Index t = 0; t < tokens; ++t) {
        double squares = 0, along_x = 0;
        const auto at = [&](const Floats& values, Index i) {
          return static_cast<double>(values[Size(t * features + i)]);
        };
        const auto w = [&](Index i) { return static_cast<double>(weight[Size(i)]); };
        for (Index i = 0; i < features; ++i) squares += at(x, i) * at(x, i);
        for (Index i = 0; i < features; ++i) along_x += w(i) * at(dy, i) * at(x, i);
        const double count = static_cast<double>(features);
        rstd.push_back(1 / std::sqrt(squares / count + static_cast<double>(kEpsilon)));
        along_x *= rstd.back() * rstd.back() / count;
        for (Index i = 0; i < features; ++i) {
          y[Size(t * features + i)] = at(x, i) * rstd.back() * w(i);
          dx[Size(t * features + i)] = rstd.back() * (w(i) * at(dy, i) - at(x, i) * along_x);
        }
      }
      const std::string where = Describe("norm", {tokens, features, features, 0}, 1);
      Floats first_y, first_dx;
      for (const int threads : {1, 2, 5}) {
        Floats out_rstd(Size(tokens)), out_y(x.size()), unsaved_y(x.size()), out_dx(x.size());
        const fedspine::KernelTable& kernels = fedspine::Kernels();
        kernels.rms_norm_forward({tokens, features, x.data(), weight.data(), kEpsilon, out_y.data(),
                                  out_rstd.data(), threads});
        kernels.rms_norm_forward({tokens, features, x.data(), weight.data(), kEpsilon,
                                  unsaved_y.data(), nullptr, threads});
        kernels.rms_norm_backward({tokens, features, dy.data(), x.data(), weight.data(),
                                   out_rstd.data(), out_dx.data(), threads});
        if (threads == 1) {
          ExpectClose(out_rstd, rstd, where + " rstd");
          ExpectClose(out_y, y, where + " y");
          ExpectClose(out_dx, dx, where + " dx");
          first_y = out_y;
          first_dx = out_dx;
        }
        if (out_y != first_y || unsaved_y != first_y || out_dx != first_dx) {
          Fail(where + " bits differ");
        }
      }
    }
  }
}

void TestGatherAndPack() {
  const Floats matrix = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};  // [3, 4]
  const std::vector<std::int64_t> rows = {0, 2}, columns = {1, 3};
  Floats out(4);
  fedspine::Gather({matrix.data(), 4, rows.data(), columns.data(), 2, 2}, out.data(), 1);
  if (out != Floats{1, 3, 9, 11}) Fail("gather");
  const fedspine::KeptMatrix kept = {matrix.data(), 4, rows.data(), columns.data(), 2, 2};
  const Packed small(kept, WeightFormat::kFloat32);
  Floats panels(2 * fedspine::kPanelWidth);
  std::memcpy(panels.data(), small.panels.data(), small.panels.size());
  if (panels[0] != 1 || panels[1] != 9 || panels[2] != 0 || panels[32] != 3 || panels[33] != 11) {
    Fail("pack");
  }
  const Packed codes(kept, WeightFormat::kInt8);
  const auto code = [&](std::size_t at) { return static_cast<std::int8_t>(codes.panels[at]); };
  if (code(0) != 42 || code(1) != 104 || code(2) != 0 || code(32) != 127 || code(33) != 127 ||
      codes.scales[0] != 3.0f / 127 || codes.scales[1] != 11.0f / 127 || codes.scales[2] != 0) {
    Fail("pack int8");
  }
  const Floats weight = Draw(333 * 500, 9);
  if (Unpack(Pack(weight, 333, 500, WeightFormat::kFloat32), 333, 500, 2) != weight) {
    Fail("unpack");
  }
  const Floats halves = Unpack(Pack(weight, 333, 500, WeightFormat::kBfloat16), 333, 500, 2);
  if (Unpack(Pack(halves, 333, 500, WeightFormat::kBfloat16), 333, 500, 1) != halves) {
    Fail("bfloat16 is not exact of what was rounded to it");
  }
  const Floats bytes = Unpack(Pack(weight, 333, 500, WeightFormat::kInt8), 333, 500, 2);
  for (std::size_t row = 0; row < 333; ++row) {
    float largest = 0;
    for (std::size_t i = 0; i < 500; ++i) {
      largest = std::max(largest, std::fabs(weight[row * 500 + i]));
    }
    for (std::size_t i = row * 500; i < (row + 1) * 500; ++i) {
      if (std::fabs(halves[i] - weight[i]) > std::fabs(weight[i]) / 256) Fail("bfloat16 is far");
      if (std::fabs(bytes[i] - weight[i]) > largest / 127 * 0.5001f) Fail("int8 is far");
    }
  }
}

// What is not finite, and what is hardly a number.
void TestUnusualWeights() {
  const float nan = std::nanf(""), infinity = HUGE_VALF;
  const Floats odd = {nan, 1, infinity, 2, 0, 0, 1e-44f, -1e-45f, 3e38f, -3e38f};  // [5, 2]
  const Floats halves = Unpack(Pack(odd, 5, 2, WeightFormat::kBfloat16), 5, 2, 1);
  if (!std::isnan(halves[0]) || halves[1] != 1 || halves[2] != infinity || halves[4] != 0) {
    Fail("bfloat16 of what is not finite");
  }
  const Floats bytes = Unpack(Pack(odd, 5, 2, WeightFormat::kInt8), 5, 2, 1);
  for (std::size_t i = 0; i < 4; ++i) {
    if (!std::isnan(bytes[i])) Fail("int8 of a row that is not finite");
  }
  if (bytes[4] != 0 || bytes[5] != 0 || std::fabs(bytes[6]) > 2e-44f ||
      std::fabs(bytes[8] - 3e38f) > 1e33f || std::fabs(bytes[9] + 3e38f) > 1e33f) {
    Fail("int8 of zeros and extremes");
  }
}

}  // namespace

int main() {
  TestGatherAndPack();
  TestUnusualWeights();
  for (const fedspine::KernelTable* const* table = fedspine::AvailableKernels(); *table != nullptr;
       ++table) {
    if (!fedspine::UseKernels((*table)->name)) Fail("cannot be chosen");
    TestLayerMatchesPlainLoops();
    TestDropoutMatchesPlainLoops();
    TestThreadsDoNotChangeABit();
    for (const WeightFormat format : kFormats) TestImportanceMatchesPlainLoops(format);
    TestRmsNormMatchesPlainLoops();
    std::printf("%s done\n", (*table)->name);
  }
  if (fedspine::UseKernels("abacus")) Fail("an unknown target was taken");
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
