"""Fidelity, the learning curve, and the accuracy of trainings on keep-lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raypipe.report import formats
from raypipe.report.plots.base import (
    EXTRAPOLATED,
    INK,
    MEASURED,
    MUTED,
    SOFT,
    STYLE,
    as_svg,
    legend_above,
    light_grid,
    new_figure,
    rc_context,
    short,
)


def fidelity_chart(rows: Sequence[tuple[str, float, float | None, float | None]]) -> str:
    """Draw the Spearman correlation of the extrapolator (first row) and of the baselines.

    A row is a name, a correlation, and both ends of its interval (None without one).
    """
    with rc_context(STYLE):
        height = 0.62 + 0.27 * len(rows)
        figure, axes = new_figure(height, left=0.33)
        lowest = min(0.0, *(value if low is None else low for _, value, low, _ in rows)) - 0.03
        axes.set_xlim(max(-1.0, lowest), 1)
        for start, stop in ((0.2, 0.5), (0.8, 1.0)):
            axes.axvspan(start, stop, color=SOFT, linewidth=0)
        for row, (_, value, low, high) in enumerate(rows):
            colour = EXTRAPOLATED if row == 0 else MUTED
            if low is not None and high is not None:
                axes.plot(
                    [low, high], [row, row], color=colour, linewidth=2, solid_capstyle="round"
                )
            axes.plot(
                [value],
                [row],
                marker="o",
                color=colour,
                markersize=6.5 if row == 0 else 5,
                linestyle="none",
            )
        axes.set_ylim(len(rows) - 0.45, -0.55)
        axes.set_yticks(range(len(rows)), [short(name, 22) for name, *_ in rows])
        axes.set_xticks(
            [tick for tick in (-0.5, 0, 0.2, 0.5, 0.8, 1) if tick >= axes.get_xlim()[0]]
        )
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}".replace("-", "−"))
        axes.set_xlabel("Spearman correlation with the measured score")
        light_grid(axes, "x")
        return as_svg(
            figure, "fidelity", "Spearman correlation of the extrapolator and of simpler baselines"
        )


def learning_curve(points: Sequence[dict[str, Any]], doubled: dict[str, Any]) -> str:
    """Draw the Spearman correlation against the number of seed samples, with 95 % intervals.

    The prediction for a doubled seed set is drawn open and dashed.
    """
    with rc_context(STYLE):
        figure, axes = new_figure(2.3, left=0.13)
        across, up = [point["samples"] for point in points], [point["spearman"] for point in points]
        for point in points:
            axes.plot(
                [point["samples"]] * 2,
                point["spearman_interval"],
                color=EXTRAPOLATED,
                linewidth=1.6,
                alpha=0.6,
            )
        axes.plot(across, up, color=EXTRAPOLATED, marker="o", markersize=5, linewidth=1.6)
        ticks = list(across)
        if doubled.get("spearman") is not None:
            end, value = doubled["samples"], doubled["spearman"]
            ticks.append(end)
            axes.plot(
                [across[-1], end],
                [up[-1], value],
                color=MUTED,
                linewidth=1.2,
                linestyle=(0, (3, 2)),
            )
            if doubled.get("spearman_interval"):
                axes.plot(
                    [end, end], doubled["spearman_interval"], color=MUTED, linewidth=1.6, alpha=0.6
                )
            axes.plot([end], [value], marker="o", markersize=5, markerfacecolor="none", color=MUTED)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [formats.count(tick) for tick in ticks])
        axes.minorticks_off()
        axes.locator_params(axis="y", nbins=5)
        axes.set_xlabel("seed samples")
        light_grid(axes, "y")
        axes.spines["left"].set_visible(False)
        return as_svg(figure, "curve", "Spearman correlation against the number of seed samples")


Curve = tuple[str, Sequence[tuple[float, float, float | None, float | None]]]
"""Name, and points: keep fraction, accuracy, both ends of its interval (None without one)."""
STYLES = (
    (EXTRAPOLATED, "-", "o"),
    (MEASURED, "-", "s"),
    (INK, "--", "^"),
    (EXTRAPOLATED, ":", "D"),
    (MEASURED, ":", "v"),
    (INK, ":", "x"),
)
"""Colour, line and mark of the lists, in turn."""


def evaluation_curves(
    curves: Sequence[Curve], full: tuple[float, float | None, float | None]
) -> str:
    """Draw accuracy against keep fraction.

    Parameters
    ----------
    curves
        The random lists, whose interval is drawn as a band; then lists, with bars.
    full
        Accuracy of the full set and both ends of its interval, drawn as a line.
    """
    with rc_context(STYLE):
        figure, axes = new_figure(2.9 + 0.17 * ((len(curves) + 2) // 2))
        height = figure.get_figheight()
        axes.set_position((0.13, 0.42 / height, 0.84, 2.35 / height))
        mean, low, high = full
        axes.axhline(mean, color=MUTED, linewidth=1, linestyle=(0, (3, 2)), label="full set")
        if low is not None and high is not None:
            axes.axhspan(low, high, color=SOFT, linewidth=0)
        for place, (name, points) in enumerate(curves):
            across = [point[0] for point in points]
            up = [point[1] for point in points]
            colour, line, mark = (
                (MUTED, "-", "o") if place == 0 else STYLES[(place - 1) % len(STYLES)]
            )
            axes.plot(
                across,
                up,
                color=colour,
                linestyle=line,
                marker=mark,
                markersize=4.5,
                linewidth=1.5,
                label=short(name, 32),
            )
            ends = [
                (x, low, high) for x, _, low, high in points if low is not None and high is not None
            ]
            if place == 0 and ends:
                where, lows, highs = (list(column) for column in zip(*ends, strict=True))
                axes.fill_between(where, lows, highs, color=MUTED, alpha=0.25, linewidth=0)
            elif ends:
                for x, low, high in ends:
                    axes.plot([x, x], [low, high], color=colour, linewidth=1, alpha=0.8)
        axes.set_xlabel("fraction kept")
        axes.xaxis.set_major_formatter(lambda value, _: formats.share(value, 0))
        axes.yaxis.set_major_formatter(lambda value, _: formats.share(value, 0))
        axes.set_xticks(sorted({point[0] for _, points in curves for point in points}))
        axes.locator_params(axis="y", nbins=6)
        light_grid(axes, "y")
        axes.spines["left"].set_visible(False)
        legend_above(figure, 2, 1.8)
        return as_svg(
            figure,
            "evaluation",
            "Accuracy against keep fraction, of lists, random lists and the full set",
        )
