"""What a run cost, in time and money, and what keeping a share of the samples saves of each training."""

from __future__ import annotations

import math
from typing import Any

from raypipe.config import ReportSettings
from raypipe.report.text import saved
from raypipe.runs.ledger import StageRecord

SECONDS = ("wall_seconds", "cpu_seconds", "gpu_seconds")
MEASURING = ("seed", "proxy", "measure")
"""Stages whose cost grows with the number of measured samples."""
HEADLINE = 0.5
"""The keep-list of the fraction nearest to this one leads."""


def cost_figures(
    ledger: dict[str, StageRecord],
    stages: tuple[str, ...],
    samples: int,
    measured: int,
    prices: ReportSettings,
) -> dict[str, Any]:
    """Seconds and dollars of the `stages` that have run, and what measuring every sample would have cost.

    Spent: CPU + GPU seconds of all stages up to the scores. Everything: the index, and the stages whose cost grows with the
    number of measured samples (seed, label, proxy, measure) divided by the share of the samples that was measured. Dollars are None
    without prices.
    """
    rows: list[dict[str, Any]] = []
    for stage, record in ((stage, ledger[stage]) for stage in stages if stage in ledger):
        figures = {key: getattr(record, key) for key in ("state", "samples", *SECONDS, "attempts")}
        rows.append(
            {
                "stage": stage,
                **figures,
                "dollars": _dollars(record.cpu_seconds, record.gpu_seconds, prices),
            }
        )
    totals = {key: sum(row[key] for row in rows) for key in SECONDS}
    totals["dollars"] = _dollars(totals["cpu_seconds"], totals["gpu_seconds"], prices)
    saving: dict[str, Any] = {
        "measured_share": None,
        "spent": None,
        "everything": None,
        "factor": None,
    }
    busy = {
        row["stage"]: row["cpu_seconds"] + row["gpu_seconds"]
        for row in rows
        if row["state"] == "done"
    }
    needed = ("index", *MEASURING, "embed", "extrapolate")
    if measured and all(stage in busy for stage in needed):
        share = measured / samples
        # pseudo-labels and a rehearsal are not in every run; what is measured everywhere needs no rehearsal
        labelling = busy.get("label", 0.0)
        spent = sum(busy[stage] for stage in needed) + labelling + busy.get("rehearse", 0.0)
        everything = busy["index"] + (sum(busy[stage] for stage in MEASURING) + labelling) / share
        saving = {
            "measured_share": share,
            "spent": spent,
            "everything": everything,
            "factor": everything / spent if spent else None,
        }
    return {
        "stages": rows,
        "total": totals,
        "prices": {"cpu": prices.cpu_price, "gpu": prices.gpu_price},
        "saving": saving,
    }


def _dollars(cpu_seconds: float, gpu_seconds: float, prices: ReportSettings) -> float | None:
    """None without a price; a kind of processor without one costs nothing."""
    if prices.cpu_price is None and prices.gpu_price is None:
        return None
    return (cpu_seconds * (prices.cpu_price or 0) + gpu_seconds * (prices.gpu_price or 0)) / 3600


def headline(
    keep: list[dict[str, Any]],
    samples: int,
    proxy: StageRecord | None,
    epochs: int,
    cost: dict[str, Any],
    evaluation: Any,
) -> dict[str, Any] | None:
    """What the keep-list nearest to a half saves of a training; None without one.

    saved_share       of the samples of an epoch, and so about of the cost of a training of as many epochs
    training_seconds  CPU + GPU seconds that the proxy's training would take on all samples, by what it took on the seed set
    trainings         so many trainings like that until the savings exceed what the scores cost
    trained           what the evaluation found of such a list, where there is one: accuracy of it, of random ones, of everything
    """
    if not keep or not samples:
        return None
    chosen = min(keep, key=lambda item: abs(item["fraction"] - HEADLINE))
    share = 1 - chosen["samples"] / samples
    known = proxy is not None and proxy.state == "done" and proxy.samples
    training = (
        (proxy.cpu_seconds + proxy.gpu_seconds) * samples / proxy.samples
        if proxy is not None and known
        else None
    )
    gain, spent = (training * share if training else None), cost["saving"]["spent"]
    found = {
        key: chosen[key] for key in ("fraction", "file", "strategy", "by_class", "samples")
    } | {
        "of": samples,
        "least_kept": chosen.get("least_kept"),
        "most_kept": chosen.get("most_kept"),
        "saved_share": share,
        "epochs": epochs,
        "training_seconds": training,
        "saved_seconds": gain,
        "scores_seconds": spent,
        "trainings": max(1, math.ceil(spent / gain)) if spent and gain else None,
        "trained": _trained(chosen, evaluation),
    }
    return {**found, "sentences": saved(found)}


def _trained(chosen: dict[str, Any], evaluation: Any) -> dict[str, Any] | None:
    """Accuracies of the evaluation at this list's fraction, of the list cut by the same strategy from the scores of now."""
    if not evaluation or evaluation["outdated"]:
        return None
    for listed in evaluation["lists"]:
        cut_by = listed.get("strategy"), listed.get("by_class", False)
        if listed.get("origin") != "run" or cut_by != (chosen["strategy"], chosen["by_class"]):
            continue
        for random, found in zip(evaluation["random"], listed["fractions"], strict=False):
            if math.isclose(found["fraction"], chosen["fraction"]):
                figures = {"list": found, "random": random, "everything": evaluation["full"]}
                accuracies = {name: item["accuracy"] for name, item in figures.items()}
                return {"model": evaluation["training"]["model"], **accuracies}
    return None
