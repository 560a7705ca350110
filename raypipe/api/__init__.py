"""The Python API: the commands of `raypipe` as functions, and `load_scores`."""

from __future__ import annotations

from raypipe.api.finished import evaluate, export, load_scores, select
from raypipe.api.preview import inspect
from raypipe.api.runs import Result, attach, extrapolate, run, summary_of

__all__ = [
    "Result",
    "attach",
    "evaluate",
    "export",
    "extrapolate",
    "inspect",
    "load_scores",
    "run",
    "select",
    "summary_of",
]
