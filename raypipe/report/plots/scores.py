"""Distributions of the scores: of all samples, and by class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from raypipe.report import formats
from raypipe.report.plots.base import (
    EXTRAPOLATED,
    INK,
    MEASURED,
    MUTED,
    STYLE,
    as_svg,
    light_grid,
    new_figure,
    rc_context,
    short,
)
from raypipe.report.schema import ClassFigures, Histogram, ShownClass

BAND_POINTS = 400
"""Classes that the plot of all classes draws at most, evenly spread over their order."""
MINI = (120, 44)
"""Width and height of a small histogram, in SVG units."""


def score_histogram(histogram: Histogram, cuts: Sequence[tuple[float, float]]) -> str:
    """Draw measured and extrapolated scores, each as a share of its own total.

    Parameters
    ----------
    histogram
        Edges and counts.
    cuts
        Keep fraction and lowest score of the keep-lists that end at a score.
    """
    edges = np.array(histogram["edges"])
    with rc_context(STYLE):
        figure, axes = new_figure(2.5)
        for name, counts_of in (
            ("measured", histogram["measured"]),
            ("extrapolated", histogram["extrapolated"]),
        ):
            counts, filled = np.array(counts_of, float), name == "measured"
            if not counts.sum():
                continue
            colour = MEASURED if filled else EXTRAPOLATED
            label = f"{name} ({formats.count(counts.sum())})"
            values = counts / counts.sum()
            if filled:
                axes.stairs(
                    values,
                    edges,
                    fill=True,
                    facecolor=colour,
                    edgecolor="none",
                    alpha=0.45,
                    label=label,
                )
            else:
                axes.stairs(values, edges, color=colour, linewidth=1.6, label=label)
        top = axes.get_ylim()[1]
        axes.set_ylim(0, top * 1.32)
        last = np.inf
        for fraction, lowest in sorted(cuts):
            if not edges[0] <= lowest <= edges[-1]:
                continue
            axes.plot(
                [lowest, lowest], [0, top * 1.04], color=MUTED, linewidth=0.9, linestyle=(0, (3, 2))
            )
            if last - lowest > 0.085 * (edges[-1] - edges[0]):  # else labels overlap
                axes.text(
                    lowest,
                    top * 1.06,
                    formats.share(fraction),
                    color=MUTED,
                    ha="center",
                    va="bottom",
                    fontsize=8,
                )
                last = lowest
        axes.set_xlim(edges[0], edges[-1])
        axes.set_xlabel("score (the end bins hold everything beyond)")
        axes.yaxis.set_major_formatter(lambda value, _: formats.share(value))
        axes.locator_params(axis="y", nbins=5)
        axes.locator_params(axis="x", nbins=6)
        light_grid(axes, "y")
        axes.spines["left"].set_visible(False)
        axes.legend(
            loc="upper left",
            bbox_to_anchor=(-0.02, 1.06),
            ncols=2,
            frameon=False,
            fontsize=8.5,
            handlelength=1.2,
        )
        return as_svg(figure, "histogram", "Distribution of measured and extrapolated scores")


def small_histogram(
    measured: Sequence[int], extrapolated: Sequence[int], cuts: Sequence[float]
) -> str:
    """Draw the scores of one class, without labels, as an <svg> that fills its container.

    Parameters
    ----------
    measured, extrapolated
        Counts [B] in bins of equal width, each drawn as a share of its own sum.
    cuts
        Where keep-lists end, from 0 (the left edge) to 1; others are left out.
    """
    width, height = MINI
    shares = [
        np.asarray(counts, float) / max(np.sum(counts), 1) for counts in (measured, extrapolated)
    ]
    top = max(*(heights.max(initial=0) for heights in shares), 1e-9)
    parts = []
    for kind, heights in zip(("measured", "extrapolated"), shares, strict=True):
        if not heights.any():
            continue
        edges = np.linspace(0, width, len(heights) + 1)
        up = height - 1 - (height - 3) * heights / top
        steps = "".join(f"V{y:.1f}H{x:.1f}" for x, y in zip(edges[1:], up, strict=True))
        parts.append(f'<path class="{kind}-bars" d="M0 {height - 1}{steps}V{height - 1}"/>')
    lines = "".join(
        f'<path class="cut" d="M{width * cut:.1f} 0V{height}"/>' for cut in cuts if 0 <= cut <= 1
    )
    return (
        f'<svg class="mini" viewBox="0 0 {width} {height}" preserveAspectRatio="none" role="img" '
        f'aria-label="Distribution of the scores of this class">{"".join(parts)}{lines}</svg>'
    )


def _quantiles(classes: Sequence[ShownClass]) -> np.ndarray:
    """Return q10, q25, q50, q75 and q90 of each class, [classes, 5]; NaN without scores."""
    return np.array(
        [[item["q10"], item["q25"], item["q50"], item["q75"], item["q90"]] for item in classes],
        float,
    )


def class_spread(classes: Sequence[ShownClass]) -> str:
    """Draw the middle 80 % (thin), 50 % (thick) and median (dot) of the scores of each class."""
    with rc_context(STYLE):
        figure, axes = new_figure(0.62 + 0.2 * len(classes), left=0.31)
        for place, quantiles in enumerate(_quantiles(classes)):
            q10, q25, q50, q75, q90 = quantiles
            line = [place, place]
            axes.plot([q10, q90], line, color=EXTRAPOLATED, linewidth=1, alpha=0.7)
            axes.plot(
                [q25, q75], line, color=EXTRAPOLATED, alpha=0.55, linewidth=4, solid_capstyle="butt"
            )
            axes.plot([q50], [place], marker="o", markersize=3.6, color=INK, linestyle="none")
        axes.set_ylim(len(classes) - 0.4, -0.6)
        axes.set_yticks(range(len(classes)), [short(item["name"]) for item in classes])
        axes.locator_params(axis="x", nbins=6)
        axes.set_xlabel("score")
        light_grid(axes, "x")
        return as_svg(figure, "classes", "Distribution of the scores in each class")


def class_bands(classes: Sequence[ClassFigures]) -> str:
    """Draw the same for many classes, in the order of their medians, as bands and a line."""
    rows = np.unique(np.linspace(0, len(classes) - 1, BAND_POINTS).astype(int))
    q10, q25, q50, q75, q90 = _quantiles([classes[row] for row in rows]).T
    with rc_context(STYLE):
        figure, axes = new_figure(2.9, left=0.13)
        axes.fill_between(
            rows + 1, q10, q90, step="mid", color=EXTRAPOLATED, alpha=0.22, linewidth=0
        )
        axes.fill_between(
            rows + 1, q25, q75, step="mid", color=EXTRAPOLATED, alpha=0.4, linewidth=0
        )
        axes.plot(rows + 1, q50, color=INK, linewidth=1.3)
        axes.set_xlim(1, len(classes))
        axes.locator_params(axis="both", nbins=6)
        axes.xaxis.set_major_formatter(lambda value, _: formats.count(value))
        axes.set_xlabel("classes, the lowest median first")
        axes.set_ylabel("score", labelpad=2)
        light_grid(axes, "y")
        axes.spines["left"].set_visible(False)
        return as_svg(
            figure,
            "classes",
            "Distribution of the scores in all classes, in the order of their medians",
        )
