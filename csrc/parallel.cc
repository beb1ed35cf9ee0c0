#include "parallel.h"

namespace fedspine {

void RunParts(Index num_parts, void (*task)(const void* context, Index part), const void* context) {
  if (num_parts <= 1) {
    if (num_parts == 1) task(context, 0);
    return;
  }
#ifdef _OPENMP
#pragma omp parallel for schedule(static, 1) num_threads(static_cast<int>(num_parts))
#endif
  for (Index part = 0; part < num_parts; ++part) task(context, part);
}

}  // namespace fedspine
