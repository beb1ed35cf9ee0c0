// x86-64 with AVX-512 F, VL, BW and DQ: 32 registers of 16 lanes.
#define FEDSPINE_TARGET avx512
#define FEDSPINE_LANES 16
#include "target-inl.h"
