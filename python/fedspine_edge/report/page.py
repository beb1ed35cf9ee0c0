"""One self-contained HTML page of a run: no request to anywhere, the same bytes for the same run.

In: a run directory as `records.read_run` checks it. Out: `report.html` beside its inputs, written whole or not at all.
"""

from __future__ import annotations

import os
from pathlib import Path

import jinja2

from fedspine_edge.errors import CheckpointError
from fedspine_edge.report import wording
from fedspine_edge.report.curves import curve
from fedspine_edge.report.figures import file_tables, headlines, layer_bars, model_table, waiting_share
from fedspine_edge.report.fleet import fleet_order, heat_maps, name_width, timelines
from fedspine_edge.report.records import Run, read_run

MAX_EXAMPLES = 12


def write_report(run_dir: Path) -> Path:
    """Writes `report.html` into a run directory and returns its path.

    Args:
        run_dir: Directory with `summary.json`, `rounds.jsonl` and optionally `rounds_dense.jsonl`.

    Raises:
        CheckpointError: An input is missing or malformed, or the page cannot be written.
    """
    page = render(read_run(run_dir))
    target = run_dir / "report.html"
    partial = run_dir / f".report.html.{os.getpid()}"
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {target}: {error.strerror}", hint="check space and permissions") from error
    return target


def palette() -> str:
    """Returns the colours that every report shares."""
    return Path(__file__).with_name("palette.css").read_text(encoding="utf-8")


def render(run: Run) -> str:
    """Returns the page of a run."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(Path(__file__).with_name("template.html").read_text(encoding="utf-8"))
    drawn = timelines(run.rounds)
    return template.render(
        palette=palette(),
        summary=run.summary,
        headlines=headlines(run),
        curve=curve(run),
        timelines=drawn,
        shown_round=next((line.number for line in drawn if line.trouble), drawn[-1].number),
        num_rounds=len(run.rounds),
        waiting=waiting_share(run.rounds),
        heat_maps=heat_maps(run.rounds),
        name_width=name_width(run.rounds),
        layers=layer_bars(run.summary),
        tables=(model_table(run), *file_tables(run.summary)),
        last_round=run.rounds[-1].round_index + 1,
        choices=sorted((d for d in run.rounds[-1].devices if d.state != "away"), key=fleet_order),
        examples=(run.summary.examples or ())[:MAX_EXAMPLES],
        wording=wording,
    )
