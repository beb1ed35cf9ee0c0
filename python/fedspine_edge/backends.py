"""Which kernels run: the native ones or the reference, and the native ones for which instruction set.

Stands between `reference` and `kernels`, which offers these functions to everyone else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch  # noqa: F401  # Loaded first: the extension then shares the OpenMP pool that torch has loaded.

try:
    from fedspine_edge import _native

    BACKENDS: tuple[str, ...] = ("native", "reference")
except ImportError:
    BACKENDS = ("reference",)

_backend: ContextVar[str] = ContextVar("fedspine_kernel_backend", default=BACKENDS[0])


def backend() -> str:
    """Returns `native`, or `reference` when the extension is not built or not in use."""
    return _backend.get()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces a backend within a `with` block, for tests.

    Args:
        name: `native` or `reference`.

    Raises:
        ValueError: There is no such backend here.
    """
    if name not in BACKENDS:
        raise ValueError(f"expected a backend of {', '.join(BACKENDS)}, found {name}")
    token = _backend.set(name)
    try:
        yield
    finally:
        _backend.reset(token)


def available_isas() -> tuple[str, ...]:
    """Returns the instruction sets this CPU runs and the extension has, best first; empty without the extension."""
    return tuple(_native.available_isas()) if "native" in BACKENDS else ()


def isa() -> str:
    """Returns the instruction set in use, `none` without the extension."""
    return _native.isa() if "native" in BACKENDS else "none"


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Forces an instruction set on the whole process within a `with` block, for tests.

    Args:
        name: One of `available_isas()`.

    Raises:
        ValueError: This CPU or this build has no such instruction set.
    """
    if name not in available_isas():
        raise ValueError(f"expected an instruction set of {', '.join(available_isas()) or 'none'}, found {name}")
    before = _native.isa()
    _native.use_isa(name)
    try:
        yield
    finally:
        _native.use_isa(before)
