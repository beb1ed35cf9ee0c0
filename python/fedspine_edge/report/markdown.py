"""The report of a run as Markdown, short enough for a pull request.

In: a checked run. Out: the headline figures, unpruned against pruned, and what happened in the rounds. Names that came
from outside cannot become markup.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from fedspine_edge.report import wording
from fedspine_edge.report.figures import Table, file_tables, headlines, model_table
from fedspine_edge.report.records import Run, read_run

MARKUP = re.compile(r"([\\`*_{}\[\]<>|#!@&~])")


def markdown_report(run_dir: Path) -> str:
    """Returns the report of a run directory.

    Raises:
        CheckpointError: An input is missing or malformed.
    """
    return _render(read_run(run_dir))


def _render(run: Run) -> str:
    summary = run.summary
    lines = [
        f"## {_plain(summary.name)}",
        "",
        f"{_plain(summary.model)} on {_plain(summary.data)}: {wording.plural(summary.num_devices, 'simulated device')},"
        f" {wording.plural(summary.rounds, 'round')}, controller {_plain(summary.controller)}, seed {summary.seed}."
        " Training is real, boards and seconds are a model.",
        "",
        *(f"- **{_plain(figure.value)} {figure.name}**: {_plain(figure.meaning)}" for figure in headlines(run)),
        "",
    ]
    for table in (model_table(run), *file_tables(summary)):
        lines += _table(table)
    states = Counter(device.state for record in run.rounds for device in record.devices)
    told = ", ".join(f"{states[state]} {state}" for state in ("merged", "late", "dropped", "rejected") if states[state])
    lines.append(
        f"Updates: {told}. Adapter `{(summary.adapter_sha256 or 'none')[:12]}`, {_plain(summary.machine.cpu)}."
    )
    return "\n".join(lines)


def _table(table: Table) -> list[str]:
    if not table.dense_name:
        head, rule = f"| {_plain(table.title)} | pruned |", "|---|---:|"
        rows = [f"| {line.name} | {_plain(line.pruned)} |" for line in table.lines]
    else:
        head, rule = f"| {_plain(table.title)} | unpruned | pruned | pruned is |", "|---|---:|---:|---:|"
        rows = [
            f"| {line.name} | {_plain(line.dense)} | {_plain(line.pruned)} | {_plain(line.verdict)} |"
            for line in table.lines
        ]
    return [head, rule, *rows, ""]


def _plain(text: str) -> str:
    return MARKUP.sub(r"\\\1", " ".join(text.split()))
