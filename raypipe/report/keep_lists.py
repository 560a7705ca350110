"""What the keep-lists hold, and what that does to the balance of the classes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raypipe import storage
from raypipe.errors import RunError
from raypipe.report.score_scan import QUANTILES, ScoreScan
from raypipe.report.text import label_name
from raypipe.runs.layout import Run


def keep_lists(run: Run, classes: int) -> list[dict[str, Any]]:
    """What each keep-list holds, by rising keep fraction; `per_class` [C + 1] is taken out again by `class_figures`."""
    result = []
    for file in storage.names(run.path("keep")):
        if not file.endswith(".parquet"):
            continue
        per_class, least, count = np.zeros(classes + 1, np.int64), math.inf, 0
        try:
            with storage.open_read(run.path("keep", file)) as handle:
                parquet = pq.ParquetFile(handle)
                about = {
                    key.decode(): value.decode()
                    for key, value in (parquet.schema_arrow.metadata or {}).items()
                }
                for batch in parquet.iter_batches(columns=["label", "score"]):
                    label = batch["label"].fill_null(-1).to_numpy().astype(np.int64)
                    per_class += np.bincount(
                        np.where((label < 0) | (label >= classes), classes, label),
                        minlength=classes + 1,
                    )
                    count += len(label)
                    least = min(
                        least,
                        float(
                            np.min(batch["score"].to_numpy(zero_copy_only=False), initial=math.inf)
                        ),
                    )
        except pa.ArrowException as error:
            raise _unreadable(run, file, error) from None
        stated = about.get("raypipe.fraction", file.removeprefix("keep-").removesuffix(".parquet"))
        try:
            fraction = float(stated)
        except ValueError:
            continue  # a file of somebody else's
        result.append(
            {
                "fraction": fraction,
                "file": file,
                "strategy": about.get("raypipe.strategy"),
                "by_class": _by_class(about),
                "forced": about.get("raypipe.forced") == "true",
                "samples": count,
                "lowest_score": least,
            }
            | {"per_class": per_class}
        )
    return sorted(result, key=lambda item: item["fraction"])


def _by_class(about: Mapping[str, str]) -> bool:
    """Whether the strategy worked within each class, by a keep-list's metadata."""
    try:
        options = json.loads(about.get("raypipe.options", "{}"))
    except ValueError:
        return False
    return isinstance(options, dict) and options.get("by_class") is True


def held(run: Run, file: str, ids: Sequence[str]) -> np.ndarray:
    """Which of some samples a keep-list holds, bool [n]. Reads the ids of the list piece by piece."""
    wanted, found = pa.array(list(ids), pa.string()), np.zeros(len(ids), bool)
    try:
        with storage.open_read(run.path("keep", file)) as handle:
            # as a dictionary: one long text that is repeated in every row takes its length once
            for batch in pq.ParquetFile(handle, read_dictionary=["sample_id"]).iter_batches(
                columns=["sample_id"]
            ):
                known = batch["sample_id"]
                values = known.dictionary if pa.types.is_dictionary(known.type) else known
                rows = pc.index_in(values.cast(pa.string()), value_set=wanted)
                found[rows.drop_null().to_numpy()] = True
    except pa.ArrowException as error:
        raise _unreadable(run, file, error) from None
    return found


def _unreadable(run: Run, file: str, error: Exception) -> RunError:
    return RunError(
        f"{run.path('keep', file)}: not a readable keep-list ({error}); delete it and select again"
    )


def class_figures(
    names: list[str], scan: ScoreScan, keep: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """One entry a class (and one for the unlabelled, where there are any): samples before, kept by each keep-list, quantiles.

    Takes `per_class` out of the keep-lists and puts there their least and most kept class, how many are emptied, and
    `even_classes`, see `even_classes`.
    """
    kept = {item["file"]: item.pop("per_class") for item in keep}
    there = np.flatnonzero(scan.class_samples)
    for item in keep:
        share = kept[item["file"]][there] / scan.class_samples[there]
        item["emptied_classes"] = int((share == 0).sum())
        item["even_classes"] = even_classes(kept[item["file"]])
        for key, row in (
            (("least_kept", share.argmin), ("most_kept", share.argmax)) if len(there) else ()
        ):
            item[key] = {
                "name": name_of(names, scan, int(there[row()])),
                "share": float(share[row()]),
            }
    return [
        {
            "label": label if label < scan.classes else None,
            "name": name_of(names, scan, label),
            "samples": int(scan.class_samples[label]),
            "measured": int(scan.class_measured[label]),
            "mean_score": scan.mean_of(label),
            **quantiles_of(scan, label),
            "kept": {file: int(counts[label]) for file, counts in kept.items()},
        }
        for label in range(scan.classes + 1)
        if label < scan.classes or scan.class_samples[label]
    ]


def quantiles_of(scan: ScoreScan, label: int) -> dict[str, float | None]:
    """q10 to q90 of the scores of a class; None where it has none."""
    found = scan.class_quantiles.get(label, [None] * len(QUANTILES))
    return {f"q{round(100 * q)}": value for q, value in zip(QUANTILES, found, strict=True)}


def even_classes(counts: np.ndarray) -> float:
    """As many classes of equal size would have the same entropy: exp of the Shannon entropy of the class shares; 0 without samples."""
    shares = counts[counts > 0] / max(counts.sum(), 1)
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0


def name_of(names: list[str], scan: ScoreScan, label: int) -> str:
    """Name of a class; the number of classes stands for the unlabelled."""
    return label_name(names, label if label < scan.classes else None)
