"""The grid of `fedspine reproduce`: which runs there are, in which order, and what each is asked.

Comes in: `reproduce.toml`, the methods. Goes out: cells, ordered so that any prefix of them is a comparison, and for
each its experiment as a table. A cell is known by its name; its settings' digest tells whether a stored result is still
of the same run.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fedspine_edge.config import Experiment, methods, settings_from
from fedspine_edge.errors import UsageError
from fedspine_server import step_law
from fedspine_server.settings import AGGREGATION_NAMES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

OURS = "spine"
BEST_FOUR = (OURS, "fedlora", "fedspine-paper", "fed-loraprune")  # a third seed
# Ours and the reference first, so that the first two results already say something.
METHODS = (OURS, "fedlora", "fedspine-paper", "hetlora", "fed-loraprune", "fedmp", "lora-then-prune", "fed-apt",
           "fedpruner", "flexlora", "flora")  # fmt: skip
TASKS = ("trec6", "r8", "sentiment")
SPARSITIES = (0.5, 0.7, 0.85)
MOST_RATIO = {0.5: 0.7, 0.7: 0.85, 0.85: 0.95}  # max_pruning_ratio for a target
HOSTILE = ("dropouts", "attackers", "dips")
SPLITS = (("trec6", "alpha-01"), ("trec6", "alpha-10"), ("sentiment", "domains"))
SPLIT_METHODS = (OURS, "fedlora", "fedspine-paper", "hetlora")
DECODER_METHODS = (OURS, "fedlora", "fedspine-paper", "fed-loraprune")
DECODER = "trec6-smollm2"
DECODER_SPARSITY = 0.3
PLAIN = "plain"
QUICK_ROUNDS = 8


@dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Attributes:
        task: A key of `[tasks]`.
        method: A key of `config.methods()`.
        sparsity: Target of a method that prunes; 0 for one that does not.
        seed: Seed of everything.
        variant: A key of `[variants]`.
    """

    task: str
    method: str
    sparsity: float
    seed: int
    variant: str = PLAIN

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"{self.task}.{self.variant}.{self.method}.s{100 * self.sparsity:02.0f}.seed{self.seed}"


@functools.cache
def tables() -> Mapping[str, Any]:
    """Returns what `reproduce.toml` holds."""
    return MappingProxyType(tomllib.loads((files("fedspine_edge") / "reproduce.toml").read_text(encoding="utf-8")))


def full_grid() -> list[Cell]:
    """Returns every run, the most telling first: all methods on one task, then tasks, sparsities, trouble, seeds."""
    cells: list[Cell] = []
    for seed in (0, 1):
        cells += [cell for task in TASKS for cell in _row(task, seed)]
        cells += [cell for s in SPARSITIES[1:] for task in TASKS for cell in _row(task, seed, sparsity=s)]
        cells += [_cell(task, OURS, seed, variant=variant) for variant in HOSTILE for task in TASKS]
        if seed == 0:
            cells += [_cell(task, name, 0, variant=variant) for task, variant in SPLITS for name in SPLIT_METHODS]
            cells += [_cell("trec6", OURS, 0, variant=variant) for variant in ablations()]
            cells += [_cell(DECODER, name, 0, sparsity=DECODER_SPARSITY) for name in DECODER_METHODS]
    cells += [_cell(task, name, 2) for task in TASKS for name in BEST_FOUR]
    cells += [_cell("trec6", OURS, 1, variant=variant) for variant in ablations()]
    return cells


def quick_grid() -> list[Cell]:
    """Returns the runs of `--quick`: every method once on one task, in fewer rounds."""
    return _row("trec6", 0)


def ablations() -> list[str]:
    """Returns the variants that change one thing about ours."""
    others = {PLAIN, *HOSTILE, *(variant for _, variant in SPLITS)}
    return [name for name in tables()["variants"] if name not in others]


def _row(task: str, seed: int, *, sparsity: float = SPARSITIES[0]) -> list[Cell]:
    known = methods()
    names = [name for name in METHODS if known[name].prunes or sparsity == SPARSITIES[0]]
    return [_cell(task, name, seed, sparsity=sparsity) for name in names]


def _cell(task: str, name: str, seed: int, *, sparsity: float = SPARSITIES[0], variant: str = PLAIN) -> Cell:
    return Cell(task, name, sparsity if methods()[name].prunes else 0.0, seed, variant)


def missing(cell: Cell) -> str | None:
    """Returns why a cell cannot be run in this version; None when it can."""
    if cell.variant not in tables()["variants"]:
        return f"no variant {cell.variant} in this version"
    rule = methods()[cell.method].run.get("aggregation")
    return None if rule is None or rule in AGGREGATION_NAMES else f"no aggregation {rule} in this version"


def table_of(cell: Cell, laws: Path, *, quick: bool = False) -> dict[str, Any]:
    """Returns a cell's experiment.

    Args:
        cell: The run.
        laws: Folder of the measured step-time laws.
        quick: Whether it is run in fewer rounds.

    Raises:
        UsageError: The law of the task's model is missing.
    """
    all_tables = tables()
    task = {key: value for key, value in all_tables["tasks"][cell.task].items() if key != "title"}
    variant = {key: value for key, value in all_tables["variants"][cell.variant].items() if key != "title"}
    table = methods()[cell.method].applied_to(_merged(all_tables["all"], task))
    run = {"target_sparsity": cell.sparsity}
    if cell.sparsity in MOST_RATIO:
        run["max_pruning_ratio"] = MOST_RATIO[cell.sparsity]
    if quick:
        run["rounds"] = QUICK_ROUNDS
    law = step_law.read(laws / f"step-law-{table['model'].split('-')[0]}.json")
    world = {"run": run, "fleet": {"step_law": [law.constant, law.kept, law.lora]}, "seed": cell.seed}
    table = _merged(_merged(table, world), variant)
    settings_from(Experiment, table, where=cell.name)
    return table


def digest(table: Mapping[str, Any]) -> str:
    """Returns a short hash of an experiment's settings."""
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()[:16]


def chosen(cells: Sequence[Cell], only: str | None) -> list[Cell]:
    """Returns the cells whose name holds a text.

    Raises:
        UsageError: None does.
    """
    found = [cell for cell in cells if only is None or only in cell.name]
    if not found:
        raise UsageError(
            f"expected a run whose name holds {only!r}, found none", hint=f"names look like {cells[0].name}"
        )
    return found


def _merged(table: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """One table over another; the tables in them likewise, except that an empty one replaces what was there."""
    both = dict(table)
    for key, value in over.items():
        inner = both.get(key)
        both[key] = (
            _merged(inner, value)
            if inner and isinstance(inner, Mapping) and isinstance(value, Mapping) and value
            else value
        )
    return both
