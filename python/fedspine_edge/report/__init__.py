"""The report of a run: a run directory in, one self-contained HTML file out, or Markdown for a pull request."""

from __future__ import annotations

from fedspine_edge.report.markdown import markdown_report
from fedspine_edge.report.page import write_report

__all__ = ["markdown_report", "write_report"]
