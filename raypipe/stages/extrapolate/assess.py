"""Assess the extrapolator: steps that `raypipe.stages.extrapolate.fit` runs in tasks.

They write, under `extrapolator/`:

- `fold-<number>.parquet`: a part of the seed set, predicted by a fit on the rest of it;
- `audit.parquet`: the audit set, predicted by the fit on the whole seed set, with its measured
  scores;
- `rehearsal.parquet`: half of the seed set, predicted by what was learned without training on it;
  and `transfer.safetensors`, the map that was learned from it;
- `published.parquet`: predictions of gnn-published for the samples that fidelity is judged on;
- `curve.json`: fidelity against the size of the seed set;
- `fidelity.json`: figures and intervals, from all of these; the figures also from
  `extremes.parquet` (`raypipe.stages.extrapolate.extremes`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from raypipe import storage
from raypipe.config import Config
from raypipe.progress import ProgressCallback
from raypipe.runs.measured_scores import count_measured, measured_scores, scores_by_proxy
from raypipe.runs.proxy_roles import ProxyRoles
from raypipe.runs.rehearsal import inner_run, read_rehearsal
from raypipe.runs.run import Run
from raypipe.runs.sizes import PUBLISHED_SAMPLES, QUICK_FOLDS_AUDIT
from raypipe.stages.extrapolate.fidelity_file import FidelityFile, search_of
from raypipe.stages.extrapolate.fit_part import read_part_predictions
from raypipe.stages.extrapolate.measured import FitData, PartData, ScoredSamples
from raypipe.stages.extrapolate.model import (
    WHOLE_METHODS,
    has_rehearsal,
    load_extrapolator,
    make_extrapolator,
)
from raypipe.stages.extrapolate.predictions import (
    EXTREMES,
    PredictedSamples,
    read_extremes,
    read_predictions,
    read_published,
    write_predictions,
    write_published,
)

if TYPE_CHECKING:
    from raypipe.assessment.fidelity import Fidelity


def fold_count(config: Config, run: Run) -> int:
    """Return how many parts of the seed set are held out in turn.

    After a rehearsal, they serve `fidelity_seed` alone, and one is enough.
    """
    settings = config.extrapolate
    if settings.folds != "auto":
        return settings.folds
    if settings.method in WHOLE_METHODS or has_rehearsal(run):
        return 1
    return settings.folds_of(count_measured(run), len(run.classes().names))


def assesses_published(config: Config, samples: int) -> bool:
    """Return whether gnn-published is assessed along with the method."""
    setting = config.extrapolate.judge_published
    if config.proxy.cross_fits:  # its graph needs all samples in one space, seen alike
        return False
    return config.extrapolate.method != "gnn-published" and (
        samples <= PUBLISHED_SAMPLES if setting == "auto" else setting
    )


def write_fold(number: int, config: Config, run: Run, samples: int, step: ProgressCallback) -> None:
    """Fit without one part of the seed set, and write the predictions for it.

    Where an audit set decides the fidelity and the width of intervals, gnn fits a single network
    and the MLP baseline is left out: that shows as well which samples have wide intervals, in less
    than half the time.
    """
    from raypipe.assessment.held_out import hold_out

    data = FitData(config, run, samples, config.extrapolate.method in WHOLE_METHODS)
    seed, audit = data.seed, data.audit()
    held_out = _folds(config, run, seed)[number]
    quick = (
        config.extrapolate.method == "gnn"
        and audit is not None
        and len(audit.ids) >= QUICK_FOLDS_AUDIT
    )

    def make() -> Any:
        extrapolator = make_extrapolator(config, run, ProxyRoles.of(config).space(0))
        if quick:
            extrapolator.members = 1
        return extrapolator

    predictions = hold_out(
        make, seed.nodes, seed.score, held_out, data.everything, seed.rows, step, mlp=not quick
    )
    ids = [seed.ids[row] for row in held_out]
    write_predictions(run, f"fold-{number}", ids, predictions)


def write_rehearsal(config: Config, run: Run, samples: int, step: ProgressCallback) -> None:
    """Learn the map to samples that no proxy was trained on.

    Writes the map, and its predictions of half of the seed set.
    """
    from safetensors.numpy import save

    from raypipe.assessment.rehearsal import rehearse

    seed_scores = measured_scores(run, config.score, "seed")
    ids, rehearsal = read_rehearsal(run, config.score, seed_scores)
    transfer, predictions = rehearse(
        lambda: make_extrapolator(config, run, [0], inner_run(run)),
        rehearsal,
        config.extrapolate.seed,
        step,
    )
    write_predictions(run, "rehearsal", ids, predictions)
    storage.write_bytes(run.transfer_weights, save(transfer.tensors()))


@dataclass(frozen=True)
class PublishedFit:
    """One fit of gnn-published: rows to fit on and their scores; ids and rows to predict."""

    rows: np.ndarray
    score: np.ndarray
    predicted_ids: list[str]
    predicted_rows: np.ndarray


def write_published_predictions(
    config: Config, run: Run, samples: int, step: ProgressCallback
) -> None:
    """Write what gnn-published predicts for the audit set from the seed set.

    Without an audit set, it predicts each held-out part of the seed set from the rest.
    """
    from raypipe.extrapolators.published.gnn import GnnPublished

    data, classes = FitData(config, run, samples, whole=True), len(run.classes().names)
    assert data.source is not None
    settings = config.extrapolate.model_copy(
        update={"method": "gnn-published", "epochs": "auto", "neighbours": "auto"}
    )
    fits = _published_fits(config, run, data)
    ids: list[str] = []
    predicted: list[np.ndarray] = []
    for number, fit in enumerate(fits):

        def report(done: int, total: int, before: int = number) -> None:
            step(before * total + done, len(fits) * total)

        model = GnnPublished(settings, classes)
        model.fit_graph(data.source.nodes, fit.rows, fit.score, report)
        ids += fit.predicted_ids
        predicted.append(model.predict_rows(fit.predicted_rows))
    write_published(run, ids, np.concatenate(predicted))


def _published_fits(config: Config, run: Run, data: FitData) -> list[PublishedFit]:
    seed, audit = data.seed, data.audit()
    if audit is not None:
        return [PublishedFit(seed.in_graph, seed.score, audit.ids, audit.in_graph)]
    fits = []
    for held_out in _folds(config, run, seed):
        rest = np.setdiff1d(np.arange(len(seed.ids)), held_out)
        ids = [seed.ids[row] for row in held_out]
        fits.append(
            PublishedFit(seed.in_graph[rest], seed.score[rest], ids, seed.in_graph[held_out])
        )
    return fits


def write_curve(config: Config, run: Run, samples: int, step: ProgressCallback) -> None:
    """Write the learning curve.

    It is judged on the audit set, or, where that is too small, on the first held-out part of the
    seed set.
    """
    from raypipe.assessment.learning_curve import learning_curve
    from raypipe.assessment.rank_agreement import MIN_SAMPLES

    random_seed = config.extrapolate.seed
    if config.proxy.cross_fits:
        _write_curve_of_part(config, run, random_seed)
        step(1, 1)
        return
    data = FitData(config, run, samples, whole=False)
    seed, audit = data.seed, data.audit()
    if audit is not None and len(audit.ids) >= MIN_SAMPLES:
        judged_on = "audit"
        curve = learning_curve(seed.nodes, seed.score, audit.nodes, audit.score, random_seed)
    else:
        judged_on = "seed"
        held_out = _folds(config, run, seed)[0]
        rest = np.setdiff1d(np.arange(len(seed.ids)), held_out)
        curve = learning_curve(
            seed.nodes.take(rest),
            seed.score[rest],
            seed.nodes.take(held_out),
            seed.score[held_out],
            random_seed,
        )
    step(1, 1)
    storage.write_json(run.learning_curve_file, curve.as_dict() | {"judged_on": judged_on})


def _write_curve_of_part(config: Config, run: Run, random_seed: int) -> None:
    """Write the learning curve of the extrapolator to the samples of part 0."""
    from raypipe.assessment.learning_curve import learning_curve

    data = PartData(config, run, 0)
    held_out = data.held_out["seed"]
    curve = learning_curve(
        data.seed.nodes, data.seed.score, held_out.nodes, held_out.score, random_seed
    )
    storage.write_json(run.learning_curve_file, curve.as_dict() | {"judged_on": "cross-fit"})


def write_fidelity(config: Config, run: Run, samples: int, step: ProgressCallback) -> None:
    """Predict the audit set, and write figures and intervals.

    Figures are of the audit set where it is large enough, and always of the seed set. Intervals do
    not depend on audited extremes, so that all samples have intervals by the same rule.
    """
    from raypipe.assessment.fidelity import compare
    from raypipe.assessment.intervals import Intervals

    if config.proxy.cross_fits:
        _write_cross_fit_fidelity(config, run)
        step(1, 1)
        return
    settings, keep = config.extrapolate, sorted(set(config.select.keep))
    folds = [read_predictions(run, f"fold-{number}") for number in range(fold_count(config, run))]
    held_out = PredictedSamples.concat(folds)
    data = FitData(config, run, samples, settings.method in WHOLE_METHODS)
    audit = _audit_predictions(config, run, data)
    published = read_published(run)
    level = settings.confidence
    judged = {"seed": compare(held_out.with_published(published), settings.seed, keep, level)}
    calibration = held_out.predictions
    if has_rehearsal(run):
        # The proxy was trained on the held-out seed samples, and the folds are fitted without the
        # map that predictions use; so the rehearsal decides.
        calibration = read_predictions(run, "rehearsal").predictions
        judged["rehearsal"] = compare(calibration, settings.seed, keep, level)
    extremes = read_extremes(run)
    if audit is not None:
        judged["audit"] = compare(
            audit.with_published(published), settings.seed, keep, level, calibration, extremes
        )
    intervals = Intervals.fit(
        calibration.calibration(),
        settings.confidence,
        audit.predictions.calibration() if audit is not None else None,
    )
    figures = {
        which: fidelity.as_dict() | {"judged_on": which} for which, fidelity in judged.items()
    }
    step(1, 1)
    FidelityFile(
        measured=len(data.seed.ids) + (len(audit.ids) if audit is not None else 0),
        keep=tuple(keep),
        fidelity=figures[_deciding(judged)],
        fidelity_seed=figures["seed"],
        intervals=intervals.state(),
        search=search_of(run.model_file),
        stability=_stability(config, run),
        with_extremes=extremes is not None,
    ).write(run)


def _write_cross_fit_fidelity(config: Config, run: Run) -> None:
    """Write figures and intervals from the seed and audit samples, which no fit depends on."""
    from raypipe.assessment.fidelity import compare
    from raypipe.assessment.intervals import Intervals

    settings, keep = config.extrapolate, sorted(set(config.select.keep))
    seed = read_part_predictions(config, run, "seed")
    audit = read_part_predictions(config, run, "audit")
    assert seed is not None, "every part has seed samples"
    held_out = PredictedSamples.concat([seed, audit]) if audit is not None else seed
    predictions = held_out.predictions
    intervals = Intervals.fit(predictions.calibration(), settings.confidence)
    level, extremes = settings.confidence, read_extremes(run)
    judged = {
        "cross-fit": compare(predictions, settings.seed, keep, level, extremes=extremes),
        "seed": compare(seed.predictions, settings.seed, keep, level),
    }
    figures = {name: fidelity.as_dict() | {"judged_on": name} for name, fidelity in judged.items()}
    FidelityFile(
        measured=len(held_out.ids),
        keep=tuple(keep),
        fidelity=figures["cross-fit"],
        fidelity_seed=figures["seed"],
        intervals=intervals.state(),
        search=search_of(run.part_model_file(0)),
        stability=_stability(config, run),
        with_extremes=extremes is not None,
    ).write(run)


def _stability(config: Config, run: Run) -> dict[str, Any]:
    """Return how well the proxies agree, as `Stability.as_dict` does."""
    from raypipe.assessment.stability import stability

    label, by_proxy = scores_by_proxy(run, config.score)
    seed, within_classes = config.extrapolate.seed, config.select.cuts_within_classes
    return stability(by_proxy, label, seed, within_classes, config.proxy.parts).as_dict()


def _deciding(judged: dict[str, Fidelity]) -> str:
    """Return the samples whose figures count: the first that have a correlation."""
    for which in ("audit", "rehearsal"):
        if which in judged and judged[which].spearman is not None:
            return which
    return "seed"


def is_assessed(config: Config, run: Run) -> bool:
    """Return whether there are figures for every keep fraction, with all audited samples."""
    present = storage.names(run.extrapolator_folder)
    if "fidelity.json" not in present:
        return False
    if config.scores_embeddings:  # there is no agreement of tops to assess
        return True
    file = FidelityFile.read(run)
    audited = f"{EXTREMES}.parquet" in present
    return set(config.select.keep) <= set(file.keep) and audited == file.with_extremes


def _folds(config: Config, run: Run, seed: ScoredSamples) -> list[np.ndarray]:
    """Return the rows of the held-out parts of the seed set."""
    from raypipe.assessment.held_out import split

    settings = config.extrapolate
    return split(len(seed.ids), settings.holdout, fold_count(config, run), settings.seed)


def _audit_predictions(config: Config, run: Run, data: FitData) -> PredictedSamples | None:
    """Return the predictions of the audit set; None without one. They are computed once."""
    from raypipe.assessment.held_out import predict

    if "audit.parquet" in storage.names(run.extrapolator_folder):
        return read_predictions(run, "audit")
    audit = data.audit()
    if audit is None:
        return None
    model = load_extrapolator(config, run)
    if data.source is not None:
        model.attach_graph(data.source.nodes)
    predictions = predict(
        model, data.seed.nodes, data.seed.score, audit.nodes, audit.score, audit.rows
    )
    write_predictions(run, "audit", audit.ids, predictions)
    return PredictedSamples(audit.ids, predictions)
