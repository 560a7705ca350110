"""The report of a run: all figures in `summary.json`, and a self-contained HTML page."""

from raypipe.report.page import build
from raypipe.report.summary import summarize

__all__ = ["build", "summarize"]
