"""Audit extreme predictions: measure some of the samples that have them, once all are predicted.

Errors are largest where predictions are extreme, and a random draw holds few such samples. The zone
of extreme predictions is that of the random draw, see `raypipe.assessment.extremes`. The score
shards are read once. The samples outside the random draw are counted inside and outside the zone,
and those inside with the lowest hashes of their ids are drawn (`extrapolate.audit_extremes`). They
are decoded and measured like audit samples.

Writes `extrapolator/extremes.parquet`, measured and predicted scores, from which `fidelity.json` is
written again. The score shards do not change: these samples keep their predicted scores, so that
keep-lists treat them like all others, and `measured` still marks a random draw.

Where the proxy has an audit set, this set is the random draw. With cross-fitting, that is all seed
and audit samples.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from raypipe import storage
from raypipe.config import Config
from raypipe.distributed.context import Context
from raypipe.distributed.step_tasks import run_step_functions
from raypipe.errors import StageError
from raypipe.progress import ProgressCallback
from raypipe.runs.ledger import StageRecord
from raypipe.runs.run import Run
from raypipe.selection.hashing import lowest, with_order
from raypipe.sources import Fragment
from raypipe.stages.extrapolate.assess import write_fidelity
from raypipe.stages.extrapolate.fidelity_file import FidelityFile
from raypipe.stages.extrapolate.fit_part import read_part_predictions
from raypipe.stages.extrapolate.measured import read_samples
from raypipe.stages.extrapolate.model import load_extrapolator
from raypipe.stages.extrapolate.predictions import (
    EXTREMES,
    PredictedSamples,
    read_predictions,
    write_extremes,
)
from raypipe.stages.measure.extra_samples import can_measure, measure_samples

if TYPE_CHECKING:
    from raypipe.assessment.extremes import ExtremeZone
    from raypipe.extrapolators.base import Nodes

SALT = 0x65787472656D65
"""Hash seed of this draw, so that it is independent of all others."""
COLUMNS = ["sample_id", "label", "score", "measured"]


def is_audited(config: Config, record: StageRecord) -> bool:
    """Return whether a finished stage audited as many extremes as now set.

    True for runs of versions that audited none.
    """
    setting = config.extrapolate.audit_extremes
    return bool(record.detail.get("audit_extremes", setting) == setting)


def remove_audit(run: Run) -> None:
    """Remove the audited extremes of another setting."""
    storage.delete(run.held_out_predictions(EXTREMES))


def audit_extremes(context: Context, record: StageRecord, fragments: Sequence[Fragment]) -> None:
    """Measure extreme predictions, unless that is done, and assess the extrapolator with them."""
    config, run = context.config, context.run
    samples = sum(fragment.samples for fragment in fragments)
    count = config.extreme_samples(samples)
    if not count or EXTREMES in run.done("extrapolator"):
        return
    random = _random_draw(config, run)
    if random is None or not len(random.predictions):
        return
    if not can_measure(config, run):
        context.progress.say(
            "note: extreme predictions are not audited, because the run no longer has the "
            "checkpoints and mean gradients that measure them; --redo proxy computes them again"
        )
        return
    draw = _draw(run, fragments, random, count)
    if not len(draw.samples):
        return
    scores = measure_samples(context, record, fragments, draw.samples)
    measured = dict(
        zip(scores["sample_id"].to_pylist(), scores[config.score].to_pylist(), strict=True)
    )
    if not np.isfinite(list(measured.values())).all():
        raise StageError(
            f"{config.score} of some extreme predictions is not finite, so they cannot be "
            "assessed; set extrapolate.audit_extremes to 0 to skip this check"
        )
    for name, function in (
        ("extremes", functools.partial(_write, draw, measured)),
        ("fidelity", write_fidelity),
    ):
        record.cpu_seconds += run_step_functions(context, {name: function}, samples)


@dataclass(frozen=True)
class _ExtremeDraw:
    """Drawn samples, columns sample_id, label, fragment; and the zone that they were drawn from."""

    samples: pa.Table
    zone: ExtremeZone


def _random_draw(config: Config, run: Run) -> PredictedSamples | None:
    """Return the predictions of the measured samples that were drawn at random; None without."""
    if not config.proxy.cross_fits:
        return read_predictions(run, "audit") if "audit" in run.done("extrapolator") else None
    sets = [read_part_predictions(config, run, which) for which in ("seed", "audit")]
    return PredictedSamples.concat([part for part in sets if part is not None])


def _draw(
    run: Run, fragments: Sequence[Fragment], random: PredictedSamples, count: int
) -> _ExtremeDraw:
    """Read the score shards once; count the zone, and draw `count` of its samples."""
    from raypipe.assessment.extremes import ExtremeZone

    zone, drawn = ExtremeZone.of(random.predictions.predicted), pa.table({})

    def read(name: str) -> pa.Table:
        return storage.read_table(run.score_shard(name), COLUMNS)

    names = [fragment.fragment_id for fragment in fragments]
    for name, table in storage.ahead(read, names, run.uri):
        others = ~table["measured"].to_numpy() & (table["label"].fill_null(-1).to_numpy() >= 0)
        predicted = table["score"].to_numpy()
        zone = zone.count(predicted[others])
        extreme = table.filter(pa.array(others & zone.contains(predicted)))
        extreme = extreme.select(["sample_id", "label"])
        drawn = lowest([drawn, with_order(extreme, name, SALT)], count)
    return _ExtremeDraw(drawn, zone)


def _write(
    draw: _ExtremeDraw,
    measured: dict[str, float],
    config: Config,
    run: Run,
    samples: int,
    step: ProgressCallback,
) -> None:
    """Write measured scores and predictions of the drawn samples. Runs in a task."""
    from raypipe.assessment.held_out import ExtremePredictions, HeldOutPredictions, proxy_is_right
    from raypipe.extrapolators.base import DOUBTS

    ids, nodes, part = _embedded(draw, measured, config, run, step)
    predicted = np.zeros(len(ids), np.float64)
    doubt = np.zeros((len(ids), len(DOUBTS)), np.float32)
    for number in np.unique(part).tolist():
        rows = np.flatnonzero(part == number)
        extrapolator = load_extrapolator(config, run, number if config.proxy.cross_fits else None)
        predicted[rows], doubt[rows] = extrapolator.predict_with_doubt(nodes.take(rows))
    predictions = HeldOutPredictions(
        nodes.label,
        np.array([measured[sample_id] for sample_id in ids], np.float64),
        predicted,
        doubt[:, 0],
        {},
        n_fit=int(FidelityFile.read(run).fidelity["n_fit"]),
        doubt=doubt,
        correct=proxy_is_right(nodes),
    )
    write_extremes(run, ids, ExtremePredictions(predictions, draw.zone))


def _embedded(
    draw: _ExtremeDraw,
    measured: Mapping[str, float],
    config: Config,
    run: Run,
    step: ProgressCallback,
) -> tuple[list[str], Nodes, np.ndarray]:
    """Return ids, embeddings and parts of the drawn samples with a measured score."""
    from raypipe.extrapolators.base import Nodes

    ids: list[str] = []
    nodes: list[Nodes] = []
    parts: list[np.ndarray] = []
    fragments = sorted(set(draw.samples["fragment"].to_pylist()))
    drawn = set(draw.samples["sample_id"].to_pylist()) & set(measured)
    for done, fragment in enumerate(fragments):
        batch = read_samples(config, run.uri, fragment)
        names = batch["sample_id"].tolist()
        rows = np.array([row for row, name in enumerate(names) if name in drawn], np.int64)
        ids += [names[row] for row in rows]
        label = batch["label"][rows].astype(np.int64)
        nodes.append(Nodes(batch["embedding"][rows], label, batch["signals"][rows]))
        parts.append(batch["part"][rows])
        step(done + 1, len(fragments))
    return ids, Nodes.concat(nodes), np.concatenate(parts)
