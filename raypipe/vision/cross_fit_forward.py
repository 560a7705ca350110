"""Forward passes of several proxies over images that each may or may not see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from raypipe.config.choices import PROXY_STATISTICS

Forward = Callable[[int, np.ndarray], dict[str, np.ndarray]]
"""(number of a proxy, rows of the images) -> its outputs for them, as
`raypipe.vision.forward.forward` returns them, with probabilities."""


@dataclass(frozen=True)
class CrossFitOutputs:
    """What P proxies say of n images.

    Attributes
    ----------
    columns : dict of str to np.ndarray
        embedding [n, d] by proxy 0; loss, margin and entropy [n], means over the proxies that were
        not trained on the image's part; prediction and confidence [n], the class of their highest
        mean probability and that probability.
    second_rows, second_embedding : np.ndarray
        Rows of the images that are embedded by proxy 1 as well, int64 [m], and these embeddings,
        float32 [m, d].
    """

    columns: dict[str, np.ndarray]
    second_rows: np.ndarray
    second_embedding: np.ndarray

    @property
    def finite(self) -> np.ndarray:
        """Which images have finite embeddings and statistics, bool [n]."""
        finite = np.isfinite(self.columns["embedding"]).all(1)
        for name in PROXY_STATISTICS:
            finite &= np.isfinite(self.columns[name])
        finite[self.second_rows] &= np.isfinite(self.second_embedding).all(1)
        return finite


def cross_fit_forward(
    forward: Forward, part: np.ndarray, in_second: np.ndarray, proxies: int
) -> CrossFitOutputs:
    """Pass every image through all proxies but that of its own part, and through proxy 0.

    Parameters
    ----------
    forward
        Runs one proxy.
    part
        Part of each image, int64 [n].
    in_second
        Whether an image is embedded by proxy 1 as well, bool [n]; never one of part 1.
    proxies
        Number of proxies, P.
    """
    first = forward(0, np.arange(len(part)))
    columns = {"embedding": first["embedding"]}
    columns |= {name: np.zeros(len(part), np.float32) for name in PROXY_STATISTICS}
    probabilities = np.zeros_like(first["probabilities"])
    second_rows = np.flatnonzero(in_second)
    second_embedding = np.zeros((len(second_rows), first["embedding"].shape[1]), np.float32)
    for number in range(proxies):
        rows = np.flatnonzero(part != number)
        if number:
            outputs = forward(number, rows)
        else:
            outputs = {name: values[rows] for name, values in first.items()}
        probabilities[rows] += outputs["probabilities"] / (proxies - 1)
        for name in PROXY_STATISTICS:
            columns[name][rows] += outputs[name] / (proxies - 1)
        if number == 1:
            second_embedding = outputs["embedding"][np.searchsorted(rows, second_rows)]
    columns["prediction"] = probabilities.argmax(1).astype(np.int32)
    columns["confidence"] = probabilities.max(1)
    return CrossFitOutputs(columns, second_rows, second_embedding)
