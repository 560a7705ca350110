"""Maps of the embeddings in two dimensions."""

from __future__ import annotations

import numpy as np

from raypipe.report import formats
from raypipe.report.embeddings import EmbeddingMap
from raypipe.report.plots.base import (
    SCORE_COLOURS,
    STYLE,
    WIDTH,
    Axes,
    Figure,
    Normalize,
    as_svg,
    rc_context,
)

HEIGHT = 3.6
KEPT, PRUNED = SCORE_COLOURS(1.0), SCORE_COLOURS(0.0)
"""The colours of the highest and of the lowest scores."""


def _new_map(samples: EmbeddingMap) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, HEIGHT))
    axes = figure.add_axes((0.02, 0.07, 0.8, 0.84))
    axes.patch.set_alpha(0)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    first, second = (formats.share(share, 0) for share in samples.explained)
    axes.set_xlabel(f"two principal components: {first} and {second} of the variance", labelpad=4)
    return figure, axes


def _order(samples: EmbeddingMap) -> np.ndarray:
    """Return a random order, the same in every map, so that no class is drawn on top."""
    return np.random.default_rng(0).permutation(len(samples.score))


def _size(samples: EmbeddingMap) -> float:
    return float(np.clip(9000 / len(samples.score), 3, 18))


def score_map(samples: EmbeddingMap) -> str:
    """Draw samples by the two principal components of their embeddings, coloured by score."""
    low, high = np.quantile(samples.score, (0.02, 0.98))
    with rc_context(STYLE):
        figure, axes = _new_map(samples)
        order = _order(samples)
        across, up = samples.position[order].T
        colour = Normalize(low, max(high, low + 1e-12))
        points = axes.scatter(
            across,
            up,
            c=samples.score[order],
            cmap=SCORE_COLOURS,
            norm=colour,
            s=_size(samples),
            linewidths=0,
            alpha=0.85,
        )
        points.set_rasterized(True)
        bar = figure.colorbar(points, cax=figure.add_axes((0.85, 0.16, 0.025, 0.66)))
        if bar.solids is not None:
            bar.solids.set(alpha=1, rasterized=True)
        bar.outline.set_visible(False)
        bar.ax.patch.set_alpha(0)
        bar.ax.tick_params(length=0, labelsize=8)
        bar.ax.locator_params(nbins=5)
        bar.ax.set_title("score", pad=6)
        return as_svg(figure, "map", "Embeddings of a sample of the source, coloured by score")


def kept_map(samples: EmbeddingMap, fraction: float) -> str:
    """Draw the same samples, coloured by whether a keep-list holds them.

    Parameters
    ----------
    samples
        Its `kept` must not be None.
    fraction
        Keep fraction of the list.
    """
    kept = np.asarray(samples.kept, bool)
    with rc_context(STYLE):
        figure, axes = _new_map(samples)
        order = _order(samples)
        colours = np.where(kept[:, None], KEPT, PRUNED)[order]
        across, up = samples.position[order].T
        points = axes.scatter(across, up, c=colours, s=_size(samples), linewidths=0, alpha=0.85)
        points.set_rasterized(True)
        for colour, word in ((KEPT, "kept"), (PRUNED, "pruned")):
            number = int((kept == (word == "kept")).sum())
            axes.scatter([], [], color=colour, s=28, label=f"{word} ({formats.count(number)})")
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0, 0.98),
            ncols=2,
            frameon=False,
            fontsize=8.5,
            handletextpad=0.2,
            title=f"keep {formats.share(fraction)}",
            title_fontsize=8.5,
            alignment="left",
        )
        return as_svg(
            figure,
            "kept",
            "The same embeddings, coloured by whether the keep-list holds the sample",
        )
