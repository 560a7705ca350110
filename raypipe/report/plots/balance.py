"""Class balance before and after each keep-list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from raypipe.report import formats
from raypipe.report.plots.base import (
    INK,
    MUTED,
    SCORE_COLOURS,
    STYLE,
    as_svg,
    legend_above,
    light_grid,
    new_figure,
    rc_context,
    short,
)

MARKS = ("o", "s", "^", "D", "v", "P")
MAX_LISTS = len(MARKS)
"""Keep-lists in a plot; of more, the plot shows this many, evenly spread over the fractions."""
POINTS = 200
"""Points of a curve over all classes, at most."""


ListShares = tuple[float, Sequence[float]]
"""Keep fraction of a list, and a share for each class."""


def evenly_chosen(lists: Sequence[ListShares]) -> list[ListShares]:
    """Return at most MAX_LISTS of them, the first and the last included."""
    if not lists:
        return []
    places = np.unique(np.linspace(0, len(lists) - 1, MAX_LISTS).astype(int))
    return [lists[place] for place in places]


def _colour(place: int, lists: int) -> Any:
    return SCORE_COLOURS(place / max(lists - 1, 1))


def class_shares(names: Sequence[str], before: Sequence[float], after: Sequence[ListShares]) -> str:
    """Draw the share of each class in the source (line) and in each keep-list (marks).

    Parameters
    ----------
    names
        Classes.
    before
        Share of the source for each class.
    after
        Share of each keep-list for each class.
    """
    with rc_context(STYLE):
        after = evenly_chosen(after)
        height = 0.95 + 0.22 * len(names)
        figure, axes = new_figure(height, left=0.31)
        axes.set_position((0.31, 0.42 / height, 0.66, 1 - 0.86 / height))
        rows = np.arange(len(names))
        axes.vlines(before, rows - 0.36, rows + 0.36, color=INK, linewidth=1.6, label="source")
        for place, (fraction, shares) in enumerate(after):
            axes.plot(
                shares,
                rows,
                marker=MARKS[place],
                markersize=4.6,
                linestyle="none",
                color=_colour(place, len(after)),
                label=f"keep {formats.share(fraction)}",
            )
        axes.set_xlim(
            0, 1.06 * max([*before, *(share for _, shares in after for share in shares), 1e-9])
        )
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_yticks(rows, [short(name) for name in names])
        axes.xaxis.set_major_formatter(lambda value, _: formats.share(value))
        axes.locator_params(axis="x", nbins=5)
        axes.set_xlabel("share of all samples")
        light_grid(axes, "x")
        legend_above(figure, 3, 1.0, (0.0, 1.0))
        return as_svg(figure, "balance", "Share of each class in the source and in each keep-list")


def kept_shares(after: Sequence[ListShares]) -> str:
    """Draw the share of every class that each keep-list holds, the most thinned class first.

    Each list is a curve, and its keep fraction a dashed line.
    """
    with rc_context(STYLE):
        after = evenly_chosen(after)
        figure, axes = new_figure(2.9, left=0.13)
        for place, (fraction, shares) in enumerate(after):
            ordered = np.sort(np.asarray(shares, float))
            rows = np.unique(np.linspace(0, len(ordered) - 1, POINTS).astype(int))
            colour = _colour(place, len(after))
            axes.plot((rows + 0.5) / len(ordered), ordered[rows], color=colour, linewidth=1.7)
            axes.axhline(fraction, color=MUTED, linewidth=0.8, linestyle=(0, (3, 2)))
            axes.text(
                1.0,
                fraction,
                f" {formats.share(fraction)}",
                color=MUTED,
                va="center",
                ha="left",
                fontsize=8,
            )
        axes.set_position((0.13, 0.42 / 2.9, 0.76, 2.36 / 2.9))
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: formats.share(value, 0))
        axes.set_xlabel("classes, the most thinned first")
        axes.set_ylabel("share of the class kept", labelpad=2)
        light_grid(axes, "y")
        axes.spines["left"].set_visible(False)
        return as_svg(
            figure,
            "balance",
            "Share of each class that each keep-list holds, the most thinned class first",
        )
