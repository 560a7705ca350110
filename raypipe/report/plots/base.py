"""Plots as inline SVG with the page's colours, so they are legible in light, dark and print."""

from __future__ import annotations

import io
import os
import re
import tempfile
import warnings
from pathlib import Path
from typing import Literal


def _writable_cache() -> None:
    """Give Matplotlib a folder for its font list; workers and containers can lack a home."""
    if "MPLCONFIGDIR" in os.environ:
        return
    user = os.getuid() if hasattr(os, "getuid") else None
    name = f"raypipe-matplotlib-{'user' if user is None else user}"
    folder = Path(tempfile.gettempdir()) / name
    folder.mkdir(mode=0o700, exist_ok=True)
    owned = user is None or folder.stat().st_uid == user
    os.environ["MPLCONFIGDIR"] = (
        str(folder) if owned else tempfile.mkdtemp(prefix="raypipe-matplotlib-")
    )


_writable_cache()

from matplotlib import rc_context  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.backends.backend_svg import FigureCanvasSVG  # noqa: E402
from matplotlib.colors import LinearSegmentedColormap, Normalize  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

__all__ = [
    "EXTRAPOLATED", "INK", "LINE", "MEASURED", "MUTED", "SCORE_COLOURS", "SOFT", "STYLE", "WIDTH",
    "Axes", "Figure", "Normalize", "as_svg", "light_grid", "new_figure", "rc_context", "short",
]  # fmt: skip

# Placeholders: the finished SVG has variables of the page's style sheet in their place.
INK = "#010101"
MUTED = "#010102"
LINE = "#010103"
MEASURED = "#010104"
EXTRAPOLATED = "#010105"
SOFT = "#010106"
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
WIDTH = 4.6
"""Inches; on a phone the letters are still about 9.5 px high."""
SCORE_COLOURS = LinearSegmentedColormap.from_list(
    "score", ["#3f6fd8", "#7d78c4", "#b07c9d", "#d98a62", "#eda634"]
)
"""From low to high; every colour is legible on a white and on a black page."""


def new_figure(height: float, left: float = 0.11) -> tuple[Figure, Axes]:
    """Return a figure of WIDTH x height inches, and its axes; `left` is the margin for labels."""
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.add_axes((left, 0.42 / height, 0.97 - left, 1 - 0.52 / height))
    axes.patch.set_alpha(0)
    return figure, axes


def as_svg(figure: Figure, name: str, title: str) -> str:
    """Return the figure as an <svg> element.

    It has unique ids (they begin with `name`), no fixed size, and `title` for screen readers.
    """
    FigureCanvasSVG(figure)
    figure.patch.set_alpha(0)
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # a letter that Matplotlib's font lacks: the reader's font has it
        warnings.simplefilter("ignore", UserWarning)
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
    """Draw grid lines across one axis."""
    axes.set_axisbelow(True)
    axes.grid(axis=axis, color=LINE, linewidth=0.6)
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(axis == "y")


def legend_above(
    figure: Figure, ncols: int, handlelength: float, corner: tuple[float, float] = (0.02, 1.0)
) -> None:
    """Draw a legend of all labelled lines, with its upper left corner at `corner`."""
    figure.legend(
        loc="upper left",
        bbox_to_anchor=corner,
        ncols=ncols,
        frameon=False,
        fontsize=8.5,
        handlelength=handlelength,
    )


def short(name: str, limit: int = 16) -> str:
    """Return a class name for an axis: one line, no control characters, at most `limit` long."""
    name = "".join(letter if letter.isprintable() else " " for letter in name).strip() or "?"
    return name if len(name) <= limit else name[: limit - 1] + "…"
