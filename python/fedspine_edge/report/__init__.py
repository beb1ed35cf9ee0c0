"""The report of a run: a run directory in, one self-contained HTML file out; see `page.write_report`."""

from __future__ import annotations

from fedspine_edge.report.page import write_report

__all__ = ["write_report"]
