"""Plots as inline SVG that takes its colours from the page, so that one plot is legible in light, dark and print."""

from __future__ import annotations

import io
import os
import re
import tempfile
import warnings
from pathlib import Path
from typing import Literal


def _writable_cache() -> None:
    """Matplotlib wants a folder for its list of fonts; a worker or a container may have no writable home."""
    if "MPLCONFIGDIR" not in os.environ:
        folder = (
            Path(tempfile.gettempdir())
            / f"raypipe-matplotlib-{os.getuid() if hasattr(os, 'getuid') else 'user'}"
        )
        folder.mkdir(mode=0o700, exist_ok=True)
        mine = not hasattr(os, "getuid") or folder.stat().st_uid == os.getuid()
        os.environ["MPLCONFIGDIR"] = (
            str(folder) if mine else tempfile.mkdtemp(prefix="raypipe-matplotlib-")
        )


_writable_cache()

from matplotlib import rc_context  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.backends.backend_svg import FigureCanvasSVG  # noqa: E402
from matplotlib.colors import LinearSegmentedColormap, Normalize  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

__all__ = [
    "EXTRAPOLATED", "INK", "LINE", "MEASURED", "MUTED", "SCORE_COLOURS", "SOFT", "STYLE", "WIDTH", "Figure", "Normalize", "as_svg", "light_grid",
    "new_figure", "rc_context", "short",
]  # fmt: skip

# Stand-ins, exchanged for variables of the page's style sheet in the finished SVG.
INK, MUTED, LINE, MEASURED, EXTRAPOLATED, SOFT = (
    "#010101",
    "#010102",
    "#010103",
    "#010104",
    "#010105",
    "#010106",
)
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
SCORE_COLOURS = LinearSegmentedColormap.from_list(
    "score", ["#3f6fd8", "#7d78c4", "#b07c9d", "#d98a62", "#eda634"]
)
"""From low to high, every colour dark enough for a white page and light enough for a black one."""


def new_figure(height: float, left: float = 0.11) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.add_axes((left, 0.42 / height, 0.97 - left, 1 - 0.52 / height))
    axes.patch.set_alpha(0)
    return figure, axes


def as_svg(figure: Figure, name: str, title: str) -> str:
    """The figure as an <svg> element with ids of its own, no size of its own, and a title for those who cannot see it."""
    FigureCanvasSVG(figure)
    figure.patch.set_alpha(0)
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # a letter that Matplotlib's font lacks: the reader's has it
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


def light_grid(axes: Axes, axis: Literal["x", "y"]) -> None:
    axes.set_axisbelow(True)
    axes.grid(axis=axis, color=LINE, linewidth=0.6)
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(axis == "y")


def short(name: str, most: int = 16) -> str:
    """A class name for an axis: one line, no control characters, cut where it is long."""
    name = "".join(letter if letter.isprintable() else " " for letter in name).strip() or "?"
    return name if len(name) <= most else name[: most - 1] + "…"
