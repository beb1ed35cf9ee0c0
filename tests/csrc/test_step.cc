// What stands between the linears, on every target this CPU runs, against plain loops in double.
// Buffers have exactly the size the contracts ask for. What is kept in bfloat16 is drawn as such,
// so that the comparison is as tight as float32 allows.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "isa.h"
#include "plain_loops.h"

namespace {

using fedspine::AttentionShape;
using fedspine::Bfloat16;
using Kept = std::vector<Bfloat16>;

constexpr int kThreads[] = {1, 2, 5};

double D(float value) { return static_cast<double>(value); }

Bfloat16 UpperHalf(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<Bfloat16>(bits >> 16);
}

float FromUpperHalf(Bfloat16 half) {
  const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Normal numbers of 8 bits.
Floats DrawShort(Index count, unsigned seed, float scale) {
  Floats values = Draw(count, seed);
  for (float& value : values) value = FromUpperHalf(UpperHalf(value * scale));
  return values;
}

Kept ToKept(const Floats& values) {
  Kept halves;
  for (const float value : values) halves.push_back(UpperHalf(value));
  return halves;
}

void ExpectSame(const Floats& found, const Floats& first, const std::string& what) {
  if (found != first) Fail(what + " bits differ");
}

void TestSwigluMatchesPlainLoops() {
  for (const Index size : {1, 7, 16, 97, 100003}) {
    const Floats gate = DrawShort(size, 1, 8.0f), up = DrawShort(size, 2, 1.0f), dy = Draw(size, 3);
    Doubles y(up.size()), dgate(up.size()), dup(up.size());
    for (std::size_t i = 0; i < up.size(); ++i) {
      const double g = static_cast<double>(gate[i]), u = static_cast<double>(up[i]);
      const double d = static_cast<double>(dy[i]), s = 1 / (1 + std::exp(-g));
      y[i] = g * s * u;
      dgate[i] = d * u * s * (1 + g * (1 - s));
      dup[i] = d * g * s;
    }
    const std::string where = "gate N=" + std::to_string(size);
    Floats first_y, first_dgate;
    for (const int threads : kThreads) {
      Floats out_y(up.size()), again_y(up.size()), out_dgate(up.size()), out_dup(up.size());
      Kept kept_gate(up.size()), kept_up(up.size());
      const fedspine::KernelTable& kernels = fedspine::Kernels();
      kernels.swiglu_forward(
          {size, gate.data(), up.data(), out_y.data(), kept_gate.data(), kept_up.data(), threads});
      kernels.swiglu_again({size, kept_gate.data(), kept_up.data(), again_y.data(), threads});
      kernels.swiglu_backward({size, dy.data(), kept_gate.data(), kept_up.data(), out_dgate.data(),
                               out_dup.data(), threads});
      if (kept_gate != ToKept(gate) || kept_up != ToKept(up)) Fail(where + " kept");
      ExpectClose(out_y, y, where + " y");
      ExpectClose(out_dgate, dgate, where + " dgate");
      ExpectClose(out_dup, dup, where + " dup");
      if (threads == 1) {
        first_y = out_y;
        first_dgate = out_dgate;
      }
      ExpectSame(again_y, first_y, where + " again");
      if (out_y != first_y || out_dgate != first_dgate) Fail(where + " bits differ");
    }
  }
}

// exp is seen through a gate of -x: x / (1 + exp(-x)), to three ulp where that is a normal number.
void TestExponentialFromEndToEnd() {
  constexpr Index kSize = 40001;
  Floats gate(Size(kSize)), y(Size(kSize));
  const Floats up(Size(kSize), 1.0f);
  for (Index i = 0; i < kSize; ++i) gate[Size(i)] = static_cast<float>(i) * 0.005f - 84.0f;
  fedspine::Kernels().swiglu_forward(
      {kSize, gate.data(), up.data(), y.data(), nullptr, nullptr, 1});
  for (std::size_t i = 0; i < y.size(); ++i) {
    const double g = static_cast<double>(gate[i]), exact = g / (1 + std::exp(-g));
    const double error = std::fabs(static_cast<double>(y[i]) - exact);
    if (!(error <= 3 * std::fabs(exact) / 8388608)) Fail("exp at " + std::to_string(-g));
  }
  const float huge = 3e38f, nan = std::nanf("");
  const Floats far = {-huge, huge, -104.5f, nan, 0.0f}, one(5, 1.0f);
  Floats out(5), dgate(5), dup(5);
  fedspine::Kernels().swiglu_forward({5, far.data(), one.data(), out.data(), nullptr, nullptr, 1});
  if (out[0] != 0 || out[1] != huge || out[2] != 0 || !std::isnan(out[3]) || out[4] != 0) {
    Fail("gate at the ends");
  }
  fedspine::Kernels().swiglu_backward(
      {5, one.data(), ToKept(far).data(), ToKept(one).data(), dgate.data(), dup.data(), 1});
  if (dgate[0] != 0 || dgate[1] != 1 || dgate[2] != 0 || !std::isnan(dgate[3])) {
    Fail("slope of the gate at the ends");
  }
}

void TestGeluMatchesPlainLoops() {
  for (const Index size : {1, 7, 16, 97, 100003}) {
    const Floats x = DrawShort(size, 1, 3.0f), dy = Draw(size, 2);
    Doubles y(x.size()), dx(x.size());
    for (std::size_t i = 0; i < x.size(); ++i) {
      const double v = D(x[i]), below = std::erfc(-v / std::sqrt(2.0)) / 2;
      y[i] = v * below;
      dx[i] = D(dy[i]) * (below + v * std::exp(-v * v / 2) / std::sqrt(2 * std::acos(-1.0)));
    }
    const std::string where = "gelu N=" + std::to_string(size);
    Floats first_y, first_dx;
    for (const int threads : kThreads) {
      Floats out_y(x.size()), unkept_y(x.size()), again_y(x.size()), out_dx(x.size());
      Kept kept(x.size());
      const fedspine::KernelTable& kernels = fedspine::Kernels();
      kernels.gelu_forward({size, x.data(), out_y.data(), kept.data(), threads});
      kernels.gelu_forward({size, x.data(), unkept_y.data(), nullptr, threads});
      kernels.gelu_again({size, kept.data(), again_y.data(), threads});
      kernels.gelu_backward({size, dy.data(), kept.data(), out_dx.data(), threads});
      if (kept != ToKept(x)) Fail(where + " kept");
      ExpectClose(out_y, y, where + " y");
      ExpectClose(out_dx, dx, where + " dx");
      if (threads == 1) {
        first_y = out_y;
        first_dx = out_dx;
      }
      ExpectSame(out_y, first_y, where);
      ExpectSame(unkept_y, first_y, where);
      ExpectSame(again_y, first_y, where + " again");
      ExpectSame(out_dx, first_dx, where);
    }
  }
}

// Within 2 ulp above zero, and 5e-8 below; and the ends are what they must be.
void TestGeluFromEndToEnd() {
  constexpr Index kSize = 24001;
  Floats x(Size(kSize)), y(Size(kSize));
  for (Index i = 0; i < kSize; ++i) x[Size(i)] = static_cast<float>(i) * 0.001f - 12.0f;
  fedspine::Kernels().gelu_forward({kSize, x.data(), y.data(), nullptr, 1});
  for (std::size_t i = 0; i < y.size(); ++i) {
    const double exact = D(x[i]) * std::erfc(-D(x[i]) / std::sqrt(2.0)) / 2;
    const double error = std::fabs(D(y[i]) - exact);
    if (!(error <= 2e-7 * std::fabs(exact) + 5e-8)) Fail("gelu at " + std::to_string(x[i]));
  }
  const Floats far = {-3e38f, 3e38f, std::nanf(""), 0.0f, -20.0f};
  Floats out(5), slope(5);
  const Floats one(5, 1.0f);
  fedspine::Kernels().gelu_forward({5, far.data(), out.data(), nullptr, 1});
  if (std::fabs(out[0]) > 1e-4f || out[1] != 3e38f || !std::isnan(out[2]) || out[3] != 0 ||
      std::fabs(out[4]) > 1e-37f) {
    Fail("gelu at the ends");
  }
  fedspine::Kernels().gelu_backward({5, one.data(), ToKept(far).data(), slope.data(), 1});
  if (!std::isnan(slope[2]) || slope[3] != 0.5f) Fail("slope of gelu at the ends");
}

void TestRoundingToBfloat16() {
  // Halfway goes to even; what is above the largest becomes infinity; NaN stays NaN.
  const Floats x = {1.00390625f, 1.01171875f, 1.00391f, -1.00390625f, 3.4e38f, std::nanf("")};
  const Floats expected = {1.0f, 1.015625f, 1.0078125f, -1.0f, INFINITY};
  Floats y(x.size());
  Kept kept(x.size());
  fedspine::Kernels().gelu_forward({6, x.data(), y.data(), kept.data(), 1});
  for (std::size_t i = 0; i < expected.size(); ++i) {
    if (FromUpperHalf(kept[i]) != expected[i]) Fail("rounding of " + std::to_string(x[i]));
  }
  if (!std::isnan(FromUpperHalf(kept[5]))) Fail("rounding of NaN");
}

void CheckLayerNorm(Index tokens, Index features, bool with_residual) {
  constexpr float kEpsilon = 1e-2f;
  const Floats x = Draw(tokens * features, 1), residual = Draw(tokens * features, 2);
  const Floats weight = Draw(features, 3), bias = Draw(features, 4),
               dy = Draw(tokens * features, 5);
  const Floats normal = DrawShort(tokens * features, 6, 1.0f);
  const double count = static_cast<double>(features);
  Doubles rstd, y(x.size()), dz(x.size()), again(x.size());
  Floats rstd32;
  for (Index t = 0; t < tokens; ++t) {
    const auto place = [&](Index i) { return Size(t * features + i); };
    const auto z = [&](Index i) {
      return D(x[place(i)]) + (with_residual ? D(residual[place(i)]) : 0.0);
    };
    double mean = 0, variance = 0, slope = 0, along = 0;
    for (Index i = 0; i < features; ++i) mean += z(i) / count;
    for (Index i = 0; i < features; ++i) variance += (z(i) - mean) * (z(i) - mean) / count;
    rstd.push_back(1 / std::sqrt(variance + D(kEpsilon)));
    rstd32.push_back(static_cast<float>(rstd.back()));
    for (Index i = 0; i < features; ++i) {
      slope += D(weight[Size(i)]) * D(dy[place(i)]) / count;
      along += D(weight[Size(i)]) * D(dy[place(i)]) * D(normal[place(i)]) / count;
    }
    for (Index i = 0; i < features; ++i) {
      const double w = D(weight[Size(i)]), b = D(bias[Size(i)]), n = D(normal[place(i)]);
      y[place(i)] = (z(i) - mean) * rstd.back() * w + b;
      again[place(i)] = n * w + b;
      dz[place(i)] = rstd.back() * (w * D(dy[place(i)]) - slope - n * along);
    }
  }
  const std::string where =
      "layer norm T=" + std::to_string(tokens) + " I=" + std::to_string(features);
  Floats first_y, first_dz;
  for (const int threads : kThreads) {
    Floats out_rstd(Size(tokens)), out_y(x.size()), unkept(x.size()), out_dz(x.size());
    Floats out_again(x.size());
    Kept kept(x.size());
    const float* const other = with_residual ? residual.data() : nullptr;
    const fedspine::KernelTable& kernels = fedspine::Kernels();
    kernels.layer_norm_forward({tokens, features, x.data(), other, weight.data(), bias.data(),
                                kEpsilon, out_y.data(), kept.data(), out_rstd.data(), threads});
    kernels.layer_norm_forward({tokens, features, x.data(), other, weight.data(), bias.data(),
                                kEpsilon, unkept.data(), nullptr, nullptr, threads});
    kernels.layer_norm_again({tokens, features, ToKept(normal).data(), weight.data(), bias.data(),
                              out_again.data(), threads});
    kernels.layer_norm_backward({tokens, features, dy.data(), ToKept(normal).data(), weight.data(),
                                 rstd32.data(), out_dz.data(), threads});
    ExpectClose(out_rstd, rstd, where + " rstd");
    ExpectClose(out_y, y, where + " y");
    ExpectClose(out_again, again, where + " again");
    ExpectClose(out_dz, dz, where + " dz");
    for (std::size_t i = 0; i < kept.size(); ++i) {
      const double w = D(weight[i % Size(features)]), b = D(bias[i % Size(features)]);
      const double error = std::fabs(D(FromUpperHalf(kept[i])) * w + b - y[i]);
      if (!(error <= (std::fabs(y[i] - b) + 1e-3 * std::fabs(w)) / 250)) Fail(where + " kept");
    }
    if (threads == 1) {
      first_y = out_y;
      first_dz = out_dz;
    }
    ExpectSame(out_y, first_y, where);
    ExpectSame(unkept, first_y, where);
    ExpectSame(out_dz, first_dz, where);
  }
}

void TestLayerNormMatchesPlainLoops() {
  for (const Index tokens : {1, 7, 301}) {
    for (const Index features : {1, 7, 15, 64, 97, 577}) {
      CheckLayerNorm(tokens, features, true);
      CheckLayerNorm(tokens, features, false);
    }
  }
}

void TestCrossEntropyMatchesPlainLoops() {
  for (const Index tokens : {1, 7}) {
    for (const Index classes : {1, 7, 97, 5003}) {
      Floats logits = Draw(tokens * classes, 1);
      for (float& value : logits) value *= 8;
      std::vector<std::int64_t> targets;
      Doubles loss, gradient(logits.size());
      for (Index t = 0; t < tokens; ++t) {
        targets.push_back((t * 31 + 5) % classes);
        const auto at = [&](Index c) { return D(logits[Size(t * classes + c)]); };
        double sum = 0;
        for (Index c = 0; c < classes; ++c) sum += std::exp(at(c));
        loss.push_back(std::log(sum) - at(targets.back()));
        for (Index c = 0; c < classes; ++c) {
          gradient[Size(t * classes + c)] =
              0.25 * (std::exp(at(c)) / sum - (c == targets.back() ? 1 : 0));
        }
      }
      const std::string where = "loss V=" + std::to_string(classes);
      Floats first;
      for (const int threads : kThreads) {
        Floats out = logits, out_loss(Size(tokens));
        fedspine::Kernels().cross_entropy(
            {tokens, classes, out.data(), targets.data(), 0.25f, out_loss.data(), threads});
        if (classes > 1) ExpectClose(out, gradient, where + " gradient");
        for (std::size_t t = 0; t < loss.size(); ++t) {
          if (!(std::fabs(D(out_loss[t]) - loss[t]) <= 1e-5 * (1 + loss[t]))) Fail(where);
        }
        if (threads == 1) first = out;
        ExpectSame(out, first, where);
      }
    }
  }
  Floats logits = {0.0f, std::nanf(""), 1.0f}, loss(1);
  const std::int64_t target = 2;
  fedspine::Kernels().cross_entropy({1, 3, logits.data(), &target, 1.0f, loss.data(), 1});
  if (!std::isnan(loss[0]) || !std::isnan(logits[0])) Fail("loss of NaN");
}

struct Attention {
  AttentionShape shape;
  bool causal, padded, biased, rotated;

  std::string Name() const {
    const auto [b, t, h, g, d] = shape;
    return "attention B=" + std::to_string(b) + " T=" + std::to_string(t) +
           " H=" + std::to_string(h) + " G=" + std::to_string(g) + " D=" + std::to_string(d) +
           (causal ? " causal" : "") + (padded ? " padded" : "") + (biased ? " biased" : "") +
           (rotated ? " rotated" : "");
  }

  void Prepare() {
    const auto [b, t, h, g, d] = shape;
    q = Draw(b * t * h * d, 1);
    k = Draw(b * t * g * d, 2);
    v = Draw(b * t * g * d, 3);
    dout = Draw(b * t * h * d, 4);
    if (biased) bias = Draw(h * t * t, 5);
    for (Index i = 0; rotated && i < t * d; ++i) {
      cos.push_back(static_cast<float>(std::cos(0.1 * static_cast<double>(i * i % 97))));
      sin.push_back(static_cast<float>(std::sin(0.1 * static_cast<double>(i * i % 97))));
    }
    for (Index i = 0; padded && i < b * t; ++i) valid.push_back(i < t || i % 3 == 0 ? 0 : 1);
  }

  bool Sees(Index row, Index query, Index key) const {
    return !(causal && key > query) && (!padded || valid[Size(row * shape.tokens + key)] != 0);
  }

  // rope(x) of one head, or its transpose.
  Doubles Rotated(const Doubles& x, Index t, bool back) const {
    if (!rotated) return x;
    const Index half = shape.head_dim / 2;
    Doubles out(x.size());
    for (Index i = 0; i < half; ++i) {
      const std::size_t low = Size(i), high = Size(i + half), at = Size(t * shape.head_dim);
      const double c0 = D(cos[at + low]), c1 = D(cos[at + high]);
      const double s0 = D(sin[at + low]), s1 = D(sin[at + high]);
      out[low] = x[low] * c0 + (back ? x[high] * s1 : -x[high] * s0);
      out[high] = x[high] * c1 + (back ? -x[low] * s0 : x[low] * s1);
    }
    return out;
  }

  static Doubles Head(const Floats& x, Index first, Index dim) {
    return Doubles(x.begin() + first, x.begin() + first + dim);
  }

  static double Dot(const Doubles& a, const Doubles& b) {
    double sum = 0;
    for (std::size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
    return sum;
  }

  static void AddTo(Doubles* sum, Index first, const Doubles& x, double scale) {
    for (std::size_t i = 0; i < x.size(); ++i) (*sum)[Size(first) + i] += scale * x[i];
  }

  void Expect(Doubles* out, Doubles* dq, Doubles* dk, Doubles* dv) const {
    const auto [batch, tokens, heads, kv_heads, dim] = shape;
    out->assign(q.size(), 0.0);
    dq->assign(q.size(), 0.0);
    dk->assign(k.size(), 0.0);
    dv->assign(v.size(), 0.0);
    const double scale = 1 / std::sqrt(static_cast<double>(dim));
    for (Index n = 0; n < batch * tokens * heads; ++n) {
      const Index row = n / (tokens * heads), query = n / heads % tokens, head = n % heads;
      const auto key_at = [&, kv = kv_heads, per = heads / kv_heads, t = tokens,
                           d = dim](Index key) { return ((row * t + key) * kv + head / per) * d; };
      const Doubles q_row = Rotated(Head(q, n * dim, dim), query, false);
      Doubles p(Size(tokens), 0.0), dp(Size(tokens), 0.0);
      double sum = 0;
      for (Index key = 0; key < tokens; ++key) {
        if (!Sees(row, query, key)) continue;
        double score = scale * Dot(q_row, Rotated(Head(k, key_at(key), dim), key, false));
        if (biased) score += D(bias[Size((head * tokens + query) * tokens + key)]);
        sum += p[Size(key)] = std::exp(score);
      }
      if (sum == 0) continue;
      const Doubles dout_row = Head(dout, n * dim, dim);
      double delta = 0;
      for (Index key = 0; key < tokens; ++key) {
        p[Size(key)] /= sum;
        if (!Sees(row, query, key)) continue;
        const Doubles v_row = Head(v, key_at(key), dim);
        AddTo(out, n * dim, v_row, p[Size(key)]);
        AddTo(dv, key_at(key), dout_row, p[Size(key)]);
        dp[Size(key)] = Dot(dout_row, v_row);
        delta += p[Size(key)] * dp[Size(key)];
      }
      for (Index key = 0; key < tokens; ++key) {
        const double ds = scale * p[Size(key)] * (dp[Size(key)] - delta);
        if (!Sees(row, query, key)) continue;
        const Doubles k_row = Rotated(Head(k, key_at(key), dim), key, false);
        AddTo(dq, n * dim, Rotated(k_row, query, true), ds);
        AddTo(dk, key_at(key), Rotated(q_row, key, true), ds);
      }
    }
  }

  void Run(int threads, Floats* out, Floats* lse, Floats* dq, Floats* dk, Floats* dv) const {
    const auto [batch, tokens, heads, kv_heads, dim] = shape;
    const fedspine::AttentionInputs in = {
        shape,
        q.data(),
        k.data(),
        v.data(),
        rotated ? cos.data() : nullptr,
        rotated ? sin.data() : nullptr,
        0,
        biased ? bias.data() : nullptr,
        padded ? valid.data() : nullptr,
        static_cast<float>(1 / std::sqrt(static_cast<double>(dim))),
        causal,
        threads};
    const fedspine::KernelTable& kernels = fedspine::Kernels();
    out->resize(q.size());
    lse->resize(Size(batch * heads * tokens));
    dq->resize(q.size());
    dk->resize(k.size());
    dv->resize(v.size());
    {
      const Scratch scratch(kernels.attention_forward_scratch(shape, threads));
      kernels.attention_forward({in, out->data(), lse->data()}, scratch.get());
    }
    const Scratch scratch(kernels.attention_backward_scratch(shape, threads));
    kernels.attention_backward(
        {in, out->data(), lse->data(), dout.data(), dq->data(), dk->data(), dv->data()},
        scratch.get());
  }

  void Check() {
    Prepare();
    Doubles out64, dq64, dk64, dv64;
    Expect(&out64, &dq64, &dk64, &dv64);
    Floats out, lse, dq, dk, dv;
    Run(1, &out, &lse, &dq, &dk, &dv);
    ExpectClose(out, out64, Name() + " out");
    ExpectClose(dv, dv64, Name() + " dv");
    if (shape.tokens == 1) return;  // One key: dq and dk are zero but for rounding.
    ExpectClose(dq, dq64, Name() + " dq");
    ExpectClose(dk, dk64, Name() + " dk");
    for (const int threads : {2, 3}) {
      Floats out2, lse2, dq2, dk2, dv2;
      Run(threads, &out2, &lse2, &dq2, &dk2, &dv2);
      if (out2 != out || lse2 != lse || dq2 != dq || dk2 != dk || dv2 != dv) {
        Fail(Name() + " bits differ");
      }
    }
  }

  Floats q, k, v, dout, bias, cos, sin;
  std::vector<unsigned char> valid;
};

void TestAttentionMatchesPlainLoops() {
  for (const AttentionShape& shape :
       {AttentionShape{1, 1, 1, 1, 1}, AttentionShape{2, 7, 2, 1, 7},
        AttentionShape{2, 33, 3, 3, 32}, AttentionShape{2, 97, 2, 1, 34},
        AttentionShape{2, 140, 2, 1, 64}}) {
    for (const bool causal : {false, true}) {
      for (const bool padded : {false, true}) {
        Attention{shape, causal, padded, false, shape.head_dim % 2 == 0, {}, {}, {}, {},
                  {},    {},     {},     {}}
            .Check();
        Attention{shape, causal, padded, true, false, {}, {}, {}, {}, {}, {}, {}, {}}.Check();
      }
    }
  }
}

}  // namespace

int main() {
  for (const fedspine::KernelTable* const* table = fedspine::AvailableKernels(); *table != nullptr;
       ++table) {
    if (!fedspine::UseKernels((*table)->name)) Fail("cannot be chosen");
    TestSwigluMatchesPlainLoops();
    TestExponentialFromEndToEnd();
    TestGeluMatchesPlainLoops();
    TestGeluFromEndToEnd();
    TestRoundingToBfloat16();
    TestLayerNormMatchesPlainLoops();
    TestCrossEntropyMatchesPlainLoops();
    TestAttentionMatchesPlainLoops();
    std::printf("%s done\n", (*table)->name);
  }
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
