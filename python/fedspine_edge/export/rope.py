"""Rotary embeddings as a config states them, and as GGUF wants them.

In: a transformers config, of the form before (`rope_theta`, `rope_scaling`) or after 5.0 (`rope_parameters`).
Out: a `Rope`, or IncompatibleError for a scaling that the exporter does not carry.

Source: transformers modeling_rope_utils (`_compute_llama3_parameters`); llama.cpp conversion/llama.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedspine_edge.errors import IncompatibleError

KINDS = ("default", "linear", "llama3")


@dataclass(frozen=True)
class Rope:
    """How positions turn into angles.

    Attributes:
        theta: Base of the frequencies.
        kind: One of `KINDS`.
        factor: How many times longer the context has become; 1 for `default`.
        low_freq_factor: Llama 3's bound of the frequencies that are divided by `factor`.
        high_freq_factor: Llama 3's bound of the frequencies that stay.
        original_context: Llama 3's context before the scaling.
    """

    theta: float
    kind: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


def rope_of(config: Mapping[str, Any]) -> Rope:
    """Returns the rotary embedding of a config.

    Raises:
        IncompatibleError: A scaling other than `KINDS`.
    """
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(parameters.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in KINDS:
        raise IncompatibleError(f"expected rope scaling of kind {', '.join(KINDS)}, found {kind!r}")
    if kind == "default":
        return Rope(theta=theta, kind=kind)
    factor = float(parameters["factor"])
    if kind == "linear":
        return Rope(theta=theta, kind=kind, factor=factor)
    return Rope(
        theta=theta,
        kind=kind,
        factor=factor,
        low_freq_factor=float(parameters["low_freq_factor"]),
        high_freq_factor=float(parameters["high_freq_factor"]),
        original_context=int(parameters["original_max_position_embeddings"]),
    )


def llama3_factors(rope: Rope, head_dim: int) -> np.ndarray:
    """Returns what llama.cpp divides each frequency by, float32 [head_dim / 2]."""
    frequencies = rope.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = rope.original_context * frequencies / (2 * math.pi)
    share = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = np.clip(share, 0.0, 1.0)
    factors: np.ndarray = (1.0 / ((1.0 - smooth) / rope.factor + smooth)).astype(np.float32)
    return factors
