"""The report of a run: every figure in `summary.json`, and one self-contained HTML page that shows them."""

from raypipe.report.page import build
from raypipe.report.summary import summarize

__all__ = ["build", "summarize"]
