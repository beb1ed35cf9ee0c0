// The program whose instructions are counted: one layer's forward, by our kernels or by OpenBLAS.
//
//   forward ours|openblas TOKENS IN OUT RUNS     y = x W^T, W packed once for ours, RUNS times
//
// OpenBLAS is taken by name from the machine it runs on, so that nothing here links to it.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "gather.h"
#include "isa.h"

namespace {

using fedspine::Index;
using Floats = std::vector<float>;

std::size_t Size(Index count) { return static_cast<std::size_t>(count); }

Floats Draw(Index count) {
  Floats values(Size(count));
  unsigned state = 1;
  for (float& value : values) {
    state = state * 1664525u + 1013904223u;
    value = static_cast<float>(state >> 8) * 0x1p-24f - 0.5f;
  }
  return values;
}

float* Align(Floats* memory) {
  const auto address = reinterpret_cast<std::uintptr_t>(memory->data());
  return memory->data() + (64 - address % 64) % 64 / sizeof(float);
}

void Ours(const fedspine::LinearShape& shape, const Floats& x, const Floats& w, int runs,
          Floats* y) {
  const Index panels = (shape.out_features + fedspine::kPanelWidth - 1) / fedspine::kPanelWidth;
  Floats packed(Size(panels * fedspine::kPanelWidth * shape.in_features));
  fedspine::PackWeight(
      {w.data(), shape.in_features, nullptr, nullptr, shape.out_features, shape.in_features},
      {packed.data(), nullptr, fedspine::WeightFormat::kFloat32}, 1);
  const fedspine::KernelTable& kernels = fedspine::Kernels();
  Floats scratch(Size(kernels.lora_linear_forward_scratch(shape, 1) + 16));
  fedspine::LoraLinearForwardArgs args = {};
  args.shape = shape;
  args.x = x.data();
  args.weight = {packed.data(), nullptr, fedspine::WeightFormat::kFloat32};
  args.y = y->data();
  args.num_threads = 1;
  for (int run = 0; run < runs; ++run) kernels.lora_linear_forward(args, Align(&scratch));
}

bool OpenBlas(const fedspine::LinearShape& shape, const Floats& x, const Floats& w, int runs,
              Floats* y) {
  void* const library = dlopen("libopenblas.so.0", RTLD_NOW);
  void* const symbol = library == nullptr ? nullptr : dlsym(library, "cblas_sgemm");
  if (symbol == nullptr) {
    std::fprintf(stderr, "error: no OpenBLAS: %s\n", dlerror());
    return false;
  }
  using Sgemm =
      void (*)(int order, int transpose_a, int transpose_b, int m, int n, int k, float alpha,
               const float* a, int lda, const float* b, int ldb, float beta, float* c, int ldc);
  constexpr int kRowMajor = 101, kPlain = 111, kTransposed = 112;
  Sgemm sgemm;
  std::memcpy(&sgemm, &symbol, sizeof(symbol));
  const int m = static_cast<int>(shape.tokens), n = static_cast<int>(shape.out_features),
            k = static_cast<int>(shape.in_features);
  for (int run = 0; run < runs; ++run) {
    sgemm(kRowMajor, kPlain, kTransposed, m, n, k, 1, x.data(), k, w.data(), k, 0, y->data(), n);
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 6) return 2;
  const fedspine::LinearShape shape = {std::atol(argv[2]), std::atol(argv[3]), std::atol(argv[4]),
                                       0};
  const int runs = std::atoi(argv[5]);
  const Floats x = Draw(shape.tokens * shape.in_features);
  const Floats w = Draw(shape.out_features * shape.in_features);
  Floats y(Size(shape.tokens * shape.out_features));
  if (std::strcmp(argv[1], "ours") == 0) {
    Ours(shape, x, w, runs, &y);
  } else if (!OpenBlas(shape, x, w, runs, &y)) {
    return 1;
  }
  double sum = 0;
  for (float value : y) sum += static_cast<double>(value);
  std::printf("%.6f\n", sum);  // Of both the same, to a few digits.
  return 0;
}
