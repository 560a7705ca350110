"""Plots as inline SVG that takes its colours from the page, so that one plot is legible in light, dark and print."""

from __future__ import annotations

import io
import os
import re
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from raypipe.report import words
from raypipe.report.embeddings import EmbeddingMap


def _writable_cache() -> None:
    """Matplotlib wants a folder for its list of fonts; a worker or a container may have no writable home."""
    if "MPLCONFIGDIR" not in os.environ:
        folder = Path(tempfile.gettempdir()) / f"raypipe-matplotlib-{os.getuid() if hasattr(os, 'getuid') else 'user'}"
        folder.mkdir(mode=0o700, exist_ok=True)
        mine = not hasattr(os, "getuid") or folder.stat().st_uid == os.getuid()
        os.environ["MPLCONFIGDIR"] = str(folder) if mine else tempfile.mkdtemp(prefix="raypipe-matplotlib-")


_writable_cache()

import matplotlib  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.backends.backend_svg import FigureCanvasSVG  # noqa: E402
from matplotlib.colors import LinearSegmentedColormap, Normalize  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

# Stand-ins, exchanged for variables of the page's style sheet in the finished SVG.
INK, MUTED, LINE, MEASURED, EXTRAPOLATED, SOFT = "#010101", "#010102", "#010103", "#010104", "#010105", "#010106"
_VARIABLES = {
    INK: "var(--ink)", MUTED: "var(--muted)", LINE: "var(--line)",
    MEASURED: "var(--measured)", EXTRAPOLATED: "var(--extrapolated)", SOFT: "var(--soft)",
}  # fmt: skip
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "raypipe",
    "text.parse_math": False,
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": LINE,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
}
WIDTH = 4.6  # inches; at the width of a phone the letters are still of about 9.5 px
SCORES = LinearSegmentedColormap.from_list("score", ["#3f6fd8", "#7d78c4", "#b07c9d", "#d98a62", "#eda634"])
"""From low to high, every colour dark enough for a white page and light enough for a black one."""


def _figure(height: float, left: float = 0.11) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.add_axes((left, 0.42 / height, 0.97 - left, 1 - 0.52 / height))
    axes.patch.set_alpha(0)
    return figure, axes


def _svg(figure: Figure, name: str, title: str) -> str:
    """The figure as an <svg> element with ids of its own, no size of its own, and a title for those who cannot see it."""
    FigureCanvasSVG(figure)
    figure.patch.set_alpha(0)
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a letter that Matplotlib's font lacks: the reader's has it
        figure.savefig(buffer, format="svg", dpi=160, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'^(<svg[^>]*?) width="[^"]*"', r"\1", text)
    text = re.sub(r'^(<svg[^>]*?) height="[^"]*"', r"\1", text)
    text = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1).strip()


def _light_grid(axes: Axes, axis: Literal["x", "y"]) -> None:
    axes.set_axisbelow(True)
    axes.grid(axis=axis, color=LINE, linewidth=0.6)
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(axis == "y")


def _short(name: str, most: int = 16) -> str:
    """A class name for an axis: one line, no control characters, cut where it is long."""
    name = "".join(letter if letter.isprintable() else " " for letter in name).strip() or "?"
    return name if len(name) <= most else name[: most - 1] + "…"


def score_histogram(histogram: dict[str, list[Any]], cuts: Sequence[tuple[float, float]]) -> str:
    """Measured against extrapolated scores, each as a share of its own number; `cuts` are (keep fraction, lowest score)."""
    edges = np.array(histogram["edges"])
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(2.5)
        for name, filled in (("measured", True), ("extrapolated", False)):
            counts = np.array(histogram[name], float)
            if not counts.sum():
                continue
            colour = MEASURED if filled else EXTRAPOLATED
            label = f"{name} ({words.count(counts.sum())})"
            values = counts / counts.sum()
            if filled:
                axes.stairs(values, edges, fill=True, facecolor=colour, edgecolor="none", alpha=0.45, label=label)
            else:
                axes.stairs(values, edges, color=colour, linewidth=1.6, label=label)
        top = axes.get_ylim()[1]
        axes.set_ylim(0, top * 1.32)
        last = np.inf
        for fraction, lowest in sorted(cuts):
            if not edges[0] <= lowest <= edges[-1]:
                continue
            axes.plot([lowest, lowest], [0, top * 1.04], color=MUTED, linewidth=0.9, linestyle=(0, (3, 2)))
            if last - lowest > 0.085 * (edges[-1] - edges[0]):  # the labels would lie on each other
                axes.text(lowest, top * 1.06, words.share(fraction), color=MUTED, ha="center", va="bottom", fontsize=8)
                last = lowest
        axes.set_xlim(edges[0], edges[-1])
        axes.set_xlabel("score (the end bins hold everything beyond)")
        axes.yaxis.set_major_formatter(lambda value, _: words.share(value))
        axes.locator_params(axis="y", nbins=5)
        axes.locator_params(axis="x", nbins=6)
        _light_grid(axes, "y")
        axes.spines["left"].set_visible(False)
        axes.legend(loc="upper left", bbox_to_anchor=(-0.02, 1.06), ncols=2, frameon=False, fontsize=8.5, handlelength=1.2)
        return _svg(figure, "histogram", "Distribution of measured and extrapolated scores")


def fidelity_chart(rows: Sequence[tuple[str, float, float | None, float | None]]) -> str:
    """Spearman correlation of the extrapolator (first row) and of the baselines, with their intervals where they have one."""
    with matplotlib.rc_context(STYLE):
        height = 0.62 + 0.27 * len(rows)
        figure, axes = _figure(height, left=0.33)
        least = min(0.0, *(value if low is None else low for _, value, low, _ in rows)) - 0.03
        axes.set_xlim(max(-1.0, least), 1)
        for start, stop in ((0.2, 0.5), (0.8, 1.0)):
            axes.axvspan(start, stop, color=SOFT, linewidth=0)
        for row, (_, value, low, high) in enumerate(rows):
            colour = EXTRAPOLATED if row == 0 else MUTED
            if low is not None and high is not None:
                axes.plot([low, high], [row, row], color=colour, linewidth=2, solid_capstyle="round")
            axes.plot([value], [row], marker="o", color=colour, markersize=6.5 if row == 0 else 5, linestyle="none")
        axes.set_ylim(len(rows) - 0.45, -0.55)
        axes.set_yticks(range(len(rows)), [_short(name, 22) for name, *_ in rows])
        axes.set_xticks([tick for tick in (-0.5, 0, 0.2, 0.5, 0.8, 1) if tick >= axes.get_xlim()[0]])
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}".replace("-", "−"))
        axes.set_xlabel("Spearman correlation with the measured score")
        _light_grid(axes, "x")
        return _svg(figure, "fidelity", "Spearman correlation of the extrapolator and of simpler baselines")


def class_spread(classes: Sequence[dict[str, Any]], gap_after: int | None) -> str:
    """The middle 80 % (thin), 50 % (thick) and median (dot) of the scores of each class; a gap where classes are left out."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(0.62 + 0.2 * (len(classes) + (gap_after is not None)), left=0.31)
        places = [row + (gap_after is not None and row >= gap_after) for row in range(len(classes))]
        for place, item in zip(places, classes, strict=True):
            axes.plot([item["q10"], item["q90"]], [place, place], color=EXTRAPOLATED, linewidth=1, alpha=0.7)
            middle = [item["q25"], item["q75"]]
            axes.plot(middle, [place, place], color=EXTRAPOLATED, alpha=0.55, linewidth=4, solid_capstyle="butt")
            axes.plot([item["q50"]], [place], marker="o", markersize=3.6, color=INK, linestyle="none")
        if gap_after is not None:
            axes.text(0.5, gap_after, "⋮", transform=axes.get_yaxis_transform(), ha="center", va="center", color=MUTED)
        axes.set_ylim(max(places) + 0.6, -0.6)
        axes.set_yticks(places, [_short(item["name"]) for item in classes])
        axes.locator_params(axis="x", nbins=6)
        axes.set_xlabel("score")
        _light_grid(axes, "x")
        return _svg(figure, "classes", "Distribution of the scores in each class")


Curve = tuple[str, Sequence[tuple[float, float, float | None, float | None]]]
"""Name, and points: keep fraction, accuracy, both ends of its interval (None: it has none)."""
STYLES = (
    (EXTRAPOLATED, "-", "o"),
    (MEASURED, "-", "s"),
    (INK, "--", "^"),
    (EXTRAPOLATED, ":", "D"),
    (MEASURED, ":", "v"),
    (INK, ":", "x"),
)
"""Colour, line and mark of the lists; beyond these they begin anew."""


def evaluation_curves(curves: Sequence[Curve], full: tuple[float, float | None, float | None]) -> str:
    """Accuracy against keep fraction: random (the first curve) with its interval as a band, lists with theirs as bars, the full set as a line."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(2.9 + 0.17 * ((len(curves) + 2) // 2))
        height = figure.get_figheight()
        axes.set_position((0.13, 0.42 / height, 0.84, 2.35 / height))
        mean, low, high = full
        axes.axhline(mean, color=MUTED, linewidth=1, linestyle=(0, (3, 2)), label="full set")
        if low is not None and high is not None:
            axes.axhspan(low, high, color=SOFT, linewidth=0)
        for place, (name, points) in enumerate(curves):
            across = [point[0] for point in points]
            up = [point[1] for point in points]
            colour, line, mark = (MUTED, "-", "o") if place == 0 else STYLES[(place - 1) % len(STYLES)]
            axes.plot(
                across, up, color=colour, linestyle=line, marker=mark, markersize=4.5, linewidth=1.5, label=_short(name, 32)
            )
            ends = [(x, low, high) for x, _, low, high in points if low is not None and high is not None]
            if place == 0 and ends:
                where, lows, highs = (list(column) for column in zip(*ends, strict=True))
                axes.fill_between(where, lows, highs, color=MUTED, alpha=0.25, linewidth=0)
            elif ends:
                for x, low, high in ends:
                    axes.plot([x, x], [low, high], color=colour, linewidth=1, alpha=0.8)
        axes.set_xlabel("fraction kept")
        axes.xaxis.set_major_formatter(lambda value, _: words.share(value, 0))
        axes.yaxis.set_major_formatter(lambda value, _: words.share(value, 0))
        axes.set_xticks(sorted({point[0] for _, points in curves for point in points}))
        axes.locator_params(axis="y", nbins=6)
        _light_grid(axes, "y")
        axes.spines["left"].set_visible(False)
        figure.legend(loc="upper left", bbox_to_anchor=(0.02, 1.0), ncols=2, frameon=False, fontsize=8.5, handlelength=1.8)
        return _svg(figure, "evaluation", "Accuracy against keep fraction, of lists, random lists and the full set")


def embedding_map(found: EmbeddingMap) -> str:
    """Samples by the first two principal components of their embeddings, coloured by score."""
    low, high = np.quantile(found.score, (0.02, 0.98))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.6))
        axes = figure.add_axes((0.02, 0.07, 0.8, 0.91))
        axes.patch.set_alpha(0)
        order = np.random.default_rng(0).permutation(len(found.score))  # no class drawn on top of another
        size = float(np.clip(9000 / len(order), 3, 18))
        across, up = found.position[order].T
        colour = Normalize(low, max(high, low + 1e-12))
        points = axes.scatter(across, up, c=found.score[order], cmap=SCORES, norm=colour, s=size, linewidths=0, alpha=0.85)
        points.set_rasterized(True)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        first, second = (words.share(share, 0) for share in found.explained)
        axes.set_xlabel(f"two principal components: {first} and {second} of the variance", labelpad=4)
        bar = figure.colorbar(points, cax=figure.add_axes((0.85, 0.16, 0.025, 0.7)))
        if bar.solids is not None:
            bar.solids.set(alpha=1, rasterized=True)
        bar.outline.set_visible(False)
        bar.ax.patch.set_alpha(0)
        bar.ax.tick_params(length=0, labelsize=8)
        bar.ax.locator_params(nbins=5)
        bar.ax.set_title("score", pad=6)
        return _svg(figure, "map", "Embeddings of a sample of the source, coloured by score")
