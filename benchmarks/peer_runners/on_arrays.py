"""raypipe's selection and extrapolation on arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import pyarrow as pa

from raypipe.selection import Chunk, SelectionOptions, select

Arrays = dict[str, np.ndarray]


def _selected(arrays: Arrays, strategy: str) -> Callable[[], np.ndarray]:
    score, label = arrays["score"], arrays["label"]
    ids = pa.array([f"train/{row:09d}" for row in range(len(score))], pa.string())
    options = SelectionOptions(hard_cutoff=float(arrays["cutoff"]), strata=int(arrays["strata"]))

    def run() -> np.ndarray:
        chunk = Chunk(score, label, ids)

        def chunks(with_ids: bool) -> Iterable[Chunk]:
            return [chunk]

        (selection,) = select(chunks, [float(arrays["keep"])], strategy, options=options)
        return np.flatnonzero(selection.mask(chunk))

    return run


def top(arrays: Arrays) -> Callable[[], np.ndarray]:
    return _selected(arrays, "top")


def ccs(arrays: Arrays) -> Callable[[], np.ndarray]:
    return _selected(arrays, "ccs")


def knn(arrays: Arrays) -> Callable[[], np.ndarray]:
    from raypipe.config import ExtrapolateSettings
    from raypipe.extrapolators import make
    from raypipe.extrapolators.base import Nodes

    settings = ExtrapolateSettings.model_validate({"method": "knn-published"})

    def nodes(name: str) -> Nodes:
        embedding = arrays[name]
        return Nodes(embedding, np.zeros(len(embedding), int), np.zeros((len(embedding), 0)))

    seed, rest = nodes("scored"), nodes("rest")

    def run() -> np.ndarray:
        extrapolator = make(settings, 1)
        extrapolator.fit(seed, arrays["score"])
        return extrapolator.predict(rest)

    return run
