// Any CPU: four lanes that the compiler maps to the baseline (SSE2, or plain code).
#define FEDSPINE_TARGET scalar
#define FEDSPINE_LANES 4
#include "target-inl.h"
