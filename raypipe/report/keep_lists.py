"""What the keep-lists hold, and how they change the balance of the classes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raypipe import storage
from raypipe.errors import RunError
from raypipe.report.schema import ClassFigures, ClassShare, KeepListFigures
from raypipe.report.score_scan import QUANTILES, ScoreScan
from raypipe.report.text import label_name
from raypipe.runs.run import Run
from raypipe.sources.types import IdFilter

MAX_LOOKED_UP = 1_000_000
"""Samples of a list whose set is looked up; hashing more ids would take minutes."""


@dataclass(frozen=True)
class KeepListScan:
    """A keep-list as its file describes it.

    Attributes
    ----------
    fraction, file, strategy, by_class, forced
        From the metadata and the name of the file; `forced`: despite a fidelity that is too low.
    samples
        Samples in it.
    lowest_score
        Infinite if it is empty.
    per_class
        int64 [C + 1]: its samples in each class; last, those without a label.
    looked_up
        Samples whose set was looked up: all, or the first `MAX_LOOKED_UP`.
    in_sets
        How many of these are in the seed set and in the audit set.
    reason, candidate
        With strategy auto: why it was cut like this, and the name of the pilot's candidate.
    """

    fraction: float
    file: str
    strategy: str | None
    by_class: bool
    forced: bool
    samples: int
    lowest_score: float
    per_class: np.ndarray
    looked_up: int
    in_sets: Mapping[str, int]
    reason: str = ""
    candidate: str = ""


def scan_keep_lists(
    run: Run, classes: int, sets: Mapping[str, IdFilter] = MappingProxyType({})
) -> list[KeepListScan]:
    """Read every keep-list of the run, by rising keep fraction.

    Parameters
    ----------
    run
        The run.
    classes
        Number of classes.
    sets
        Rules that tell from an id whether a sample is in a set, by name of the set.
    """
    files = [file for file in storage.names(run.keep_folder) if file.endswith(".parquet")]
    scans = [_scan_keep_list(run, file, classes, sets) for file in files]
    return sorted((scan for scan in scans if scan is not None), key=lambda scan: scan.fraction)


def _scan_keep_list(
    run: Run, file: str, classes: int, sets: Mapping[str, IdFilter]
) -> KeepListScan | None:
    """Return None for a Parquet file that is not a keep-list."""
    per_class, lowest, samples = np.zeros(classes + 1, np.int64), math.inf, 0
    looked_up, in_sets = 0, dict.fromkeys(sets, 0)
    try:
        with storage.open_read(run.keep_list(file)) as handle:
            parquet = pq.ParquetFile(handle)
            metadata = {
                key.decode(): value.decode()
                for key, value in (parquet.schema_arrow.metadata or {}).items()
            }
            columns = ["label", "score", *(["sample_id"] if sets else [])]
            for batch in parquet.iter_batches(columns=columns):
                if sets and looked_up < MAX_LOOKED_UP:
                    ids = batch["sample_id"].to_pylist()
                    looked_up += len(ids)
                    for name, rule in sets.items():
                        in_sets[name] += sum(map(rule, ids))
                label = batch["label"].fill_null(-1).to_numpy().astype(np.int64)
                row_class = np.where((label < 0) | (label >= classes), classes, label)
                per_class += np.bincount(row_class, minlength=classes + 1)
                score = batch["score"].to_numpy(zero_copy_only=False)
                samples += len(label)
                lowest = min(lowest, float(np.min(score, initial=math.inf)))
    except pa.ArrowException as error:
        raise _unreadable(run, file, error) from None
    try:
        fraction = float(
            metadata.get("raypipe.fraction", file.removeprefix("keep-").removesuffix(".parquet"))
        )
    except ValueError:
        return None
    return KeepListScan(
        fraction,
        file,
        metadata.get("raypipe.strategy"),
        _by_class(metadata),
        metadata.get("raypipe.forced") == "true",
        samples,
        lowest,
        per_class,
        looked_up,
        in_sets,
        metadata.get("raypipe.reason", ""),
        metadata.get("raypipe.candidate", ""),
    )


def _by_class(metadata: Mapping[str, str]) -> bool:
    """Tell from a keep-list's metadata whether the strategy worked within each class."""
    try:
        options = json.loads(metadata.get("raypipe.options", "{}"))
    except ValueError:
        return False
    return isinstance(options, dict) and options.get("by_class") is True


def in_keep_list(run: Run, file: str, ids: Sequence[str]) -> np.ndarray:
    """Return which of some samples a keep-list holds, bool [n].

    The ids of the list are read piece by piece.
    """
    searched, held = pa.array(list(ids), pa.string()), np.zeros(len(ids), bool)
    try:
        with storage.open_read(run.keep_list(file)) as handle:
            # as a dictionary: a long id that is repeated in every row is stored only once
            for batch in pq.ParquetFile(handle, read_dictionary=["sample_id"]).iter_batches(
                columns=["sample_id"]
            ):
                column = batch["sample_id"]
                values = column.dictionary if pa.types.is_dictionary(column.type) else column
                rows = pc.index_in(values.cast(pa.string()), value_set=searched)
                held[rows.drop_null().to_numpy()] = True
    except pa.ArrowException as error:
        raise _unreadable(run, file, error) from None
    return held


def _unreadable(run: Run, file: str, error: Exception) -> RunError:
    return RunError(
        f"{run.keep_list(file)}: not a readable keep-list ({error}); delete it and select again"
    )


def keep_list_figures(
    names: Sequence[str], scan: ScoreScan, keep_list: KeepListScan
) -> KeepListFigures:
    """Return what a keep-list holds, and what it does to the classes that have samples."""
    present = np.flatnonzero(scan.class_samples)
    share = keep_list.per_class[present] / scan.class_samples[present]
    figures: KeepListFigures = {
        "fraction": keep_list.fraction,
        "file": keep_list.file,
        "strategy": keep_list.strategy,
        "by_class": keep_list.by_class,
        "forced": keep_list.forced,
        "samples": keep_list.samples,
        "lowest_score": keep_list.lowest_score,
        "emptied_classes": int((share == 0).sum()),
        "even_classes": even_classes(keep_list.per_class),
        "reason": keep_list.reason,
        "candidate": keep_list.candidate,
    }

    def class_share(row: int) -> ClassShare:
        return {"name": class_name(names, scan, int(present[row])), "share": float(share[row])}

    if len(present):
        figures["least_kept"] = class_share(int(share.argmin()))
        figures["most_kept"] = class_share(int(share.argmax()))
    return figures


def class_figures(
    names: Sequence[str], scan: ScoreScan, keep_lists: Sequence[KeepListScan]
) -> list[ClassFigures]:
    """Return an entry for each class, and a last one for unlabelled samples if there are any."""
    return [
        {
            "label": label if label < scan.classes else None,
            "name": class_name(names, scan, label),
            "samples": int(scan.class_samples[label]),
            "measured": int(scan.class_measured[label]),
            "mean_score": scan.mean_of(label),
            **quantiles_of(scan, label),  # type: ignore[typeddict-item]
            "kept": {item.file: int(item.per_class[label]) for item in keep_lists},
        }
        for label in range(scan.classes + 1)
        if label < scan.classes or scan.class_samples[label]
    ]


def quantiles_of(scan: ScoreScan, label: int) -> dict[str, float | None]:
    """Return q10 to q90 of the scores of a class; None if it has none."""
    values = scan.class_quantiles.get(label, [None] * len(QUANTILES))
    return {f"q{round(100 * q)}": value for q, value in zip(QUANTILES, values, strict=True)}


def even_classes(counts: np.ndarray) -> float:
    """Return the number of equally large classes that have the same entropy as these counts.

    That is exp of the Shannon entropy of the class shares; 0 without samples.
    """
    shares = counts[counts > 0] / max(counts.sum(), 1)
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0


def class_name(names: Sequence[str], scan: ScoreScan, label: int) -> str:
    """Return the name of a class; the number of classes stands for the unlabelled."""
    return label_name(names, label if label < scan.classes else None)
