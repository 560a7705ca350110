"""Cells of CSV files that a spreadsheet does not take for formulas."""

from __future__ import annotations

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""A text that starts like this can be a formula; OWASP names these, fullwidth forms included."""


def guarded(value: str) -> str:
    """Return the text of a cell, after an apostrophe if a spreadsheet could run it as a formula."""
    return f"'{value}" if value.startswith(FORMULA_STARTS) else value


def guarded_path(path: str) -> str:
    """Return a relative path, as ./path if a spreadsheet could run it as a formula."""
    return f"./{path}" if path.startswith(FORMULA_STARTS) else path
