"""Every figure of the report, from the files of a run."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raypipe import storage
from raypipe._version import __version__
from raypipe.errors import RaypipeError, RunError
from raypipe.report import words
from raypipe.report.embeddings import EmbeddingMap, scan_embeddings
from raypipe.report.evaluation import evaluation_of
from raypipe.report.scores import QUANTILES, READ_AHEAD, Pick, ScoreScan, scan_scores, shown_classes
from raypipe.rundir import NOT_IN_EVERY_RUN, STAGE_FOLDERS, Run, StageRecord, now

FORMAT = 1
"""Version of `summary.json`."""
REASONS, DISTINCT = 20, 10_000
"""Reject reasons that are listed, and that are told apart at all."""
BEFORE_REPORT = tuple(itertools.takewhile(lambda stage: stage != "report", STAGE_FOLDERS))
SECONDS = ("wall_seconds", "cpu_seconds", "gpu_seconds")
ENDED = ("done", "refused")
"""States of a stage that nothing is left to do for; refused: the scores are too unfaithful for keep-lists."""
MEASURING = ("seed", "proxy", "measure")
"""Stages whose cost grows with the number of measured samples."""


@dataclasses.dataclass
class Findings:
    """`summary` is JSON; grids and map are what the page draws beyond it."""

    summary: dict[str, Any]
    grids: dict[str, list[Pick]]
    map: EmbeddingMap | None


def summarize(run: Run) -> dict[str, Any]:
    """All figures of the report as JSON; one that the run does not have is None. Raises RunError without a run."""
    return collect(run).summary


def collect(run: Run) -> Findings:
    """What the page shows, in memory that does not grow with the number of samples. Raises RunError without a run."""
    ledger, config = run.ledger(), run.config()
    names = _class_names(run)
    scan = scan_scores(run, len(names), config.report.images)
    embedded = scan_embeddings(run, scan.edge, config.report.images)
    keep = _keep_lists(run, len(names))
    rejects = _rejects(run)
    judged = _judged(run, scan)
    grids = {**scan.picks, "suspects": embedded.suspects}
    indexed = ledger["index"].samples if "index" in ledger else 0
    summary = {
        "format": FORMAT,
        "raypipe": __version__,
        "made": now(),
        "run": run.uri,
        "unfinished": [stage for stage in BEFORE_REPORT if not _ended(ledger, stage)],
        "refused": ledger["select"].error if "select" in ledger and ledger["select"].state == "refused" else None,
        "source": {
            "uri": config.source.uri,
            "format": config.source.format,
            "classes": len(names),
            "pseudo_labels": words.pseudo_labels(config.pseudo_labels.model_dump()) or None,
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
        **judged,
        "scores": _score_figures(scan),
        "keep": keep,
        "classes": _class_figures(names, scan, keep),
        "shown_classes": _shown(names, scan),
        "cost": _cost(ledger, scan),
        "evaluation": evaluation_of(run, ledger.get("extrapolate")),
        "embeddings": {
            "shards_read": embedded.shards_read,
            "shards": embedded.shards_there,
            "mapped": len(embedded.map.score) if embedded.map else 0,
            "explained": embedded.map.explained if embedded.map else None,
        },
        "grids": {name: [_pick(pick, names) for pick in picks] for name, picks in grids.items()},
        "rejects": rejects,
        "settings": config.model_dump(mode="json"),
    }
    return Findings(clean(summary), grids, embedded.map)


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


def _shown(names: list[str], scan: ScoreScan) -> list[dict[str, Any]]:
    """The classes that the page shows one by one, the lowest mean score first."""
    means = {label: mean for label in scan.class_quantiles if (mean := scan.mean_of(label)) is not None}
    return [
        {
            "label": label if label < scan.classes else None,
            "name": _name(names, scan, label),
            **{f"q{round(100 * q)}": value for q, value in zip(QUANTILES, scan.class_quantiles[label], strict=True)},
        }
        for label in shown_classes(means)
    ]


def _class_figures(names: list[str], scan: ScoreScan, keep: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry a class (and one for the unlabelled, where there are any): samples before, kept by each keep-list.

    Takes `per_class` out of the keep-lists and puts their least and most kept class, and how many are emptied, there.
    """
    kept = {item["file"]: item.pop("per_class") for item in keep}
    there = np.flatnonzero(scan.class_samples)
    for item in keep:
        share = kept[item["file"]][there] / scan.class_samples[there]
        item["emptied_classes"] = int((share == 0).sum())
        for key, row in (("least_kept", share.argmin), ("most_kept", share.argmax)) if len(there) else ():
            item[key] = {"name": _name(names, scan, int(there[row()])), "share": float(share[row()])}
    return [
        {
            "label": label if label < scan.classes else None,
            "name": _name(names, scan, label),
            "samples": int(scan.class_samples[label]),
            "measured": int(scan.class_measured[label]),
            "mean_score": scan.mean_of(label),
            "kept": {file: int(counts[label]) for file, counts in kept.items()},
        }
        for label in range(scan.classes + 1)
        if label < scan.classes or scan.class_samples[label]
    ]


def _name(names: list[str], scan: ScoreScan, label: int) -> str:
    return words.label_name(names, label if label < scan.classes else None)


def _keep_lists(run: Run, classes: int) -> list[dict[str, Any]]:
    """What each keep-list holds, by rising keep fraction; `per_class` [C + 1] is taken out again by `_class_figures`."""
    result = []
    for file in storage.names(run.path("keep")):
        if not file.endswith(".parquet"):
            continue
        per_class, least, count = np.zeros(classes + 1, np.int64), math.inf, 0
        try:
            with storage.open_read(run.path("keep", file)) as handle:
                parquet = pq.ParquetFile(handle)
                about = {key.decode(): value.decode() for key, value in (parquet.schema_arrow.metadata or {}).items()}
                for batch in parquet.iter_batches(columns=["label", "score"]):
                    label = batch["label"].fill_null(-1).to_numpy().astype(np.int64)
                    per_class += np.bincount(np.where((label < 0) | (label >= classes), classes, label), minlength=classes + 1)
                    count += len(label)
                    least = min(least, float(np.min(batch["score"].to_numpy(zero_copy_only=False), initial=math.inf)))
        except pa.ArrowException as error:
            raise RunError(f"{run.path('keep', file)}: not a readable keep-list ({error}); delete it and select again") from None
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
                "forced": about.get("raypipe.forced") == "true",
                "samples": count,
                "lowest_score": least,
            }
            | {"per_class": per_class}
        )
    return sorted(result, key=lambda item: item["fraction"])


def _ended(ledger: dict[str, StageRecord], stage: str) -> bool:
    return ledger[stage].state in ENDED if stage in ledger else stage in NOT_IN_EVERY_RUN


def _judged(run: Run, scan: ScoreScan) -> dict[str, Any]:
    """`fidelity`, the one to go by, with a verdict in words; `fidelity_seed`, of seed samples held out; `learning_curve`;
    `neighbour_search`: exact or by inverted lists, with its recall."""
    try:
        found = storage.read_json(run.path("extrapolator", "extrapolator.json"))
    except (FileNotFoundError, RaypipeError):
        found = {}
    found = clean(found) if isinstance(found, dict) else {}
    fidelity = {**_fidelity(found.get("fidelity")), "method": found.get("method"), "score": found.get("score")}
    fidelity["verdict"], fidelity["sentence"] = words.judge(fidelity, scan.samples - scan.measured if scan.samples else None)
    curve, search = found.get("learning_curve"), found.get("search")
    return {
        "fidelity": fidelity,
        "fidelity_seed": _fidelity(found["fidelity_seed"]) if found.get("fidelity_seed") else None,
        "learning_curve": {**curve, "sentence": words.gain(curve)} if isinstance(curve, dict) and curve.get("points") else None,
        "neighbour_search": search if isinstance(search, dict) else None,
    }


def _fidelity(stated: Any) -> dict[str, Any]:
    """Fidelity as it was measured: the figures of the extrapolator, and of every baseline."""
    stated = stated if isinstance(stated, dict) else {}
    result = _figures(stated) | {key: stated.get(key) for key in ("n_fit", "n_held", "note", "judged_on")}
    # a baseline is its Spearman correlation, or all figures by name
    baselines = (stated.get("baselines") or {}).items()
    result["baselines"] = {name: _figures(value if isinstance(value, dict) else {"spearman": value}) for name, value in baselines}
    return result


def _figures(stated: dict[str, Any]) -> dict[str, Any]:
    """Correlations and overlaps with their intervals; None, or nothing, where one is not there."""
    result: dict[str, Any] = {}
    for name in ("spearman", "pearson"):
        low, high = stated.get(f"{name}_interval") or (stated.get(f"{name}_low"), stated.get(f"{name}_high"))
        result |= {name: stated.get(name), f"{name}_low": low, f"{name}_high": high}
    result["overlap"] = {key: value for key, value in (stated.get("overlap") or {}).items() if value is not None}
    result["overlap_interval"] = stated.get("overlap_interval") or {}
    return result


def _rejects(run: Run) -> dict[str, Any]:
    """Rejected samples by reason, and the files that could not be read at all (one row of `rejects/` each, but no sample)."""
    unreadable = {fragment.fragment_id: fragment for fragment in run.fragments() if fragment.error}
    reasons: Counter[str] = Counter()
    examples: dict[str, str] = {}
    columns = ["sample_id", "fragment", "reason"]
    for _, table in storage.iter_tables(run.path("rejects"), columns, threads=READ_AHEAD):
        for sample_id, fragment, reason in zip(*(table[name].to_pylist() for name in columns), strict=True):
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
        "reasons": [{"reason": reason, "samples": number, "example": examples[reason]} for reason, number in ordered[:REASONS]],
        "distinct_reasons": len(reasons),
        "files": len(files),
        "unreadable_files": [{"path": fragment.path, "reason": fragment.error} for fragment in files[:REASONS]],
    }


def _cost(ledger: dict[str, StageRecord], scan: ScoreScan) -> dict[str, Any]:
    """Seconds of every stage, and what measuring every sample would have cost.

    Spent: CPU + GPU seconds of all stages up to the scores. Everything: the index, and the stages whose cost grows with the
    number of measured samples (seed, label, proxy, measure) divided by the share of the samples that was measured.
    """
    rows = []
    for stage, record in ((stage, ledger[stage]) for stage in BEFORE_REPORT if stage in ledger):
        figures = {
            key: getattr(record, key) for key in ("state", "samples", "wall_seconds", "cpu_seconds", "gpu_seconds", "attempts")
        }
        rows.append({"stage": stage, **figures})
    totals = {key: sum(row[key] for row in rows) for key in SECONDS}
    saving: dict[str, Any] = {"measured_share": None, "spent": None, "everything": None, "factor": None}
    busy = {row["stage"]: row["cpu_seconds"] + row["gpu_seconds"] for row in rows if row["state"] == "done"}
    needed = ("index", *MEASURING, "embed", "extrapolate")
    if scan.measured and all(stage in busy for stage in needed):
        share = scan.measured / scan.samples
        labelling = busy.get("label", 0.0)
        spent = sum(busy[stage] for stage in needed) + labelling
        everything = busy["index"] + (sum(busy[stage] for stage in MEASURING) + labelling) / share
        saving = {
            "measured_share": share,
            "spent": spent,
            "everything": everything,
            "factor": everything / spent if spent else None,
        }
    return {"stages": rows, "total": totals, "saving": saving}


def _pick(pick: Pick, names: list[str]) -> dict[str, Any]:
    result = dataclasses.asdict(pick)
    result["label_name"] = words.label_name(names, pick.label)
    if pick.prediction is not None:
        result["prediction_name"] = words.label_name(names, pick.prediction)
    return result
