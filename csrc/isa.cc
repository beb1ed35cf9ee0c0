#include "isa.h"

#include <array>
#include <atomic>
#include <cstddef>
#include <cstring>

namespace fedspine {

namespace scalar {
const KernelTable& Table();
}
#if defined(__x86_64__)
namespace avx2 {
const KernelTable& Table();
}
namespace avx512 {
const KernelTable& Table();
}
#elif defined(__aarch64__)
namespace neon {
const KernelTable& Table();
}
#endif

namespace {

using Tables = std::array<const KernelTable*, 4>;

Tables Detect() {
  Tables tables = {};
  std::size_t count = 0;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")) {
    tables[count++] = &avx512::Table();
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    tables[count++] = &avx2::Table();
  }
#elif defined(__aarch64__)
  tables[count++] = &neon::Table();  // Advanced SIMD is part of the architecture's base.
#endif
  tables[count] = &scalar::Table();
  return tables;
}

std::atomic<const KernelTable*>& Chosen() {
  static std::atomic<const KernelTable*> chosen{AvailableKernels()[0]};
  return chosen;
}

}  // namespace

const KernelTable* const* AvailableKernels() {
  static const Tables tables = Detect();
  return tables.data();
}

const KernelTable& Kernels() { return *Chosen().load(std::memory_order_relaxed); }

bool UseKernels(const char* name) {
  for (const KernelTable* const* table = AvailableKernels(); *table != nullptr; ++table) {
    if (std::strcmp((*table)->name, name) == 0) {
      Chosen().store(*table, std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

}  // namespace fedspine
