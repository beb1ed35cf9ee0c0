"""Settings: a preset or a TOML file, the environment and the flags -> typed, checked settings.

Comes in: tables of plain values. Goes out: dataclasses. An unknown key is an error that names the nearest known one;
the defaults stand in the dataclasses and nowhere else.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from fedspine_edge.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Experiment:
    """What a simulated run is about; the run's own settings and the fleet are tables of their own.

    Attributes:
        model: A packaged model's name, a model directory, or a GGUF file.
        data: `trec6`, `r8`, `sentiment`, `sentiment-domains`, or a .jsonl or .csv file with text and label.
        prompt: Template with `{text}` for a decoder.
        held_out: Rows the result is judged by.
        validation: Rows the run is followed with.
        validate_every: Rounds between two looks at the validation rows.
        max_tokens: Texts are cut to that many tokens.
        dirichlet_alpha: How alike the devices' shards are; small = each sees few classes.
        by_domain: Whether each device has texts of one domain instead (`sentiment-domains`).
        dense_reference: Whether the same run is also made unpruned, to compare with.
        quantizations: GGUF formats to export; none for an encoder.
        seed: Seed of the split, the shards, the fleet and the run.
        engine: What does the devices' rounds: `processes` on this machine, or `ray`. The result is the same.
        ray_address: A running Ray cluster; empty starts one on this machine.
        run: Settings of the rounds.
        fleet: The devices of a simulated or emulated fleet.
        link: With real devices: `classes` where the server has no data, and how rounds are held.
    """

    model: str
    data: str
    prompt: str = "{text}\nLabel:"
    held_out: int = 500
    validation: int = 100
    validate_every: int = 1
    max_tokens: int = 128
    dirichlet_alpha: float = 1.0
    by_domain: bool = False
    dense_reference: bool = True
    quantizations: tuple[str, ...] = ("F16", "Q8_0")
    seed: int = 0
    engine: Literal["processes", "ray"] = "processes"
    ray_address: str = ""
    run: dict[str, Any] = field(default_factory=dict)
    fleet: dict[str, Any] = field(default_factory=dict)
    link: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.prompt.count("{text}") != 1:
            raise ValueError(f"prompt must hold {{text}} once, found {self.prompt!r}")
        for name in ("held_out", "validation", "validate_every", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if not self.dirichlet_alpha > 0:
            raise ValueError(f"dirichlet_alpha must be positive, found {self.dirichlet_alpha}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, found {self.seed}")


def presets() -> list[str]:
    """Returns the names of the shipped presets."""
    folder = files("fedspine_edge") / "presets"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_table(name_or_path: str) -> dict[str, Any]:
    """Returns the table of a preset or of a TOML file.

    Raises:
        UsageError: Unknown preset (the nearest is named), missing file, or not TOML.
    """
    path = Path(name_or_path)
    if path.suffix == ".toml":
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read {path}: {error}") from error
    elif name_or_path in presets():
        text = (files("fedspine_edge") / "presets" / f"{name_or_path}.toml").read_text(encoding="utf-8")
    else:
        raise UsageError(
            f"expected a preset or a .toml file, found {name_or_path!r}",
            hint=nearest(name_or_path, presets()),
        )
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"expected TOML in {name_or_path}, found: {error}") from error


@dataclass(frozen=True)
class Method:
    """A federated LoRA method, ours or a published one, as settings.

    Attributes:
        paper: What it is after.
        simplified: How it differs from what its authors describe.
        prunes: Whether it ends at the run's target sparsity.
        run: Settings of the rounds in which it differs from the run's.
    """

    paper: str
    simplified: str
    prunes: bool
    run: dict[str, Any]

    def applied_to(self, table: Mapping[str, Any]) -> dict[str, Any]:
        """Returns an experiment's table with this method's settings over its own."""
        run = {**table.get("run", {}), **self.run}
        return {**table, "run": run if self.prunes else {**run, "target_sparsity": 0.0}}


@functools.cache
def methods() -> Mapping[str, Method]:
    """Returns every method by name."""
    text = (files("fedspine_edge") / "methods.toml").read_text(encoding="utf-8")
    found = {
        name: settings_from(Method, table, where=f"methods.toml [{name}]")
        for name, table in tomllib.loads(text).items()
    }
    return MappingProxyType(found)


def method(name: str) -> Method:
    """Returns the method of that name.

    Raises:
        UsageError: There is none (the nearest is named).
    """
    known = methods()
    if name not in known:
        raise UsageError(f"expected a method, found {name!r}", hint=nearest(name, known))
    return known[name]


def settings_from(kind: type[Settings], table: Mapping[str, Any], *, where: str) -> Settings:
    """Returns a dataclass filled from a table.

    Args:
        kind: The dataclass.
        table: Its values.
        where: What the table is called in messages.

    Raises:
        UsageError: An unknown key (the nearest is named), a missing one, a value of the wrong type or out of range.
    """
    known = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in table:
        if key not in known:
            raise UsageError(f"unknown key {key!r} in {where}", hint=nearest(key, known))
    try:
        return TypeAdapter(kind).validate_python(dict(table))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise UsageError(f"{where}{': ' + place if place else ''}: {message}") from error


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns a hint that names the known word nearest to a given one, and all of them when none is near."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(names)}"


def cache_directory() -> Path:
    """Returns where unpacked models are kept: `FEDSPINE_CACHE`, else the user's cache directory."""
    if override := os.environ.get("FEDSPINE_CACHE"):
        return Path(override)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedspine-edge"
