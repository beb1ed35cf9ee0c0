"""Names of the formats that numbers may be held or sent in; kernels and server know them, and nothing else is here."""

from __future__ import annotations

BASE_DTYPES = ("float32", "bfloat16", "int8")  # how a device may hold the frozen weights (`gather.pack`)
UPDATE_DTYPES = ("float16", "int8", "int4")  # how an update's factors may travel (`quantized`)
