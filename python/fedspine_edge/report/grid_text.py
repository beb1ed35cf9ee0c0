"""The grid's figures beside the paper's, in words.

In: the summary of `grid_figures.summarise`. Out: lines for a terminal and for the page; what was not run says so.

Source: FedSpine (arXiv 2501.02438) for the paper's figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedspine_edge.report.grid_figures import NOT_RUN

DIFFERENCES = (
    "The paper trains RoBERTa and LLaMA-7B on 80 Jetson boards; these runs train MiniLM (22.7 M parameters) for real,"
    " on a virtual clock: step times follow a law measured with our kernels on x86, boards differ by the factors in"
    " docs/fleet.md, and no board has run them.",
    "Its tasks are GLUE-like; these are TREC-6, Reuters R8 and movie sentiment, from Python packages, split by seed.",
    "10 of 80 devices take part in a round, drawn alike for every method; the paper has all 80.",
    "Rivals are re-implemented in one program from their papers, simplified where methods.toml says so. All share one"
    " learning rate. Ours has settings of its own (methods.toml), chosen with TREC-6, seeds 0 and 7, in sight; no rival"
    " was tuned.",
)


@dataclass(frozen=True)
class Line:
    """One figure: what it is, ours, the bar, and what the paper says."""

    name: str
    ours: str
    goal: str
    paper: str


def told(found: Any, unit: str = "x", *, digits: int = 2) -> str:
    """Returns a figure with its spread: `1.62x (SD 0.20, n = 6) fedlora`; `not run` where there is none."""
    if not isinstance(found, Mapping):
        return NOT_RUN
    spread = "one run" if found["sd"] is None else f"SD {found['sd']:.{digits}f}, n = {found['n']}"
    bound = f", at least: {found['bounded']} never got there" if found.get("bounded") else ""
    return f"{found['value']:.{digits}f}{unit} ({spread}{bound})" + (f" {found['rival']}" if "rival" in found else "")


def lines(summary: Mapping[str, Any]) -> list[Line]:
    """Returns the figures of a summary beside their goals and the paper's."""
    cost, found = summary["cost_to_target"], []
    missed = cost.get("ours_not_reached", 0)
    note = f"; ours never got there in {missed} runs" if missed else ""
    found += [
        Line("time to target, rival over ours, closest rival", told(cost["min_ratio"]) + note, ">= 1.4x", "1.4x"),
        Line("the same, slowest rival", told(cost["vs_slowest"]), ">= 6.9x", "6.9x"),
        Line("the same, fedspine-paper", told(cost["vs_fedspine_paper"]), ">= 1.5x", "-"),
    ]
    common = summary["cost_to_common"]
    found.append(Line("time to the best common accuracy, closest rival", told(common["min_ratio"]), "-", "-"))
    goals = {"0.5": ">= -1", "0.7": ">= -2", "0.85": "-"}
    for sparsity, quality in summary["quality"].items():
        at = f"points at sparsity {sparsity} over "
        found += [
            Line(at + "the best pruning rival", told(quality["vs_best"], "", digits=1), ">= +1.0", "+0.4"),
            Line(at + "the weakest", told(quality["vs_weakest"], "", digits=1), ">= +4.5", "+4.5"),
            Line(at + "unpruned fedlora", told(quality["vs_dense"], "", digits=1), goals[sparsity], "-"),
        ]
    found += [
        Line("waiting, share of device time", told(summary["waiting_share"], ""), "<= 0.10", "-"),
        Line("the same, fedspine-paper", told(summary["waiting_share_paper"], ""), "-", "-"),
        Line(
            "bytes to target, ours over hetlora", told(summary["traffic_ratio"], ""), "<= 0.40", "0.70 (its abstract)"
        ),
        Line("points lost to 20 % attackers", told(summary["attackers_drop"], "", digits=1), "<= 2", "-"),
        Line("points lost to 20 % drop-outs", told(summary["dropouts_drop"], "", digits=1), "<= 1", "-"),
        Line("time to target with 20 % drop-outs", told(summary["dropouts_time"]), "<= 1.25x", "-"),
    ]
    return found


def as_text(summary: Mapping[str, Any]) -> str:
    """Returns the whole comparison as text."""
    rows = [("figure", "ours", "goal", "paper")] + [(x.name, x.ours, x.goal, x.paper) for x in lines(summary)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    notes = [f"- {text}" for text in DIFFERENCES]
    return "\n".join([f"{summary['num_results']} results", "", *table, "", "Differences from the paper:", *notes])
