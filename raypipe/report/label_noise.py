"""How well the list of likely label errors finds labels that were replaced for a rehearsal (`source.inject_noise`)."""

from __future__ import annotations

from typing import Any

import numpy as np

from raypipe import storage
from raypipe.report import text
from raypipe.runs.layout import Run
from raypipe.sources.noise import LabelNoise


def found_by(wrong: np.ndarray, replaced: int) -> dict[str, Any]:
    """How well a list finds what was replaced.

    wrong     bool [listed], in the order of the list: whether the label of each was replaced
    replaced  how many labels were replaced in all, listed or not
    Returns listed, found; precision (of the whole list) and recall; at_replaced, both of the first `replaced` of the list, which may be
    shorter; average_precision: the mean over all that were replaced of the precision of the list down to each, 0 where one is not
    in it. None where there is nothing to divide by.
    """
    hits = np.cumsum(wrong)
    first = min(replaced, len(wrong))

    def figures(listed: int) -> dict[str, Any]:
        found = int(hits[listed - 1]) if listed else 0
        return {
            "listed": listed,
            "found": found,
            "precision": found / listed if listed else None,
            "recall": found / replaced if replaced else None,
        }

    precisions = hits / np.arange(1, len(wrong) + 1)
    average = float(precisions[np.asarray(wrong, bool)].sum()) / replaced if replaced else None
    return {**figures(len(wrong)), "at_replaced": figures(first), "average_precision": average}


class LabelNoiseCounter:
    """Collects, shard by shard, what the list holds and what was replaced."""

    def __init__(self, noise: LabelNoise) -> None:
        self._noise = noise
        self._doubt, self._wrong = [np.zeros(0)], [np.zeros(0, bool)]
        self._labelled = self._replaced = 0

    def add(self, ids: list[str], label: np.ndarray, doubt: np.ndarray) -> None:
        """The samples of a shard: label int [n], -1 without; doubt float [n], by which the list is ordered, NaN of those not in it."""
        wrong = np.array([self._noise.replaced(sample_id) for sample_id in ids], bool) & (
            label >= 0
        )
        listed = np.isfinite(doubt)
        self._labelled += int((label >= 0).sum())
        self._replaced += int(wrong.sum())
        self._doubt.append(doubt[listed])
        self._wrong.append(wrong[listed])

    def figures(self) -> dict[str, Any]:
        """Labelled samples that were looked at, how many of them have a replaced label, and `found_by` of the list."""
        order = np.argsort(-np.concatenate(self._doubt), kind="stable")
        return {
            "labelled": self._labelled,
            "replaced": self._replaced,
            "list": found_by(np.concatenate(self._wrong)[order], self._replaced),
        }


def noise_figures(
    run: Run, noise: LabelNoise, judged: dict[str, Any], files: list[str]
) -> dict[str, Any]:
    """Everything `summary.json` says of a rehearsal with replaced labels; judged: of `LabelNoiseCounter`; files: the keep-lists."""
    found = {"share": noise.share, "noise_seed": noise.seed, "warning": noise.warning, **judged}
    found["keep"] = {file: _share_of(run, noise, file) for file in files}
    return {**found, "sentence": _sentence(found)}


def _share_of(run: Run, noise: LabelNoise, file: str) -> float | None:
    """The share of a keep-list's labelled samples whose label was replaced."""
    table = storage.read_table(run.path("keep", file), ["sample_id", "label"])
    ids = table["sample_id"].filter(table["label"].is_valid()).to_pylist()
    return sum(map(noise.replaced, ids)) / len(ids) if ids else None


def _sentence(found: dict[str, Any]) -> str:
    listed = found["list"]
    first = listed["at_replaced"]
    share = found["replaced"] / found["labelled"] if found["labelled"] else None
    if not listed["listed"]:
        sentence = f"The list of likely label errors is empty; {text.count(found['replaced'])} labels were replaced."
    else:
        sentence = (
            f"Of {text.count(listed['listed'])} samples listed as likely label errors {text.share(listed['precision'])} have a replaced "
            f"label (by chance {text.share(share)}), which are {text.share(listed['recall'])} of the {text.count(found['replaced'])} "
            f"replaced; of the first {text.count(first['listed'])}, {text.share(first['precision'])}; average precision "
            f"{text.fixed(listed['average_precision'])}."
        )
    kept = [
        f"{text.share(value)} in {file}"
        for file, value in found["keep"].items()
        if value is not None
    ]
    return sentence + (f" Replaced labels in keep-lists: {', '.join(kept)}." if kept else "")
