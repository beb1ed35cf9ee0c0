#include "parallel.h"

#include <dlfcn.h>
#include <link.h>

#include <atomic>
#include <cstring>

namespace fedspine {
namespace {

// What is called of an OpenMP runtime. libgomp, libomp and libiomp5 all offer these three, so one
// build runs on whichever pool the process has. Linking with -fopenmp instead would load a second
// libgomp beside torch's: its wheels carry one of a name of their own.
struct Runtime {
  void (*parallel)(void (*body)(void*), void* data, unsigned num_threads, unsigned flags);
  int (*thread_num)();
  int (*num_threads)();
};

bool Resolve(void* library, Runtime* runtime) {
  void* const parallel = dlsym(library, "GOMP_parallel");
  void* const thread_num = dlsym(library, "omp_get_thread_num");
  void* const num_threads = dlsym(library, "omp_get_num_threads");
  if (parallel == nullptr || thread_num == nullptr || num_threads == nullptr) return false;
  std::memcpy(&runtime->parallel, &parallel, sizeof(parallel));
  std::memcpy(&runtime->thread_num, &thread_num, sizeof(thread_num));
  std::memcpy(&runtime->num_threads, &num_threads, sizeof(num_threads));
  return true;
}

// Python loads libraries out of sight of each other, so the loaded ones are looked through by name.
int ResolveLoaded(dl_phdr_info* info, std::size_t, void* runtime) {
  const char* const slash = std::strrchr(info->dlpi_name, '/');
  const char* const name = slash == nullptr ? info->dlpi_name : slash + 1;
  if (std::strncmp(name, "libgomp", 7) != 0 && std::strncmp(name, "libomp", 6) != 0 &&
      std::strncmp(name, "libiomp5", 8) != 0) {
    return 0;
  }
  void* const library = dlopen(info->dlpi_name, RTLD_LAZY | RTLD_NOLOAD);  // Never closed again.
  return library != nullptr && Resolve(library, static_cast<Runtime*>(runtime)) ? 1 : 0;
}

// The pool of the process, else the system's; nothing in it when there is neither.
Runtime Find() {
  Runtime runtime = {};
  if (Resolve(RTLD_DEFAULT, &runtime)) return runtime;
  if (dl_iterate_phdr(ResolveLoaded, &runtime) != 0) return runtime;
  void* const library = dlopen("libgomp.so.1", RTLD_LAZY);
  if (library != nullptr) Resolve(library, &runtime);
  return runtime;
}

struct Work {
  const Runtime* runtime;
  Index num_parts;
  void (*task)(const void* context, Index part);
  const void* context;
};

void RunShare(void* data) {
  const Work& work = *static_cast<const Work*>(data);
  const Index step = work.runtime->num_threads();
  for (Index part = work.runtime->thread_num(); part < work.num_parts; part += step) {
    work.task(work.context, part);
  }
}

}  // namespace

void RunParts(Index num_parts, void (*task)(const void* context, Index part), const void* context) {
  static const Runtime runtime = Find();  // At the first call, when torch has loaded its own.
  if (num_parts <= 1 || runtime.parallel == nullptr) {
    for (Index part = 0; part < num_parts; ++part) task(context, part);
    return;
  }
  Work work = {&runtime, num_parts, task, context};
  runtime.parallel(RunShare, &work, static_cast<unsigned>(num_parts), 0);
}

}  // namespace fedspine
