"""What a run cost in time and money, and what the leading keep-list saves of each training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from raypipe.config import ReportSettings
from raypipe.report.savings import savings_sentences
from raypipe.report.schema import (
    Cost,
    Evaluation,
    Expected,
    Headline,
    HeadlineFigures,
    KeepListFigures,
    PilotSection,
    Saving,
    StageCost,
    TotalCost,
    Trained,
)
from raypipe.runs.ledger import StageRecord

MEASURING = ("seed", "proxy", "measure")
"""Stages whose cost grows with the number of measured samples."""
SCORING = ("index", *MEASURING, "embed", "extrapolate")
"""Stages that every run needs for its scores."""
HEADLINE = 0.5
"""The keep-list whose fraction is nearest to this one leads the page."""


def cost_figures(
    ledger: Mapping[str, StageRecord],
    stages: Sequence[str],
    samples: int,
    measured: int,
    prices: ReportSettings,
) -> Cost:
    """Return what the stages took, and what measuring every sample would have taken.

    Parameters
    ----------
    ledger
        Records of the stages that have run.
    stages
        The stages that are counted.
    samples, measured
        All scored samples, and those that were measured.
    prices
        Dollars an hour of a CPU and of a GPU; without any, dollars are None.
    """
    rows = [
        _stage_cost(stage, record, prices)
        for stage, record in ((stage, ledger[stage]) for stage in stages if stage in ledger)
    ]
    return {
        "stages": rows,
        "total": _total(rows, prices),
        "prices": {"cpu": prices.cpu_price, "gpu": prices.gpu_price},
        "saving": _saving(ledger, samples, measured),
    }


def _stage_cost(stage: str, record: StageRecord, prices: ReportSettings) -> StageCost:
    return {
        "stage": stage,
        "state": record.state,
        "samples": record.samples,
        "wall_seconds": record.wall_seconds,
        "cpu_seconds": record.cpu_seconds,
        "gpu_seconds": record.gpu_seconds,
        "attempts": record.attempts,
        "dollars": _dollars(record.cpu_seconds, record.gpu_seconds, prices),
    }


def _total(rows: Sequence[StageCost], prices: ReportSettings) -> TotalCost:
    cpu = sum(row["cpu_seconds"] for row in rows)
    gpu = sum(row["gpu_seconds"] for row in rows)
    return {
        "wall_seconds": sum(row["wall_seconds"] for row in rows),
        "cpu_seconds": cpu,
        "gpu_seconds": gpu,
        "dollars": _dollars(cpu, gpu, prices),
    }


def _saving(ledger: Mapping[str, StageRecord], samples: int, measured: int) -> Saving:
    """Compare the scores' cost with measuring every sample.

    `spent`: CPU + GPU seconds of all stages up to the scores, and of the pilot. `everything`:
    those of the index, plus those of the stages whose cost grows with the number of measured
    samples (seed, label, proxy, measure), scaled from the samples that each of them processed to
    all: the proxy trains on the seed set alone, while audit samples are drawn and measured as well.
    """
    done = {stage: record for stage, record in ledger.items() if record.state == "done"}
    busy = {stage: record.cpu_seconds + record.gpu_seconds for stage, record in done.items()}
    processed = {stage: record.samples for stage, record in done.items()}
    if "seed" in done:
        processed["seed"] += done["seed"].detail.get("audit_samples", 0)
    # not every run has pseudo-labels or a rehearsal; measuring everything would need no rehearsal
    growing = (*MEASURING, *(["label"] if "label" in done else []))
    if (
        not samples
        or not measured
        or any(stage not in done for stage in SCORING)
        or not all(processed[stage] for stage in growing)
    ):
        return {"measured_share": None, "spent": None, "everything": None, "factor": None}
    optional = busy.get("rehearse", 0.0) + busy.get("pilot", 0.0)
    spent = sum(busy[stage] for stage in {*SCORING, *growing}) + optional
    everything = busy["index"] + sum(busy[stage] * samples / processed[stage] for stage in growing)
    return {
        "measured_share": measured / samples,
        "spent": spent,
        "everything": everything,
        "factor": everything / spent if spent else None,
    }


def _dollars(cpu_seconds: float, gpu_seconds: float, prices: ReportSettings) -> float | None:
    """Return None without any price; a kind of processor without a price costs nothing."""
    if prices.cpu_price is None and prices.gpu_price is None:
        return None
    return (cpu_seconds * (prices.cpu_price or 0) + gpu_seconds * (prices.gpu_price or 0)) / 3600


def headline(
    keep: Sequence[KeepListFigures],
    samples: int,
    proxy: StageRecord | None,
    epochs: int,
    scores_seconds: float | None,
    evaluation: Evaluation | None,
    pilot: PilotSection | None = None,
) -> Headline | None:
    """Return what the keep-list nearest to a half saves of a training; None without one.

    Parameters
    ----------
    keep
        The keep-lists.
    samples
        All scored samples.
    proxy, epochs
        Record of the stage `proxy`, and the epochs that it trained.
    scores_seconds
        CPU + GPU seconds of the scores; None if that is not known.
    evaluation, pilot
        An evaluation and the pilot of the run; None without one.

    Returns
    -------
    Headline
        `saved_share`: of the samples of an epoch, and so about of the cost of a training of equally
        many epochs. `training_seconds`: CPU + GPU seconds of the proxy's training, scaled from the
        seed set to all samples. `trainings`: how many such trainings it takes until the savings
        exceed the cost of the scores. `trained`: the evaluation's accuracies on this list, on
        random lists and on everything. `expected`: what the pilot predicts.
    """
    if not keep or not samples:
        return None
    leading = min(keep, key=lambda item: abs(item["fraction"] - HEADLINE))
    share = 1 - leading["samples"] / samples
    training = _training_seconds(proxy, samples)
    saved = training * share if training else None
    figures: HeadlineFigures = {
        "fraction": leading["fraction"],
        "file": leading["file"],
        "strategy": leading["strategy"],
        "by_class": leading["by_class"],
        "samples": leading["samples"],
        "of": samples,
        "least_kept": leading.get("least_kept"),
        "most_kept": leading.get("most_kept"),
        "saved_share": share,
        "epochs": epochs,
        "training_seconds": training,
        "saved_seconds": saved,
        "scores_seconds": scores_seconds,
        "trainings": (
            max(1, math.ceil(scores_seconds / saved)) if scores_seconds and saved else None
        ),
        "trained": _trained(leading, evaluation),
        "expected": _expected(leading, pilot),
        "reason": leading["reason"],
        "candidate": leading["candidate"],
    }
    return {**figures, "sentences": savings_sentences(figures)}


def trained_epochs(proxy: StageRecord | None, otherwise: int) -> int:
    """Return the epochs that the proxy was trained for: `proxy.epochs: auto` decides late."""
    epochs = proxy.detail.get("epochs") if proxy is not None else None
    return epochs if isinstance(epochs, int) else otherwise


def _training_seconds(proxy: StageRecord | None, samples: int) -> float | None:
    """Return the seconds of a training like the proxy's on all samples."""
    if proxy is None or proxy.state != "done" or not proxy.samples:
        return None
    return (proxy.cpu_seconds + proxy.gpu_seconds) * samples / proxy.samples


def _trained(leading: KeepListFigures, evaluation: Evaluation | None) -> Trained | None:
    """Return accuracies at the list's fraction.

    Only a list counts that the same strategy cut from the current scores of this run.
    """
    if not evaluation or evaluation["outdated"]:
        return None
    for listed in evaluation["lists"]:
        cut_by = listed.get("strategy"), listed.get("by_class", False)
        if listed.get("origin") != "run" or cut_by != (leading["strategy"], leading["by_class"]):
            continue
        for random, point in zip(evaluation["random"], listed["fractions"], strict=False):
            if math.isclose(point["fraction"], leading["fraction"]):
                return _accuracies(evaluation, point, random)
    return None


def _expected(leading: KeepListFigures, pilot: PilotSection | None) -> Expected | None:
    """Return what the pilot predicts at the list's fraction."""
    for listed in pilot["lists"] if pilot else ():
        if math.isclose(listed["fraction"], leading["fraction"]):
            return listed["expected"]
    return None


def _accuracies(
    evaluation: Evaluation, point: Mapping[str, Any], random: Mapping[str, Any]
) -> Trained:
    return {
        "model": evaluation["training"]["model"],
        "list": point["accuracy"],
        "random": random["accuracy"],
        "everything": evaluation["full"]["accuracy"],
    }
