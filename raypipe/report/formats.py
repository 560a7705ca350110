"""Numbers and settings as the report shows them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raypipe.text import mean_and_margin
from raypipe.text import points as points_of

SPACE = "\u202f"
"""Narrow and non-breaking, between a number and its unit."""
MINUS = "−"


def count(value: float | None) -> str:
    """Return a whole number with thousands separators."""
    return "–" if value is None else f"{value:,.0f}"


def share(value: float | None, digits: int = 1) -> str:
    """Return a share in percent: 0.125 -> 12.5 %.

    Trailing zeros are dropped. A share between nothing and everything is rounded to neither.
    """
    if value is None:
        return "–"
    smallest = 0.5 * 0.1 ** (digits + 2)
    if 0 < value < smallest or 1 - smallest < value < 1:
        return f"{'<' if value < smallest else '>'}{1 if value < smallest else 99}{SPACE}%"
    text = f"{100 * value:.{digits}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text) + SPACE + "%"


def number(value: float | None, digits: int = 3) -> str:
    """Return a score to `digits` significant digits."""
    if value is None:
        return "–"
    text = f"{value:#.{digits}g}".rstrip(".").replace(".e", "e")
    return text.replace("-", MINUS).replace(f"e{MINUS}0", f"e{MINUS}").replace("e+0", "e")


def fixed(value: float | None, digits: int = 2) -> str:
    """Return a correlation."""
    return "–" if value is None else f"{value:.{digits}f}".replace("-", MINUS)


def accuracy(figure: Mapping[str, Any] | None, digits: int = 1) -> str:
    """Return an accuracy with the half-width of its interval: 61.3 ± 0.8 %."""
    if figure is None:
        return "–"
    return mean_and_margin(figure, f"{{:.{digits}f}}", MINUS) + SPACE + "%"


def points(figure: Mapping[str, Any] | None) -> str:
    """Return the difference of two accuracies in percentage points: +1.3 ± 0.8."""
    return "–" if figure is None else mean_and_margin(figure, "{:+.1f}", MINUS)


def plain_points(share: float) -> str:
    """Return a difference of accuracies in percentage points: +1.3."""
    return points_of(share, MINUS)


def money(value: float | None) -> str:
    """Return dollars, with cents for small amounts."""
    if value is None:
        return "–"
    return "<$0.01" if 0 < value < 0.005 else f"${value:,.2f}" if value < 100 else f"${value:,.0f}"


def price(value: float) -> str:
    """Return dollars an hour."""
    return f"${value:,g}"


def seconds(value: float | None) -> str:
    """Return a duration in its two largest units."""
    if value is None:
        return "–"
    if value < 10:
        return f"{value:.1f}{SPACE}s"
    whole = round(value)
    for size, unit, part_size, part in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= size:
            rest = whole % size // part_size
            return f"{whole // size}{SPACE}{unit}" + (f" {rest}{SPACE}{part}" if rest else "")
    return f"{whole}{SPACE}s"


def setting(value: Any) -> str:
    """Return a setting roughly as YAML has it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {setting(item)}" for name, item in value.items())
    return ", ".join(map(setting, value)) if isinstance(value, list | tuple) else str(value)
