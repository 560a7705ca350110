"""The pilot's gains over random lists, from the sizes that were tried to that of the source."""

from __future__ import annotations

from collections.abc import Sequence

from raypipe.report import formats
from raypipe.report.pilot import GainPoint
from raypipe.report.plots.base import (
    EXTRAPOLATED,
    INK,
    MUTED,
    STYLE,
    as_svg,
    legend_above,
    light_grid,
    new_figure,
    rc_context,
    short,
)


def gain_curve(
    name: str,
    line: Sequence[GainPoint],
    cells: Sequence[tuple[float, float]],
    others: Sequence[tuple[str, Sequence[tuple[float, float]]]],
) -> str:
    """Draw the gain of lists of one keep fraction against the samples that they keep of each class.

    Parameters
    ----------
    name
        The candidate.
    line
        Its fitted gain; the last point is the size of the source.
    cells
        What was measured: samples of each class, and gain.
    others
        Name and fitted gains of the other candidates.
    """
    with rc_context(STYLE):
        figure, axes = new_figure(2.9 + 0.17 * ((len(others) + 2) // 2))
        height = figure.get_figheight()
        axes.set_position((0.13, 0.42 / height, 0.84, 2.35 / height))
        across = [point[0] for point in line]
        axes.axhline(0, color=MUTED, linewidth=1, label="random lists")
        axes.fill_between(
            across,
            [100 * point[2] for point in line],
            [100 * point[3] for point in line],
            color=EXTRAPOLATED,
            alpha=0.2,
            linewidth=0,
        )
        axes.plot(
            across,
            [100 * point[1] for point in line],
            color=EXTRAPOLATED,
            linewidth=1.8,
            label=short(name, 32),
        )
        for place, (other, points) in enumerate(others):
            axes.plot(
                [point[0] for point in points],
                [100 * point[1] for point in points],
                color=INK,
                linewidth=1,
                linestyle=(0, (1 + place, 2)),
                label=short(other, 32),
            )
        axes.plot(
            [cell[0] for cell in cells],
            [100 * cell[1] for cell in cells],
            color=EXTRAPOLATED,
            marker="o",
            markersize=4.5,
            linestyle="none",
        )
        axes.axvline(across[-1], color=MUTED, linewidth=1, linestyle=(0, (3, 2)))
        axes.set_xscale("log", base=2)
        ends = [across[0], across[-1]]
        axes.set_xticks(ends, [formats.count(end) for end in ends])
        axes.minorticks_off()
        axes.locator_params(axis="y", nbins=6)
        axes.set_xlabel("samples kept of each class, up to the whole source")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:+g}".replace("-", formats.MINUS))
        light_grid(axes, "y")
        axes.spines["left"].set_visible(False)
        legend_above(figure, 2, 1.8)
        return as_svg(figure, "pilot", "Points gained over random lists, by samples of each class")
