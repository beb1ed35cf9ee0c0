// AArch64: 32 registers of 4 lanes.
#define FEDSPINE_TARGET neon
#define FEDSPINE_LANES 4
#include "target-inl.h"
