"""Files of predictions that an extrapolator is assessed by: `extrapolator/<name>.parquet`.

They hold sample_id, label, measured, predicted, difficulty, a column `doubt:<name>` for each other
doubt of the extrapolator (`raypipe.extrapolators.base.DOUBTS`), where there is a proxy
proxy_correct, and a column `baseline:<name>` for each baseline.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raypipe import storage
from raypipe.runs.run import Run

if TYPE_CHECKING:
    from raypipe.assessment.held_out import ExtremePredictions, HeldOutPredictions

BASELINE = "baseline:"
"""Prefix of the columns of baselines."""
DOUBT = "doubt:"
"""Prefix of the columns of doubts, but for the first, the difficulty."""
CORRECT = "proxy_correct"
"""Column: whether the proxy gives the sample its label."""
EXTREMES = "extremes"
"""Name of the predictions for samples drawn from the extreme ones."""
ZONE = "raypipe.zone"
"""Metadata of this file: `ExtremeZone.as_dict` as JSON."""


@dataclass(frozen=True)
class PredictedSamples:
    """Predictions of samples that the extrapolator was not fitted on, with the ids.

    Attributes
    ----------
    ids : list of str
        Ids of the m samples.
    predictions : HeldOutPredictions
        Their measured and predicted scores; empty where the fit had too few samples.
    """

    ids: list[str]
    predictions: HeldOutPredictions

    @classmethod
    def concat(cls, parts: Sequence[PredictedSamples]) -> PredictedSamples:
        """Join several."""
        from raypipe.assessment.held_out import HeldOutPredictions

        ids = [sample_id for part in parts for sample_id in part.ids]
        return cls(ids, HeldOutPredictions.concat([part.predictions for part in parts]))

    def with_published(self, published: dict[str, float]) -> HeldOutPredictions:
        """Add the baseline gnn-published where it predicted the same samples.

        `published` has its predictions by id.
        """
        if not self.ids or not published.keys() >= set(self.ids):
            return self.predictions
        predicted = np.array([published[sample_id] for sample_id in self.ids], np.float64)
        baselines = {**self.predictions.baselines, "gnn_published": predicted}
        return replace(self.predictions, baselines=baselines)


def write_predictions(
    run: Run,
    name: str,
    ids: Sequence[str],
    predictions: HeldOutPredictions,
    further: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write the predictions of the samples with these ids, and `further` metadata."""
    from raypipe.extrapolators.base import DOUBTS

    doubt = predictions.calibration().doubt
    columns = {
        "sample_id": pa.array(ids if len(predictions) else [], pa.string()),
        "label": pa.array(predictions.label, pa.int32(), mask=predictions.label < 0),
        "measured": pa.array(predictions.measured, pa.float64()),
        "predicted": pa.array(predictions.predicted, pa.float64()),
        "difficulty": pa.array(predictions.difficulty, pa.float32()),
        **{
            DOUBT + name: pa.array(doubt[:, column], pa.float32())
            for column, name in enumerate(DOUBTS)
            if column
        },
        **{
            BASELINE + baseline: pa.array(values, pa.float64())
            for baseline, values in predictions.baselines.items()
        },
    }
    if predictions.correct is not None:
        columns[CORRECT] = pa.array(predictions.correct, pa.bool_())
    metadata = {"raypipe.n_fit": str(predictions.n_fit), "raypipe.note": predictions.note}
    metadata |= further
    table = pa.table(columns).replace_schema_metadata(metadata)
    storage.write_table(run.held_out_predictions(name), table)


def read_predictions(run: Run, name: str) -> PredictedSamples:
    """Read what `write_predictions` wrote."""
    from raypipe.assessment.held_out import HeldOutPredictions
    from raypipe.extrapolators.base import DOUBTS

    table = storage.read_table(run.held_out_predictions(name))
    metadata = table.schema.metadata
    baselines = [column for column in table.column_names if column.startswith(BASELINE)]
    doubts = ["difficulty", *(DOUBT + name for name in DOUBTS[1:])]
    doubt = None  # in a file of version 0.2.0 or older
    if set(doubts) <= set(table.column_names):
        doubt = np.stack([table[name].to_numpy() for name in doubts], 1)
    predictions = HeldOutPredictions(
        table["label"].fill_null(-1).to_numpy().astype(np.int64),
        table["measured"].to_numpy(),
        table["predicted"].to_numpy(),
        table["difficulty"].to_numpy(),
        {column.removeprefix(BASELINE): table[column].to_numpy() for column in baselines},
        int(metadata[b"raypipe.n_fit"]),
        metadata[b"raypipe.note"].decode(),
        doubt,
        table[CORRECT].to_numpy() if CORRECT in table.column_names else None,
    )
    return PredictedSamples(table["sample_id"].to_pylist(), predictions)


def write_extremes(run: Run, ids: Sequence[str], extremes: ExtremePredictions) -> None:
    """Write the predictions of extreme samples with these ids."""
    zone = json.dumps(extremes.zone.as_dict())
    write_predictions(run, EXTREMES, ids, extremes.predictions, {ZONE: zone})


def read_extremes(run: Run) -> ExtremePredictions | None:
    """Read what `write_extremes` wrote; None where no extreme predictions were audited."""
    from raypipe.assessment.extremes import ExtremeZone
    from raypipe.assessment.held_out import ExtremePredictions

    if EXTREMES not in run.done("extrapolator"):
        return None
    with storage.open_read(run.held_out_predictions(EXTREMES)) as file:
        zone = json.loads(pq.read_schema(file).metadata[ZONE.encode()])
    predictions = read_predictions(run, EXTREMES).predictions
    return ExtremePredictions(predictions, ExtremeZone.from_dict(zone))


def write_published(run: Run, ids: Sequence[str], predicted: np.ndarray) -> None:
    """Write the predictions of gnn-published, float32 [m]."""
    table = pa.table(
        {"sample_id": pa.array(ids, pa.string()), "predicted": pa.array(predicted, pa.float32())}
    )
    storage.write_table(run.published_predictions, table)


def read_published(run: Run) -> dict[str, float]:
    """Read the predictions of gnn-published by id; empty where there are none."""
    if "published.parquet" not in storage.names(run.extrapolator_folder):
        return {}
    table = storage.read_table(run.published_predictions)
    return dict(zip(table["sample_id"].to_pylist(), table["predicted"].to_pylist(), strict=True))
