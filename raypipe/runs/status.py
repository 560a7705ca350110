"""Text for the terminal about a run: its state, and its result. Without Ray and torch.

For text about a source, see `raypipe.estimate`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from raypipe import storage
from raypipe.progress import describe_progress
from raypipe.runs.keep_files import choice_lines
from raypipe.runs.layout import OPTIONAL_STAGES, STAGE_FOLDERS
from raypipe.runs.ledger import StageRecord, extrapolated_tables, injected_noise
from raypipe.runs.run import Run
from raypipe.text import (
    JUDGED_ON,
    HeadlineFidelity,
    duration,
    proxy_accuracy,
    stability_for_cut,
    weak_proxy,
)


def describe_run(uri: str) -> Iterator[str]:
    """Return lines about the state of a run."""
    run = Run(uri)
    records = run.ledger()
    yield f"run         {run.uri}"
    yield from _warning(records)
    has_one_stage = bool(extrapolated_tables(records))
    for stage in STAGE_FOLDERS:
        record = records.get(stage)
        if record is not None:
            yield _stage_line(run, stage, record)
        elif not has_one_stage and stage not in OPTIONAL_STAGES:
            yield f"{stage:<11} not started"
    holder = _driver(run)
    if holder:
        yield (
            f"driver      process {holder.get('pid')} on {holder.get('host')}, "
            f"lease renewed {holder.get('date')}"
        )
        progress = holder.get("progress")
        if isinstance(progress, dict) and progress.get("stage"):
            yield f"now         {str(progress.get('stage'))[:20]} {describe_progress(progress)}"
    rejects = records["embed"].detail.get("rejects", 0) if "embed" in records else 0
    if rejects:
        yield f"rejects     {rejects:,}"
    cpu, gpu = (_spent(records, name, holder) for name in ("cpu_seconds", "gpu_seconds"))
    attempts = sum(record.attempts for record in records.values())
    gpu_time = f", {duration(gpu)} GPU" if gpu else ""
    yield (
        f"spent       {duration(cpu)} CPU{gpu_time}, "
        f"in {attempts} attempts at {len(records)} stages"
    )


def _stage_line(run: Run, stage: str, record: StageRecord) -> str:
    text = f"{stage:<11} {record.state:<8} {record.samples:>12,} samples {_seconds(record)}"
    if record.state != "done":
        text += _files_done(run, stage)
    if record.error:
        text += f"  {record.error}"
    return text


def _spent(records: dict[str, StageRecord], name: str, holder: dict[str, Any]) -> float:
    """Return seconds of all stages, from the ledger or, if it reports more, from the driver."""
    progress = holder.get("progress")
    reported = progress.get(name) if isinstance(progress, dict) else None
    return max(
        sum(getattr(record, name) for record in records.values()),
        reported if isinstance(reported, float) and reported < 1e12 else 0.0,
    )


def describe_result(run: Run) -> Iterator[str]:
    """Return lines for the end of a run: paths of the results, fidelity, time of each stage."""
    records = run.ledger()
    yield ""
    yield from _warning(records)
    if "extrapolate" in records:
        record = records["extrapolate"]
        yield _scores_line(run.scores_folder, record.samples, record.detail.get("measured", 0))
    if "select" in records:
        for file in sorted(storage.names(run.keep_folder)):
            yield f"keep-list   {run.keep_list(file)}"
        for line in choice_lines(records["select"].detail.get("chosen", {})):
            yield f"chosen      {line}"
    if "report" in records:
        yield f"report      {run.report_page}"
    if "label" in records:
        clusters = records["label"].detail.get("clusters")
        yield f"labels      pseudo-labels from {clusters} clusters; no true labels were used"
    if "extrapolate" in records:
        detail = records["extrapolate"].detail
        fidelity = detail.get("fidelity") or {}
        within = run.config().select.cuts_within_classes
        yield f"fidelity    {fidelity_sentence(fidelity, within)}"
        if fidelity.get("judged_on") in ("audit", "rehearsal") and detail.get("fidelity_seed"):
            sentence = fidelity_sentence(detail["fidelity_seed"], within)
            yield f"            for comparison, not decisive: {sentence}"
        yield from _error_and_coverage(fidelity)
        stability = stability_for_cut(detail.get("stability") or {}, within)
        yield f"stability   {stability_sentence(stability)}"
        yield from _doubled(detail.get("learning_curve") or {}, "the seed set")
    total = sum(record.wall_seconds for record in records.values()) or 1.0
    parts = [
        f"{stage} {record.wall_seconds:.0f} s"
        for stage, record in records.items()
        if record.wall_seconds >= 0.5
    ]
    yield f"time        {total:.0f} s: {', '.join(parts)}"


def _scores_line(folder: str, samples: int, measured: int) -> str:
    return f"scores      {folder}  ({samples:,} samples, {measured:,} measured)"


def _warning(records: dict[str, StageRecord]) -> Iterator[str]:
    if noise := injected_noise(records):
        yield f"WARNING     {noise.warning}"


def describe_attached(out: str, counts: dict[str, Any]) -> Iterator[str]:
    """Return lines for the end of `raypipe attach`."""
    yield _scores_line(storage.join(out, "scores"), counts["matched"], counts["measured"])
    yield (
        f"matched     {counts['matched']:,} of {counts['images']:,} images; "
        f"{counts['without_image']:,} scores have no image"
    )
    yield f"next        raypipe select {out} --keep 0.5, then report, evaluate or export"


def describe_extrapolation(out: str, summary: dict[str, Any]) -> Iterator[str]:
    """Return lines for the end of an extrapolation from tables.

    They name the results and compare the fidelity with that of simpler methods.
    """
    counts, fidelity = summary["counts"], summary["fidelity"]
    yield _scores_line(storage.join(out, "scores"), counts["samples"], counts["measured"])
    if counts["left_out"]:
        yield f"left out    {storage.join(out, 'rejects')}  ({counts['left_out']:,} samples)"
    yield f"summary     {storage.join(out, 'summary.json')}"
    yield f"fidelity    {fidelity_sentence(fidelity)}"
    simpler = sorted(
        (figures["spearman"], name)
        for name, figures in fidelity["baselines"].items()
        if figures["spearman"] is not None
    )
    if simpler:
        yield "            compared with " + ", ".join(
            f"{name} {spearman:.2f}" for spearman, name in reversed(simpler)
        )
    yield from _doubled(summary["learning_curve"], "as many scored samples")


def fidelity_sentence(fidelity: dict[str, Any], within_classes: bool = False) -> str:
    """Return the fidelity with its interval as text; within classes where it has that figure."""
    if fidelity.get("judged_on") == "direct":
        return "nothing was extrapolated: every sample was scored directly"
    headline = HeadlineFidelity.of(fidelity, within_classes)
    spearman, low, high = headline.spearman, headline.low, headline.high
    if spearman is None:
        return f"unknown: {fidelity.get('note') or 'not judged yet'}"
    interval = ""
    if low is not None and high is not None:
        interval = f" (95 % interval {low:.2f} to {high:.2f})"
    within = f" within classes{interval}" if headline.within else interval
    if headline.overall is not None:
        within += f", {headline.overall:.2f} over all"
    pearson = f", Pearson {fidelity['pearson']:.2f}" if fidelity.get("pearson") is not None else ""
    where = JUDGED_ON.get(fidelity.get("judged_on", ""), JUDGED_ON["seed"])
    return f"Spearman {spearman:.2f}{within}{pearson}, on {fidelity.get('n_held', 0):,} {where}"


def _error_and_coverage(fidelity: dict[str, Any]) -> Iterator[str]:
    """Return lines about the error of predictions, their intervals, and a weak proxy."""
    rmse, spread = fidelity.get("rmse"), fidelity.get("spread")
    coverage = fidelity.get("coverage")
    parts = []
    if rmse is not None and spread is not None:
        parts.append(f"RMSE {rmse:.3g}, measured scores spread by {spread:.3g}")
    if coverage:
        parts.append(
            f"{100 * coverage['confidence']:.0f} % intervals hold {100 * coverage['overall']:.0f} %"
            f" ({100 * coverage['extreme']:.0f} % of extreme, {100 * coverage['farthest']:.0f} % "
            "of far samples)"
        )
    if extremes := fidelity.get("n_extremes"):
        parts.append(f"weighted, with {extremes:,} samples from the most extreme predictions")
    if parts:
        yield f"            {'; '.join(parts)}"
    if sentence := proxy_accuracy(fidelity):
        yield f"proxy       {sentence}"
    if sentence := weak_proxy(fidelity):
        yield f"WARNING     {sentence}"


def stability_sentence(stability: Mapping[str, Any]) -> str:
    """Return the agreement to expect with another training, with its interval, as text."""
    value, bounds = stability.get("value"), stability.get("interval")
    if value is None:
        return f"unknown: {stability.get('note') or 'not measured'}"
    interval = f" (95 % interval {bounds[0]:.2f} to {bounds[1]:.2f})" if bounds else ""
    within = " within classes" if stability.get("within_classes") else ""
    seed_set = " on the same seed set" if stability.get("same_samples") else ""
    return (
        f"{value:.2f}{interval}: rank correlation{within} to expect with another "
        f"training{seed_set}; {stability['proxies']} proxies scored each sample"
    )


def _doubled(curve: dict[str, Any], quantity: str) -> Iterator[str]:
    """Return a line about the predicted effect of doubling a quantity."""
    doubled = curve.get("doubled") or {}
    if doubled.get("gain") is not None:
        low, high = doubled["gain_interval"]
        yield (
            f"            twice {quantity}: predicted to add {doubled['gain']:.3f} "
            f"({low:.3f} to {high:.3f}) to Spearman"
        )


def _files_done(run: Run, stage: str) -> str:
    folder = {"embed": "embeddings", "extrapolate": "scores", "seed": "seed"}.get(stage)
    if folder is None:
        return ""
    total = len(run.fragments()) if stage in {"embed", "extrapolate"} else 0
    of = f" of {total:,}" if total else ""
    return f"  {len(run.done(folder)):,}{of} files"


def _driver(run: Run) -> dict[str, Any]:
    try:
        data = storage.read_json(run.driver_file)
    except FileNotFoundError:
        return {}
    return data if isinstance(data, dict) and not data.get("released") else {}


def _seconds(record: StageRecord) -> str:
    gpu = f", {record.gpu_seconds:.0f} GPU s" if record.gpu_seconds else ""
    return f"{record.wall_seconds:8.1f} s ({record.cpu_seconds:.0f} CPU s{gpu})"
