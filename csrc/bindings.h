// What the files that know Python share: addresses, checks, scratch memory.
#ifndef FEDSPINE_CSRC_BINDINGS_H_
#define FEDSPINE_CSRC_BINDINGS_H_

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>

#include "parallel.h"

namespace fedspine {

using Address = std::uintptr_t;  // Of a tensor's first element; 0 for none.

inline const float* In(Address address) { return reinterpret_cast<const float*>(address); }
inline float* Out(Address address) { return reinterpret_cast<float*>(address); }

inline void Require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

// Memory of the calling thread, aligned to 64 bytes, until its next call.
float* Scratch(Index floats);

// Defines the kernels of what stands between the linears: norms, activations, attention, loss.
void BindStep(pybind11::module_& m);

}  // namespace fedspine

#endif  // FEDSPINE_CSRC_BINDINGS_H_
