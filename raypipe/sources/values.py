"""Stored values as raypipe uses them: labels, text, and the reason of a reject."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Any

from raypipe.storage import Reader
from raypipe.text import error_text

MAX_DIGITS = 18
"""Digits of a whole number that can be a label."""

_WHOLE_NUMBER = re.compile(r"([+-]?[0-9]{1,18})(\.0*)?")
BINARY = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")
"""Characters that text has none of, but numbers stored as raw bytes have."""


def number_or_name(text: str) -> int | str | None:
    """Return the number if the text is a whole one, else the text; None for blank text.

    "3.0" is a whole number too: tables write integers this way next to missing values.
    """
    text = text.strip()
    number = _WHOLE_NUMBER.fullmatch(text)
    return int(number[1]) if number is not None else text or None


def padded_spelling(text: str) -> str:
    """Return a whole number as the text spells it if another spelling is usual; "" otherwise.

    "01" and "+1" are such spellings of 1. "1.0" is not, because tables write it for 1.
    """
    number = _WHOLE_NUMBER.fullmatch(text.strip())
    return number[1] if number is not None and number[1] != str(int(number[1])) else ""


def stored_label(value: Any) -> tuple[int | str | None, str]:
    """Return a stored value as a label.

    Whole numbers stored as floating point count as numbers. Null, NaN and blank text are missing
    labels.

    Returns
    -------
    label : int, str or None
        A class number or name; None if it is missing or invalid.
    reason : str
        Why the value cannot be a label; "" if it can.
    """
    if (
        value is None
        or (isinstance(value, str) and not value.strip())
        or (isinstance(value, float) and math.isnan(value))
    ):
        return None, ""
    if isinstance(value, str) and not BINARY.search(value):
        return printable(value), ""
    if isinstance(value, int):  # includes bool
        return int(value), ""
    if isinstance(value, float) and value.is_integer():
        return int(value), ""
    # int() of 1e999999999 would write out all digits
    whole = isinstance(value, Decimal) and value.is_finite() and value.adjusted() <= MAX_DIGITS
    if whole and value == int(value):
        return int(value), ""
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:60] + "..."
    return None, f"label is not a number or a name: {shown}"


def damage_reason(file: Reader, error: BaseException) -> str:
    """Return the reject reason for content that cannot be read.

    Libraries raise the same exceptions for damaged content and for failed reads; if the read
    failed, this raises the storage fault instead.
    """
    if file.fault is not None:
        raise file.fault
    if isinstance(error, MemoryError):
        return "it needs more memory than is available"
    return error_text(error)


def printable(text: str) -> str:
    """Return text that can be encoded as UTF-8.

    Bytes of file names that are not UTF-8, and lone surrogates, are shown escaped.
    """
    if text.isascii():
        return text
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace").decode()
