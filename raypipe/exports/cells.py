"""Cells of CSV files that a spreadsheet does not take for formulas."""

from __future__ import annotations

import re

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""A text that starts like this can be a formula; OWASP names these, fullwidth forms included."""

_NUMBER = re.compile(r"[-+]?[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]+)?")


def guarded(value: str) -> str:
    """Return the text of a cell, after an apostrophe if a spreadsheet could run it as a formula."""
    return f"'{value}" if _could_be_formula(value) else value


def guarded_path(path: str) -> str:
    """Return a relative path, as ./path if a spreadsheet could run it as a formula."""
    return f"./{path}" if _could_be_formula(path) else path


def _could_be_formula(value: str) -> bool:
    """Return whether a text starts like a formula and is not just a number, such as -1."""
    return value.startswith(FORMULA_STARTS) and _NUMBER.fullmatch(value) is None
