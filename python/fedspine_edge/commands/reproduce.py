"""`fedspine reproduce`: runs the grid of methods, tasks and seeds, and says what came of it.

Comes in: a folder of results, which may hold some already. Goes out: the missing results, one JSON file each; from all
of them the summary and a page of plots. Killed at any moment it goes on where it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedspine_edge.atomic import write_bytes
from fedspine_edge.commands.engines import Engine
from fedspine_edge.commands.reproduce_grid import Cell, chosen, digest, full_grid, missing, quick_grid, table_of
from fedspine_edge.commands.reproduce_run import read_result, run_cell
from fedspine_edge.errors import CheckpointError
from fedspine_edge.live import LiveView
from fedspine_edge.report.grid_figures import summarise
from fedspine_edge.report.grid_page import render
from fedspine_edge.report.grid_text import as_text


@dataclass(frozen=True)
class Wanted:
    """What to run and where.

    Attributes:
        results: Folder of results.
        laws: Folder of measured step-time laws.
        work: Folder of runs under way.
        quick: One task, one seed, fewer rounds.
        only: Run only cells whose name holds this.
        engine: Who does the devices' rounds; the results do not depend on it.
    """

    results: Path
    laws: Path
    work: Path
    quick: bool
    only: str | None
    engine: Engine


def cells_of(wanted: Wanted) -> list[Cell]:
    """Returns the runs that are asked for."""
    return chosen(quick_grid() if wanted.quick else full_grid(), wanted.only)


def run_grid(wanted: Wanted, *, tell: Callable[[str], None]) -> None:
    """Runs what is not there yet; a result of other settings is run anew.

    Raises:
        FedSpineError: A run failed; what is finished stays.
    """
    cells = cells_of(wanted)
    for number, cell in enumerate(cells, start=1):
        reason = missing(cell)
        if reason is not None:
            tell(f"{number}/{len(cells)} {cell.name}: not run, {reason}")
            continue
        table = table_of(cell, wanted.laws, quick=wanted.quick)
        known = read_result(wanted.results, cell)
        if known is not None and known["digest"] == digest(table):
            continue
        start = time.monotonic()
        with LiveView(quiet=True) as live:
            found = run_cell(cell, table, work=wanted.work, results=wanted.results, engine=wanted.engine, live=live)
        tell(
            f"{number}/{len(cells)} {cell.name}: accuracy {found['accuracy']:.3f} at {found['reached_sparsity']:.2f},"
            f" {found['virtual_seconds']:.0f} virtual s, {time.monotonic() - start:.0f} s"
        )


def stored(wanted: Wanted) -> list[dict[str, Any]]:
    """Returns the grid's results that are there; one of other settings than the grid's counts as absent."""
    found = []
    for cell in cells_of(wanted):
        document = read_result(wanted.results, cell)
        if document is None or missing(cell) is not None:
            continue
        if document["digest"] == digest(table_of(cell, wanted.laws, quick=wanted.quick)):
            found.append(document)
    return found


def summary_of(wanted: Wanted, page: Path | None) -> dict[str, Any]:
    """Returns the figures of the results that are there, and writes the page of plots.

    Raises:
        CheckpointError: No result at all, or the page cannot be written.
    """
    documents = stored(wanted)
    if not documents:
        raise CheckpointError(f"expected results in {wanted.results}, found none", hint="fedspine reproduce --quick")
    if page is not None:
        write_bytes(page, render(documents).encode())
    return {**summarise(documents), "num_cells": len(cells_of(wanted))}


def as_json(summary: dict[str, Any]) -> str:
    """Returns the summary as one JSON document."""
    return json.dumps(summary, indent=2)


__all__ = ["Wanted", "as_json", "as_text", "cells_of", "run_grid", "summary_of"]
