"""Durations, sizes, counts and shares as people read them."""

from __future__ import annotations

JUDGED_ON = {
    "audit": "audit samples outside the seed set",
    "rehearsal": "seed samples that a second proxy was not trained on",
    "seed": "seed samples held out of the fit",
    "scored": "scored samples held out of the fit",
}


def duration(seconds: float) -> str:
    """Seconds in the unit a person would use."""
    for limit, unit, length in ((90, "s", 1), (90 * 60, "min", 60), (48 * 3600, "h", 3600)):
        if seconds < limit:
            number = seconds / length
            return (
                f"{number:.1f} {unit}" if 0 < number < 3 and unit != "s" else f"{number:.0f} {unit}"
            )
    return f"{seconds / 86400:.1f} days" if seconds < 10 * 86400 else f"{seconds / 86400:,.0f} days"


def size(count: float) -> str:
    """Bytes in the unit a person would use."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1000 or unit == "TiB":
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")
