// The upper half of a float32, which is how activations are kept for the backward.
#ifndef FEDSPINE_CSRC_BFLOAT16_H_
#define FEDSPINE_CSRC_BFLOAT16_H_

#include <cstdint>

namespace fedspine {

using Bfloat16 = std::uint16_t;

}  // namespace fedspine

#endif  // FEDSPINE_CSRC_BFLOAT16_H_
