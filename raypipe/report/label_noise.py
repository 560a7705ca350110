"""How well the list of labels to check finds replaced labels (`source.inject_noise`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np

from raypipe import storage
from raypipe.report import formats
from raypipe.runs.run import Run
from raypipe.sources.noise import LabelNoise


class ListPart(TypedDict):
    """The first samples of a list: how many, how many of them are hits, precision and recall.

    A share is None if there is nothing to divide by.
    """

    listed: int
    found: int
    precision: float | None
    recall: float | None


class RetrievalFigures(ListPart):
    """How well a whole list finds the replaced labels; see `retrieval_figures`."""

    at_replaced: ListPart
    average_precision: float | None


class NoiseCounts(TypedDict):
    """What the samples that were searched contain, and how well the list finds it."""

    labelled: int
    replaced: int
    list: RetrievalFigures


class LabelNoiseFigures(NoiseCounts):
    """The section `label_noise` of `summary.json`.

    `keep` is the share of replaced labels in each keep-list, by file name.
    """

    share: float
    noise_seed: int
    warning: str
    keep: dict[str, float | None]
    sentence: str


def retrieval_figures(replaced_label: np.ndarray, replaced: int) -> RetrievalFigures:
    """Return how well a list finds the replaced labels.

    Parameters
    ----------
    replaced_label
        bool [listed], in the order of the list: whether the label of each was replaced.
    replaced
        How many labels were replaced in all, listed or not.

    Returns
    -------
    RetrievalFigures
        Figures of the whole list; `at_replaced`, those of its first `replaced` samples (or all, if
        the list is shorter); `average_precision`, the mean over all replaced labels of the
        precision of the list down to each, 0 for those that are not in it.
    """
    hits = np.cumsum(replaced_label)

    def first(listed: int) -> ListPart:
        found = int(hits[listed - 1]) if listed else 0
        return {
            "listed": listed,
            "found": found,
            "precision": found / listed if listed else None,
            "recall": found / replaced if replaced else None,
        }

    precision = hits / np.arange(1, len(replaced_label) + 1)
    total = float(precision[np.asarray(replaced_label, bool)].sum())
    return {
        **first(len(replaced_label)),
        "at_replaced": first(min(replaced, len(replaced_label))),
        "average_precision": total / replaced if replaced else None,
    }


class LabelNoiseCounter:
    """Collects, shard by shard, the list of suspects and the replaced labels."""

    def __init__(self, noise: LabelNoise) -> None:
        self._noise = noise
        self._doubt, self._replaced_label = [np.zeros(0)], [np.zeros(0, bool)]
        self._labelled = self._replaced = 0

    def add(self, ids: Sequence[str], label: np.ndarray, doubt: np.ndarray) -> None:
        """Add the samples of a shard.

        Parameters
        ----------
        ids
            Their ids.
        label
            int [n]; -1 without a label.
        doubt
            float [n], by which the list is ordered; NaN for samples that are not in it.
        """
        replaced_label = np.array([self._noise.replaced(sample_id) for sample_id in ids], bool)
        replaced_label &= label >= 0
        listed = np.isfinite(doubt)
        self._labelled += int((label >= 0).sum())
        self._replaced += int(replaced_label.sum())
        self._doubt.append(doubt[listed])
        self._replaced_label.append(replaced_label[listed])

    def counts(self) -> NoiseCounts:
        """Return the figures of everything that was added."""
        order = np.argsort(-np.concatenate(self._doubt), kind="stable")
        replaced_label = np.concatenate(self._replaced_label)[order]
        return {
            "labelled": self._labelled,
            "replaced": self._replaced,
            "list": retrieval_figures(replaced_label, self._replaced),
        }


def noise_figures(
    run: Run, noise: LabelNoise, counts: NoiseCounts, files: Sequence[str]
) -> LabelNoiseFigures:
    """Return the section `label_noise`; `files` are the keep-lists."""
    keep = {file: _replaced_share(run, noise, file) for file in files}
    return {
        "share": noise.share,
        "noise_seed": noise.seed,
        "warning": noise.warning,
        **counts,
        "keep": keep,
        "sentence": _sentence(counts, keep),
    }


def _replaced_share(run: Run, noise: LabelNoise, file: str) -> float | None:
    """Return the share of a keep-list's labelled samples whose label was replaced."""
    table = storage.read_table(run.keep_list(file), ["sample_id", "label"])
    ids = table["sample_id"].filter(table["label"].is_valid()).to_pylist()
    return sum(map(noise.replaced, ids)) / len(ids) if ids else None


def _sentence(counts: NoiseCounts, keep: dict[str, float | None]) -> str:
    listed, replaced = counts["list"], counts["replaced"]
    first = listed["at_replaced"]
    chance = replaced / counts["labelled"] if counts["labelled"] else None
    if listed["listed"]:
        sentence = (
            f"Of {formats.count(listed['listed'])} samples listed as labels to check, "
            f"{formats.share(listed['precision'])} have a replaced label (by chance "
            f"{formats.share(chance)}); they are {formats.share(listed['recall'])} of the "
            f"{formats.count(replaced)} replaced labels. "
            f"Of the first {formats.count(first['listed'])}, "
            f"{formats.share(first['precision'])} have one. Average precision: "
            f"{formats.fixed(listed['average_precision'])}."
        )
    else:
        sentence = (
            f"The list of labels to check is empty; {formats.count(replaced)} labels were replaced."
        )
    kept = [
        f"{formats.share(share)} in {file}" for file, share in keep.items() if share is not None
    ]
    return sentence + (f" Replaced labels in keep-lists: {', '.join(kept)}." if kept else "")
