"""Judging the extrapolator: each function is a part that `raypipe.stages.extrapolate.fit` runs in a task, and writes under `extrapolator/`

    fold-<number>.parquet  a part of the seed set, predicted by a fit on the rest of it
    audit.parquet          the audit set, predicted by the fit on all of the seed set, with its measured scores
    rehearsal.parquet      half of the seed set, predicted by what was learned without training on it, and transfer.safetensors, the map
                           that was learned from it
    published.parquet      what gnn-published predicts for the samples that fidelity is judged on
    curve.json             fidelity against the size of the seed set
    fidelity.json          figures and intervals, from all of these

The tables of predictions hold sample_id, label, measured, predicted, difficulty and a column `baseline:<name>` a baseline.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from raypipe import storage
from raypipe.config import Config
from raypipe.progress import ProgressCallback
from raypipe.runs.layout import Run
from raypipe.runs.measured_scores import count_measured, measured_scores
from raypipe.stages.extrapolate.measured import WHOLE_METHODS, FitData, ScoredSamples

BASELINE = "baseline:"
TRANSFER = "transfer.safetensors"
PUBLISHED_SAMPLES = 10_000
"""`extrapolate.judge_published: auto` judges gnn-published beside the method in sources of at most so many samples."""


def fold_count(config: Config, run: Run) -> int:
    """How many parts of the seed set are held out in turn. After a rehearsal they are for `fidelity_seed` alone, and one will do."""
    settings = config.extrapolate
    if settings.folds != "auto":
        return settings.folds
    if settings.method in WHOLE_METHODS or has_rehearsal(run):
        return 1
    return settings.folds_of(count_measured(run), len(run.classes().names))


def assesses_published(config: Config, samples: int) -> bool:
    """Whether gnn-published is judged beside the method."""
    asked = config.extrapolate.judge_published
    return config.extrapolate.method != "gnn-published" and (
        samples <= PUBLISHED_SAMPLES if asked == "auto" else asked
    )


def write_fold(number: int, config: Config, run: Run, samples: int, step: ProgressCallback) -> None:
    """Hold one part of the seed set out of a fit, and write the predictions of it.

    Where an audit set decides how wide intervals are and how faithful scores, a fit of gnn with one network does, without the mlp beside it:
    it tells as well which samples have wide intervals, in less than half the time.
    """
    from raypipe.assessment.conformal import MIN_SAMPLES_TO_RESCALE
    from raypipe.assessment.fidelity import hold_out

    data = FitData(config, run, samples, config.extrapolate.method in WHOLE_METHODS)
    held, seed, audit = _held(config, run, data.seed)[number], data.seed, data.audit()
    quick = (
        config.extrapolate.method == "gnn"
        and audit is not None
        and len(audit.ids) >= MIN_SAMPLES_TO_RESCALE
    )

    def fresh() -> Any:
        extrapolator = make_extrapolator(config, run)
        if quick:
            extrapolator.members = 1
        return extrapolator

    found = hold_out(
        fresh, seed.nodes, seed.score, held, data.everything, seed.rows, step, mlp=not quick
    )
    _write(run, f"fold-{number}", [seed.ids[row] for row in held], found)


def make_extrapolator(config: Config, run: Run, proxy_of: Run | None = None) -> Any:
    """The extrapolator, not fitted; proxy_of: the run whose proxy made the embeddings, where it is another."""
    from raypipe.extrapolators import make
    from raypipe.runs.checkpoints import last_layer

    extrapolator: Any = make(config.extrapolate, len(run.classes().names))
    if config.extrapolate.method == "gnn" and "proxy" in run.ledger():
        extrapolator.head = last_layer(proxy_of or run)
    return extrapolator


def has_rehearsal(run: Run) -> bool:
    """Whether there is a rehearsal to learn from; a run within a run has none."""
    return "rehearse" in run.ledger()


def write_rehearsal(config: Config, run: Run, samples: int, step: ProgressCallback) -> None:
    """Learn the map to samples that no proxy was trained on, and write its predictions of half of the seed set."""
    from safetensors.numpy import save

    from raypipe.assessment.rehearsal import rehearse
    from raypipe.stages.rehearse import inner_run, rehearsal

    ids, given = rehearsal(config, run, measured_scores(run, config.score, "seed"))
    transfer, found = rehearse(
        lambda: make_extrapolator(config, run, inner_run(run)), given, config.extrapolate.seed, step
    )
    _write(run, "rehearsal", ids, found)
    storage.write_bytes(run.path("extrapolator", TRANSFER), save(transfer.tensors()))


def write_published(config: Config, run: Run, samples: int, step: ProgressCallback) -> None:
    """What gnn-published predicts for the audit set from the seed set; without an audit set, for each part from the others."""
    from raypipe.extrapolators.published.gnn import GnnPublished

    data, classes = FitData(config, run, samples, whole=True), len(run.classes().names)
    seed, audit = data.seed, data.audit()
    plain = config.extrapolate.model_copy(
        update={"method": "gnn-published", "epochs": "auto", "neighbours": "auto"}
    )
    if audit is not None:
        tasks = [(seed.in_graph, seed.score, audit.ids, audit.in_graph)]
    else:
        tasks = []
        for held in _held(config, run, seed):
            kept = np.setdiff1d(np.arange(len(seed.ids)), held)
            tasks.append(
                (
                    seed.in_graph[kept],
                    seed.score[kept],
                    [seed.ids[row] for row in held],
                    seed.in_graph[held],
                )
            )
    ids: list[str] = []
    predicted: list[np.ndarray] = []
    for number, (rows, score, names, wanted) in enumerate(tasks):

        def steps(done: int, total: int, before: int = number) -> None:
            step(before * total + done, len(tasks) * total)

        model = GnnPublished(plain, classes)
        model.fit_graph(data.everything, rows, score, steps)
        ids += names
        predicted.append(model.predict_rows(wanted))
    table = pa.table(
        {
            "sample_id": pa.array(ids, pa.string()),
            "predicted": pa.array(np.concatenate(predicted), pa.float32()),
        }
    )
    storage.write_table(run.path("extrapolator", "published.parquet"), table)


def write_curve(config: Config, run: Run, samples: int, step: ProgressCallback) -> None:
    """The learning curve, judged on the audit set, or where that is too small on the first part of the seed set that is held out."""
    from raypipe.assessment.learning_curve import learning_curve
    from raypipe.assessment.rank_agreement import MIN_SAMPLES

    data = FitData(config, run, samples, whole=False)
    seed, audit = data.seed, data.audit()
    if audit is not None and len(audit.ids) >= MIN_SAMPLES:
        judged_on = "audit"
        curve = learning_curve(
            seed.nodes, seed.score, audit.nodes, audit.score, config.extrapolate.seed
        )
    else:
        judged_on, held = "seed", _held(config, run, seed)[0]
        kept = np.setdiff1d(np.arange(len(seed.ids)), held)
        part = seed.nodes.take(kept), seed.score[kept], seed.nodes.take(held), seed.score[held]
        curve = learning_curve(*part, config.extrapolate.seed)
    step(1, 1)
    storage.write_json(
        run.path("extrapolator", "curve.json"), curve.as_dict() | {"judged_on": judged_on}
    )


def write_fidelity(config: Config, run: Run, samples: int, step: ProgressCallback) -> None:
    """Predict the audit set, and write the figures: of the audit set where it can be judged, of the seed set in any case."""
    from raypipe.assessment.conformal import Conformal
    from raypipe.assessment.fidelity import HeldOutPredictions, compare

    settings, keep = config.extrapolate, sorted(set(config.select.keep))
    parts = [_read(run, f"fold-{number}") for number in range(fold_count(config, run))]
    ids, found = (
        [name for names, _ in parts for name in names],
        HeldOutPredictions.concat([part for _, part in parts]),
    )
    data = FitData(config, run, samples, settings.method in WHOLE_METHODS)
    audit_ids, audit = _audit(config, run, data)
    published = _published(run)
    judged = {"seed": compare(_with(found, ids, published), settings.seed, keep)}
    if has_rehearsal(run):
        # held-out seed samples were trained on, and a fit on them without the map is not the one that is used
        _, found = _read(run, "rehearsal")
        judged["rehearsal"] = compare(found, settings.seed, keep)
    intervals = Conformal.fit(found.residual, found.difficulty, settings.confidence, found.label)
    if audit is not None:
        judged["audit"] = compare(_with(audit, audit_ids, published), settings.seed, keep)
        intervals = intervals.stretched(audit.residual, audit.difficulty, audit.label)
    leading = next(
        (
            which
            for which in ("audit", "rehearsal")
            if which in judged and judged[which].spearman is not None
        ),
        "seed",
    )
    figures = {
        which: fidelity.as_dict() | {"judged_on": which} for which, fidelity in judged.items()
    }
    result = {
        "measured": len(data.seed.ids) + len(audit_ids),
        "keep": keep,
        "fidelity": figures[leading],
        "fidelity_seed": figures["seed"],
        "intervals": intervals.state(),
        "search": storage.read_json(run.path("extrapolator", "model.json"))["search"],
    }
    step(1, 1)
    storage.write_json(run.path("extrapolator", "fidelity.json"), result)


def load_extrapolator(config: Config, run: Run) -> Any:
    """The fitted extrapolator."""
    from safetensors.numpy import load

    from raypipe.extrapolators import make

    extrapolator: Any = make(config.extrapolate, len(run.classes().names))
    meta = storage.read_json(run.path("extrapolator", "model.json"))
    extrapolator.load_state(
        load(storage.read_bytes(run.path("extrapolator", "model.safetensors"))), meta
    )
    if has_rehearsal(run):
        from raypipe.extrapolators.transfer import Transfer

        extrapolator.transfer = Transfer.from_tensors(
            load(storage.read_bytes(run.path("extrapolator", TRANSFER)))
        )
    return extrapolator


def load_intervals(run: Run) -> Any:
    """Its calibrated intervals."""
    from raypipe.assessment.conformal import Conformal

    return Conformal.from_state(
        storage.read_json(run.path("extrapolator", "fidelity.json"))["intervals"]
    )


def is_assessed(config: Config, run: Run) -> bool:
    """Whether there are figures, at every keep fraction that is asked for."""
    if "fidelity.json" not in storage.names(run.path("extrapolator")):
        return False
    return set(config.select.keep) <= set(
        storage.read_json(run.path("extrapolator", "fidelity.json"))["keep"]
    )


def _held(config: Config, run: Run, seed: ScoredSamples) -> list[np.ndarray]:
    from raypipe.assessment.fidelity import split

    return split(
        len(seed.ids), config.extrapolate.holdout, fold_count(config, run), config.extrapolate.seed
    )


def _audit(config: Config, run: Run, data: FitData) -> tuple[list[str], Any]:
    """Ids and predictions of the audit set; none and None without one. They are made once, and then read again."""
    from raypipe.assessment.fidelity import predict

    if "audit.parquet" in storage.names(run.path("extrapolator")):
        return _read(run, "audit")
    audit = data.audit()
    if audit is None:
        return [], None
    model = load_extrapolator(config, run)
    if data.whole:
        model.attach_graph(data.everything)
    found = predict(model, data.seed.nodes, data.seed.score, audit.nodes, audit.score, audit.rows)
    _write(run, "audit", audit.ids, found)
    return audit.ids, found


def _published(run: Run) -> dict[str, float]:
    """What gnn-published predicts, by id."""
    if "published.parquet" not in storage.names(run.path("extrapolator")):
        return {}
    table = storage.read_table(run.path("extrapolator", "published.parquet"))
    return dict(zip(table["sample_id"].to_pylist(), table["predicted"].to_pylist(), strict=True))


def _with(found: Any, ids: Sequence[str], published: dict[str, float]) -> Any:
    """Predictions with those of gnn-published among the baselines, where it predicted the same samples."""
    if not ids or not published.keys() >= set(ids):
        return found
    predicted = np.array([published[name] for name in ids], np.float64)
    return dataclasses.replace(found, baselines={**found.baselines, "gnn_published": predicted})


def _write(run: Run, name: str, ids: Sequence[str], found: Any) -> None:
    columns = {
        "sample_id": pa.array(ids if len(found) else [], pa.string()),
        "label": pa.array(found.label, pa.int32(), mask=found.label < 0),
        "measured": pa.array(found.measured, pa.float64()),
        "predicted": pa.array(found.predicted, pa.float64()),
        "difficulty": pa.array(found.difficulty, pa.float32()),
        **{
            BASELINE + rival: pa.array(value, pa.float64())
            for rival, value in found.baselines.items()
        },
    }
    about = {"raypipe.n_fit": str(found.n_fit), "raypipe.note": found.note}
    storage.write_table(
        run.path("extrapolator", f"{name}.parquet"),
        pa.table(columns).replace_schema_metadata(about),
    )


def _read(run: Run, name: str) -> tuple[list[str], Any]:
    from raypipe.assessment.fidelity import HeldOutPredictions

    table = storage.read_table(run.path("extrapolator", f"{name}.parquet"))
    about = table.schema.metadata
    rivals = [column for column in table.column_names if column.startswith(BASELINE)]
    found = HeldOutPredictions(
        table["label"].fill_null(-1).to_numpy().astype(np.int64),
        table["measured"].to_numpy(),
        table["predicted"].to_numpy(),
        table["difficulty"].to_numpy(),
        {column.removeprefix(BASELINE): table[column].to_numpy() for column in rivals},
        int(about[b"raypipe.n_fit"]),
        about[b"raypipe.note"].decode(),
    )
    return table["sample_id"].to_pylist(), found
