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
class ProxyOutputs:
    """Outputs of several proxies for n images.

    Attributes
    ----------
    columns : dict of str to np.ndarray
        embedding [n, d] by proxy 0; loss, margin and entropy [n], means over the proxies that see
        the image; prediction and confidence [n], the class of their highest mean probability and
        that probability.
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


def forward_by_proxies(
    forward: Forward,
    sees: Mapping[int, np.ndarray],
    viewed: Mapping[int, np.ndarray],
    averaged: int,
) -> ProxyOutputs:
    """Pass every image through the proxies that see it, and through proxy 0.

    Parameters
    ----------
    forward
        Runs one proxy.
    sees
        By the number of a proxy, including 0: which images get statistics from it, bool [n].
    viewed
        By the number of a proxy: which of these images it embeds for `views`, bool [n].
    averaged
        How many proxies see each image.
    """
    count = len(sees[0])
    first = forward(0, np.arange(count))
    columns = {"embedding": first["embedding"]}
    columns |= {name: np.zeros(count, np.float32) for name in PROXY_STATISTICS}
    probabilities = np.zeros_like(first["probabilities"])
    views: dict[int, View] = {}
    for number, seen in sees.items():
        rows = np.flatnonzero(seen)
        if number:
            outputs = forward(number, rows)
        else:
            outputs = {name: values[rows] for name, values in first.items()}
        probabilities[rows] += outputs["probabilities"] / averaged
        for name in PROXY_STATISTICS:
            columns[name][rows] += outputs[name] / averaged
        if number in viewed:
            embedded = viewed[number][rows]
            views[number] = View(rows[embedded], outputs["embedding"][embedded])
    columns["prediction"] = probabilities.argmax(1).astype(np.int32)
    columns["confidence"] = probabilities.max(1)
    return ProxyOutputs(columns, views)
