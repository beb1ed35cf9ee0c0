// x86-64 with AVX2 and FMA: 16 registers of 8 lanes.
#define FEDSPINE_TARGET avx2
#define FEDSPINE_LANES 8
#include "target-inl.h"
