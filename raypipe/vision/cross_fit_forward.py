"""Forward passes of several proxies over images that each may or may not see."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from raypipe.config.choices import PROXY_STATISTICS

Forward = Callable[[int, np.ndarray], dict[str, np.ndarray]]
"""(number of a proxy, rows of the images) -> its outputs for them, as
`raypipe.vision.forward.forward` returns them, with probabilities."""


@dataclass(frozen=True)
class View:
    """Embeddings of some images by a proxy: `rows`, int64 [m], and `embedding`, float32 [m, d]."""

    rows: np.ndarray
    embedding: np.ndarray


@dataclass(frozen=True)
class CrossFitOutputs:
    """Outputs of P proxies for n images.

    Attributes
    ----------
    columns : dict of str to np.ndarray
        embedding [n, d] by proxy 0; loss, margin and entropy [n], means over the proxies that were
        not trained on the image's part; prediction and confidence [n], the class of their highest
        mean probability and that probability.
    views : dict of int to View
        Further embeddings by the number of the proxy.
    """

    columns: dict[str, np.ndarray]
    views: dict[int, View]

    @property
    def finite(self) -> np.ndarray:
        """Which images have finite embeddings and statistics, bool [n]."""
        finite = np.isfinite(self.columns["embedding"]).all(1)
        for name in PROXY_STATISTICS:
            finite &= np.isfinite(self.columns[name])
        for view in self.views.values():
            finite[view.rows] &= np.isfinite(view.embedding).all(1)
        return finite


def cross_fit_forward(
    forward: Forward, part: np.ndarray, viewed: Mapping[int, np.ndarray], proxies: int
) -> CrossFitOutputs:
    """Pass every image through all proxies but that of its own part, and through proxy 0.

    Parameters
    ----------
    forward
        Runs one proxy.
    part
        Part of each image, int64 [n].
    viewed
        By the number of a proxy above 0: which images it embeds, bool [n]; none of its own part.
    proxies
        Number of proxies, P.
    """
    first = forward(0, np.arange(len(part)))
    columns = {"embedding": first["embedding"]}
    columns |= {name: np.zeros(len(part), np.float32) for name in PROXY_STATISTICS}
    probabilities = np.zeros_like(first["probabilities"])
    views: dict[int, View] = {}
    for number in range(proxies):
        rows = np.flatnonzero(part != number)
        if number:
            outputs = forward(number, rows)
        else:
            outputs = {name: values[rows] for name, values in first.items()}
        probabilities[rows] += outputs["probabilities"] / (proxies - 1)
        for name in PROXY_STATISTICS:
            columns[name][rows] += outputs[name] / (proxies - 1)
        if number in viewed:
            seen = viewed[number][rows]
            views[number] = View(rows[seen], outputs["embedding"][seen])
    columns["prediction"] = probabilities.argmax(1).astype(np.int32)
    columns["confidence"] = probabilities.max(1)
    return CrossFitOutputs(columns, views)
