"""Every figure of the report, from the files of a run."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from typing import Any

import numpy as np

from raypipe import storage
from raypipe._version import __version__
from raypipe.config.choices import DIFFICULTIES
from raypipe.errors import RaypipeError
from raypipe.report import text
from raypipe.report.classes import pick_of_classes
from raypipe.report.cost import cost_figures, headline
from raypipe.report.embeddings import EmbeddingMap, scan_embeddings
from raypipe.report.evaluation import evaluation_of
from raypipe.report.keep_lists import (
    class_figures,
    even_classes,
    held,
    keep_lists,
    name_of,
    quantiles_of,
)
from raypipe.report.label_noise import noise_figures
from raypipe.report.score_scan import (
    END_CLASSES,
    MOST_CLASSES,
    Pick,
    ScoreScan,
    ends,
    scan_scores,
    shown_classes,
)
from raypipe.runs.layout import OPTIONAL_STAGES, STAGE_FOLDERS, Run
from raypipe.runs.ledger import StageRecord, noise_of, now

FORMAT = 1
"""Version of `summary.json`."""
REASONS, DISTINCT = 20, 10_000
"""Reject reasons that are listed, and that are told apart at all."""
BEFORE_REPORT = tuple(itertools.takewhile(lambda stage: stage != "report", STAGE_FOLDERS))
ENDED = ("done", "refused")
"""States of a stage that nothing is left to do for; refused: the scores are too unfaithful for keep-lists."""


@dataclasses.dataclass
class Findings:
    """`summary` is JSON; grids and map are what the page draws beyond it.

    grids        samples by the name of their grid
    class_grids  lowest and highest samples of each class in `summary["class_grids"]`, in that order
    """

    summary: dict[str, Any]
    grids: dict[str, list[Pick]]
    class_grids: list[dict[str, list[Pick]]]
    map: EmbeddingMap | None


def summarize(run: Run) -> dict[str, Any]:
    """All figures of the report as JSON; one that the run does not have is None. Raises RunError without a run."""
    return collect(run).summary


def collect(run: Run) -> Findings:
    """What the page shows, in memory that does not grow with the number of samples. Raises RunError without a run."""
    ledger, config = run.ledger(), run.config()
    names = _class_names(run)
    scan = scan_scores(run, len(names), config.report.images)
    noise = noise_of(ledger)
    judged = _judged(run, scan)
    hard = str(judged["fidelity"]["score"]) in DIFFICULTIES
    embedded = scan_embeddings(run, scan.edges[hard], config.report.images, noise, above=hard)
    keep = keep_lists(run, len(names))
    rejects = _rejects(run)
    grids = {**scan.picks, "suspects": embedded.suspects}
    labels = shown_classes(scan, config.report.classes)
    of_classes = pick_of_classes(
        run, scan, labels, config.report.class_images if config.report.images else 0
    )
    class_grids = [
        {"lowest": of_classes.lowest[label], "highest": of_classes.highest[label]}
        for label in labels
        if label in of_classes.lowest
    ]
    classes = class_figures(names, scan, keep)
    cost = cost_figures(ledger, BEFORE_REPORT, scan.samples, scan.measured, config.report)
    evaluation = evaluation_of(run, ledger.get("extrapolate"))
    leading = headline(
        keep, scan.samples, ledger.get("proxy"), config.proxy.epochs, cost, evaluation
    )
    drawn = embedded.map
    if drawn is not None and leading is not None:
        drawn = dataclasses.replace(drawn, kept=held(run, leading["file"], drawn.sample_id))
    indexed = ledger["index"].samples if "index" in ledger else 0
    summary = {
        "format": FORMAT,
        "raypipe": __version__,
        "made": now(),
        "run": run.uri,
        "unfinished": [stage for stage in BEFORE_REPORT if not _ended(ledger, stage)],
        "refused": ledger["select"].error
        if "select" in ledger and ledger["select"].state == "refused"
        else None,
        "source": {
            "uri": text.without_secrets(config.source.uri),
            "format": config.source.format,
            "classes": len(names),
            "pseudo_labels": text.pseudo_labels(config.pseudo_labels.model_dump()) or None,
            **_index_figures(ledger),
        },
        "counts": {
            "indexed": indexed or None,
            "samples": scan.samples,
            "measured": scan.measured,
            "extrapolated": scan.samples - scan.measured,
            "unlabelled": int(scan.class_samples[-1]),
            "not_finite": scan.not_finite,
            "rejects": rejects["samples"],
            "unreadable_files": rejects["files"],
            "accounted": scan.samples + rejects["samples"] == indexed if indexed else None,
        },
        "headline": leading,
        **judged,
        "label_noise": noise_figures(run, noise, embedded.noise, [item["file"] for item in keep])
        if noise and embedded.noise
        else None,
        "scores": _score_figures(scan),
        "keep": keep,
        "even_classes": even_classes(scan.class_samples),
        "classes": classes,
        "shown_classes": [
            _class(names, scan, label) | quantiles_of(scan, label) for label in _listed(scan)
        ],
        "class_histograms": [
            _class(names, scan, label) | scan.class_histogram(label) for label in labels
        ],
        "cost": cost,
        "evaluation": evaluation,
        "embeddings": {
            "shards_read": embedded.shards_read,
            "shards": embedded.shards_there,
            "suspects": embedded.found,
            "proxy_agrees": embedded.agreed,
            "mapped": len(drawn.score) if drawn else 0,
            "explained": drawn.explained if drawn else None,
            "kept": int(drawn.kept.sum()) if drawn and drawn.kept is not None else None,
        },
        "grids": {name: [_pick(pick, names) for pick in picks] for name, picks in grids.items()},
        "class_grids": [
            _class(names, scan, label)
            | {end: [_pick(pick, names) for pick in picks] for end, picks in grid.items()}
            for label, grid in zip(labels, class_grids, strict=False)
        ],
        "class_fragments": {"read": of_classes.fragments_read, "there": of_classes.fragments_there},
        "rejects": rejects,
        "settings": _without_secrets(config.model_dump(mode="json")),
    }
    return Findings(clean(summary), grids, class_grids, drawn)


def clean(value: Any) -> Any:
    """Fit for JSON: numbers that are not finite become None, tuples lists, NumPy scalars Python's."""
    if isinstance(value, dict):
        return {str(key): clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _without_secrets(value: Any) -> Any:
    """Settings as they are shown: the page is passed on, and addresses can hold passwords and keys."""
    if isinstance(value, dict):
        return {key: _without_secrets(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_secrets(item) for item in value]
    return text.without_secrets(value) if isinstance(value, str) else value


def _class_names(run: Run) -> list[str]:
    try:
        return list(run.classes().names)
    except (FileNotFoundError, KeyError, TypeError):
        return []


def _index_figures(ledger: dict[str, StageRecord]) -> dict[str, Any]:
    detail = ledger["index"].detail if "index" in ledger else {}
    return {key: detail.get(key) for key in ("files", "fragments", "bytes")}


def _score_figures(scan: ScoreScan) -> dict[str, Any]:
    finite = scan.samples - scan.not_finite
    return {
        "low": scan.low,
        "high": scan.high,
        "mean": scan.total / finite if finite else None,
        "histogram": scan.histogram or None,
    }


def _listed(scan: ScoreScan) -> list[int]:
    """The classes that the page lists one by one, the lowest median first."""
    order = scan.by_median()
    return order if len(order) <= MOST_CLASSES else ends(order, 2 * END_CLASSES)


def _class(names: list[str], scan: ScoreScan, label: int) -> dict[str, Any]:
    return {
        "label": label if label < scan.classes else None,
        "name": name_of(names, scan, label),
        "samples": int(scan.class_samples[label]),
    }


def _ended(ledger: dict[str, StageRecord], stage: str) -> bool:
    return ledger[stage].state in ENDED if stage in ledger else stage in OPTIONAL_STAGES


def _judged(run: Run, scan: ScoreScan) -> dict[str, Any]:
    """`fidelity`, the one to go by, with a verdict in words; `fidelity_seed`, of seed samples held out; `learning_curve`;
    `neighbour_search`: exact or by inverted lists, with its recall."""
    try:
        found = storage.read_json(run.path("extrapolator", "extrapolator.json"))
    except (FileNotFoundError, RaypipeError):
        found = {}
    found = clean(found) if isinstance(found, dict) else {}
    fidelity = {
        **_fidelity(found.get("fidelity")),
        "method": found.get("method"),
        "score": found.get("score"),
    }
    fidelity["verdict"], fidelity["sentence"] = text.verdict(
        fidelity, scan.samples - scan.measured if scan.samples else None
    )
    curve, search = found.get("learning_curve"), found.get("search")
    return {
        "fidelity": fidelity,
        "fidelity_seed": _fidelity(found["fidelity_seed"]) if found.get("fidelity_seed") else None,
        "learning_curve": {**curve, "sentence": text.gain(curve)}
        if isinstance(curve, dict) and curve.get("points")
        else None,
        "neighbour_search": search if isinstance(search, dict) else None,
    }


def _fidelity(stated: Any) -> dict[str, Any]:
    """Fidelity as it was measured: the figures of the extrapolator, and of every baseline."""
    stated = stated if isinstance(stated, dict) else {}
    result = _figures(stated) | {
        key: stated.get(key) for key in ("n_fit", "n_held", "note", "judged_on")
    }
    # a baseline is its Spearman correlation, or all figures by name
    baselines = (stated.get("baselines") or {}).items()
    result["baselines"] = {
        name: _figures(value if isinstance(value, dict) else {"spearman": value})
        for name, value in baselines
    }
    return result


def _figures(stated: dict[str, Any]) -> dict[str, Any]:
    """Correlations and overlaps with their intervals; None, or nothing, where one is not there."""
    result: dict[str, Any] = {}
    for name in ("spearman", "pearson"):
        low, high = stated.get(f"{name}_interval") or (
            stated.get(f"{name}_low"),
            stated.get(f"{name}_high"),
        )
        result |= {name: stated.get(name), f"{name}_low": low, f"{name}_high": high}
    result["overlap"] = {
        key: value for key, value in (stated.get("overlap") or {}).items() if value is not None
    }
    result["overlap_interval"] = stated.get("overlap_interval") or {}
    return result


def _rejects(run: Run) -> dict[str, Any]:
    """Rejected samples by reason, and the files that could not be read at all (one row of `rejects/` each, but no sample)."""
    unreadable = {fragment.fragment_id: fragment for fragment in run.fragments() if fragment.error}
    reasons: Counter[str] = Counter()
    examples: dict[str, str] = {}
    columns = ["sample_id", "fragment", "reason"]
    for _, table in storage.iter_tables(run.path("rejects"), columns, threads=storage.READERS):
        for sample_id, fragment, reason in zip(
            *(table[name].to_pylist() for name in columns), strict=True
        ):
            if fragment in unreadable:
                continue
            reason = reason or "no reason given"
            if reason not in reasons and len(reasons) >= DISTINCT:
                reason = "other reasons"
            reasons[reason] += 1
            examples.setdefault(reason, sample_id)
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    files = sorted(unreadable.values(), key=lambda fragment: fragment.path)
    return {
        "samples": reasons.total(),
        "reasons": [
            {"reason": reason, "samples": number, "example": examples[reason]}
            for reason, number in ordered[:REASONS]
        ],
        "distinct_reasons": len(reasons),
        "files": len(files),
        "unreadable_files": [
            {"path": fragment.path, "reason": fragment.error} for fragment in files[:REASONS]
        ],
    }


def _pick(pick: Pick, names: list[str]) -> dict[str, Any]:
    result = dataclasses.asdict(pick)
    result["label_name"] = text.label_name(names, pick.label)
    if pick.prediction is not None:
        result["prediction_name"] = text.label_name(names, pick.prediction)
    return result
