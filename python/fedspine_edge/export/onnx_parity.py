"""What an ONNX file may differ from its model, by precision.

In: the `Parity` of a file's logits with its model's. Out: nothing, or `VerificationError` where a bound is missed.
"""

from __future__ import annotations

from fedspine_edge.errors import VerificationError
from fedspine_edge.export.verify import Parity, Tolerance, missed_bound

ONNX_TOLERANCES = {
    "fp32": Tolerance(min_top1=0.999, max_kl=1e-6, max_dlogit=1e-3),
    "fp16": Tolerance(min_top1=0.98, max_kl=1e-3, max_dlogit=0.1),
    "int8": Tolerance(min_top1=0.85, max_kl=0.02),
}
"""By precision; beyond it a file is not shipped. SmolLM2-135M, 30 % pruned: largest logit difference at fp32 1e-4, fp16
0.023. MiniLM with a weakly trained head of six classes, many of its answers close calls: fp32 2e-6; int8 top-1
agreement 0.92, KL 0.002, and the same accuracy."""


def check_onnx_parity(parity: Parity, precision: str) -> None:
    """Raises VerificationError where a parity is below what the precision allows.

    Raises:
        ValueError: The precision is unknown.
        VerificationError: A bound is missed; NaN misses every bound.
    """
    if precision not in ONNX_TOLERANCES:
        raise ValueError(f"expected a precision of {', '.join(ONNX_TOLERANCES)}, found {precision!r}")
    missed = missed_bound(parity, ONNX_TOLERANCES[precision], precision)
    if missed:
        raise VerificationError(missed, hint="do not ship this file: take fp32, or report a fault if it fails")
