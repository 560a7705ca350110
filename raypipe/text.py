"""Durations, sizes, counts, shares and percentages as people read them, and causes of faults."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

JUDGED_ON = {
    "audit": "audit samples outside the seed set",
    "rehearsal": "seed samples that a second proxy was not trained on",
    "direct": "samples",
    "cross-fit": "measured samples that nothing was fitted to",
    "seed": "seed samples held out of the fit",
    "scored": "scored samples held out of the fit",
}
"""What fidelity was measured on, by the value of `judged_on`."""
STAND_INS = {
    b"version https://git-lfs": "a Git LFS pointer instead of the file; run `git lfs pull`",
    b"<!doctype html": "an HTML page instead of the file, as failed downloads leave it",
    b"<html": "an HTML page instead of the file, as failed downloads leave it",
    b"<?xml": "an XML document instead of the file: an error of a store, or an SVG",
}
"""What is stored in place of a file, by its first bytes in lower case."""


def stand_in(head: bytes) -> str:
    """Return what is stored in place of a file, by its first bytes; "" for anything else."""
    start = head.lstrip()[:32].lower()
    return next((what for mark, what in STAND_INS.items() if start.startswith(mark)), "")


def error_text(error: object, limit: int = 300) -> str:
    """Return the message of an error as one line of at most `limit` characters.

    An error without a message is named by its class.
    """
    return " ".join(str(error).split())[:limit] or type(error).__name__


def error_line(error: BaseException) -> str:
    """Return class and message of an error as one line."""
    name, message = type(error).__name__, error_text(error)
    return name if message == name else f"{name}: {message}"


@dataclass(frozen=True)
class HeadlineFidelity:
    """The correlation that decides how far to trust the scores.

    Attributes
    ----------
    spearman, low, high
        Spearman correlation of predicted and measured scores, and its 95 % interval; None if
        unknown.
    within
        Whether it is that within classes.
    overall
        The correlation over all classes, if `within`.
    """

    spearman: float | None
    low: float | None
    high: float | None
    within: bool = False
    overall: float | None = None

    @classmethod
    def of(cls, figures: Mapping[str, Any], within_classes: bool) -> HeadlineFidelity:
        """Choose from the figures of `raypipe.assessment.fidelity.Fidelity`.

        Where keep-lists are cut within classes, this is the correlation within classes. Runs of
        version 0.2.0 or older, and sources without labels, have only the one over all.
        """
        within = within_classes and figures.get("spearman_within") is not None
        name = "spearman_within" if within else "spearman"
        low, high = figures.get(f"{name}_interval") or (
            figures.get(f"{name}_low"),
            figures.get(f"{name}_high"),
        )
        overall = figures.get("spearman") if within else None
        return cls(figures.get(name), low, high, within, overall)


MIN_ACCURACY_OVER_CHANCE = 0.05
"""Smallest gain of a proxy over chance, as a share of the distance from chance to 1."""


def beats_chance(accuracy: float, chance: float, error: float, least: float) -> bool:
    """Return whether an accuracy is clearly above chance.

    That is by two standard errors, and by the share `least` of the distance from chance to 1.
    """
    return chance >= 1 or accuracy - chance >= max(2 * error, least * (1 - chance))


def weak_proxy(figures: Mapping[str, Any], least: float = MIN_ACCURACY_OVER_CHANCE) -> str:
    """Return a sentence if the proxy hardly beats chance on unseen samples; else nothing.

    It beats chance if its accuracy beats the share of the largest class, or its mean accuracy over
    classes beats one divided by their number: in a very uneven set, only the second shows that a
    proxy recognises the rare classes.
    """
    accuracy, guess = figures.get("proxy_accuracy"), figures.get("proxy_chance")
    if accuracy is None or guess is None or least == -1:
        return ""
    error = (guess * (1 - guess) / max(1, figures.get("n_held") or 1)) ** 0.5
    if beats_chance(accuracy, guess, error, least):
        return ""
    balanced = figures.get("proxy_balanced")
    if balanced and beats_chance(
        balanced["accuracy"], balanced["chance"], balanced["error"], least
    ):
        return ""
    return (
        f"The proxy hardly beats chance on these samples (accuracy {100 * accuracy:.0f} %, the "
        f"largest class is {100 * guess:.0f} %), so the measured scores say little about them: "
        "train it for more epochs (proxy.epochs) or on more samples (seed.fraction)."
    )


def stability_for_cut(stability: Mapping[str, Any], within_classes: bool) -> dict[str, Any]:
    """Return the stability by the ranks that keep-lists are cut by: within classes or over all.

    `stability` is JSON data of `raypipe.assessment.stability.Stability`, or empty. That of older
    runs stays as it is: it was stored for one way of cutting only.
    """
    figures = stability.get("within" if within_classes else "over_all")
    if not figures:
        return dict(stability)
    return {**stability, **figures, "within_classes": within_classes}


def proxy_accuracy(figures: Mapping[str, Any]) -> str:
    """Return the accuracy of the proxy next to chance; nothing where it is unknown."""
    accuracy, guess = figures.get("proxy_accuracy"), figures.get("proxy_chance")
    if accuracy is None or guess is None:
        return ""
    trained = "" if figures.get("judged_on") == "seed" else "not "
    return (
        f"accuracy {100 * accuracy:.0f} % on {figures.get('n_held') or 0:,} samples that it was "
        f"{trained}trained on; always guessing the largest class: {100 * guess:.0f} %"
    )


def duration(seconds: float) -> str:
    """Return seconds in the unit a person would use: "40 s", "2.5 min", "17 h"."""
    for limit, unit, length in ((90, "s", 1), (90 * 60, "min", 60), (48 * 3600, "h", 3600)):
        if seconds < limit:
            number = seconds / length
            return (
                f"{number:.1f} {unit}" if 0 < number < 3 and unit != "s" else f"{number:.0f} {unit}"
            )
    return f"{seconds / 86400:.1f} days" if seconds < 10 * 86400 else f"{seconds / 86400:,.0f} days"


def duration_range(low: float, high: float) -> str:
    """Return a range of seconds, such as "4 to 12 min"."""
    first, second = duration(low), duration(high)
    if first == second:
        return f"about {first}"
    (number, unit), (_, other_unit) = first.rsplit(" ", 1), second.rsplit(" ", 1)
    return f"{number} to {second}" if unit == other_unit else f"{first} to {second}"


def hours(value: float) -> str:
    """Return hours without their unit: two decimals below ten."""
    return f"{value:,.2f}" if value < 10 else f"{value:,.0f}"


def size(count: float) -> str:
    """Return bytes in the unit a person would use: "512 B", "3.2 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1000 or unit == "TiB":
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def plural(count: float, noun: str, nouns: str = "") -> str:
    """Return the noun for a count; `nouns` is its plural where adding an s is not enough."""
    return noun if count == 1 else nouns or f"{noun}s"


def counted(count: float, noun: str, nouns: str = "") -> str:
    """Return a count and its noun: "1 file", "2,000 files"."""
    return f"{count:,} {plural(count, noun, nouns)}"


def large_count(count: float) -> str:
    """Return a whole number, from a million on in millions: "250,000", "1.2 M"."""
    return f"{count:,.0f}" if count < 1e6 else f"{count / 1e6:,.1f} M"


def percent(share: float, digits: int = 2) -> str:
    """Return a share as a percentage with `digits` significant digits: "0.031 %", "42 %"."""
    value = 100 * share
    return f"{value:.{digits}g} %" if value < 10**digits - 0.5 else f"{value:.0f} %"


def rough_percent(share: float) -> str:
    """Return a share in whole percent that is rounded neither to nothing nor to everything."""
    if 0.005 <= share < 0.995 or share == 1:
        return f"{share:.0%}"
    return "over 99%" if share > 0.5 else "under 1%"


def mean_and_margin(figure: Mapping[str, Any], form: str, minus: str = "-") -> str:
    """Return a mean, times 100, and the half-width of its interval: "61.3 ± 0.8".

    Parameters
    ----------
    figure
        Has `mean` and `low`, both as shares; `low` is None where there is no interval.
    form
        Format of the mean, such as "{:.1f}".
    minus
        Sign of a negative mean.
    """
    mean = form.format(100 * figure["mean"]).replace("-", minus)
    if figure["low"] is None:
        return mean
    return f"{mean} ± {100 * (figure['mean'] - figure['low']):.1f}"


def points(share: float, minus: str = "-") -> str:
    """Return a difference of accuracies in percentage points, with its sign: "+2.1"."""
    return f"{100 * share:+.1f}".replace("-", minus)


def table(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> Iterator[str]:
    """Yield the lines of a table; the columns in `left` are aligned left, the others right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()
