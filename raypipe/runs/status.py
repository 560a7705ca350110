"""What a person is shown in a terminal of a run on its way and of a run at its end. No Ray, no torch. Of a source: `raypipe.estimate`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from raypipe import storage
from raypipe.progress import describe_progress
from raypipe.runs.layout import OPTIONAL_STAGES, STAGE_FOLDERS
from raypipe.runs.ledger import StageRecord, extrapolated_tables, injected_noise
from raypipe.runs.run import Run
from raypipe.text import JUDGED_ON, duration


def describe_run(uri: str) -> Iterator[str]:
    """Lines about how far a run is."""
    run = Run(uri)
    records = run.ledger()
    yield f"run         {run.uri}"
    yield from _warning(records)
    tables = extrapolated_tables(records)  # such a folder has one stage
    for stage in STAGE_FOLDERS:
        record = records.get(stage)
        if record is None and (tables or stage in OPTIONAL_STAGES):
            continue
        if record is None:
            yield f"{stage:<11} not started"
            continue
        text = f"{stage:<11} {record.state:<8} {record.samples:>12,} samples {_seconds(record)}"
        if record.state != "done":
            text += _files_done(run, stage)
        if record.error:
            text += f"  {record.error}"
        yield text
    holder = _driver(run)
    if holder:
        yield f"driver      process {holder.get('pid')} on {holder.get('host')}, last heard of {holder.get('date')}"
        about = holder.get("progress")
        if isinstance(about, dict) and about.get("stage"):
            yield f"now         {str(about.get('stage'))[:20]} {describe_progress(about)}"
    rejects = records["embed"].detail.get("rejects", 0) if "embed" in records else 0
    if rejects:
        yield f"rejects     {rejects:,}"
    cpu, gpu = (_spent(records, name, holder) for name in ("cpu_seconds", "gpu_seconds"))
    attempts = sum(record.attempts for record in records.values())
    yield f"spent       {duration(cpu)} CPU{f', {duration(gpu)} GPU' if gpu else ''}, in {attempts} attempts at {len(records)} stages"


def _spent(records: dict[str, StageRecord], name: str, holder: dict[str, Any]) -> float:
    """Seconds of all stages: those of the ledger, or of the driver that is at work, which knows more."""
    about = holder.get("progress")
    told = about.get(name) if isinstance(about, dict) else None
    return max(
        sum(getattr(record, name) for record in records.values()),
        told if isinstance(told, float) and told < 1e12 else 0.0,
    )


def describe_result(run: Run) -> Iterator[str]:
    """Lines for the end of a run: where things are, fidelity, where the time went."""
    records = run.ledger()
    yield ""
    yield from _warning(records)
    if "extrapolate" in records:
        record = records["extrapolate"]
        yield f"scores      {run.scores_folder}  ({record.samples:,} samples, {record.detail.get('measured', 0):,} measured)"
    if "select" in records:
        for file in sorted(storage.names(run.keep_folder)):
            yield f"keep-list   {run.keep_list(file)}"
    if "report" in records:
        yield f"report      {run.report_page}"
    if "label" in records:
        yield f"labels      pseudo-labels from {records['label'].detail.get('clusters')} clusters; no true labels were used"
    if "extrapolate" in records:
        detail = records["extrapolate"].detail
        fidelity = detail.get("fidelity") or {}
        yield f"fidelity    {fidelity_sentence(fidelity)}"
        if fidelity.get("judged_on") in ("audit", "rehearsal") and detail.get("fidelity_seed"):
            yield f"            {fidelity_sentence(detail['fidelity_seed'])}"
        yield from _doubled(detail.get("learning_curve") or {}, "the seed set")
    total = sum(record.wall_seconds for record in records.values()) or 1.0
    parts = [
        f"{stage} {record.wall_seconds:.0f} s"
        for stage, record in records.items()
        if record.wall_seconds >= 0.5
    ]
    yield f"time        {total:.0f} s: {', '.join(parts)}"


def _warning(records: dict[str, StageRecord]) -> Iterator[str]:
    if noise := injected_noise(records):
        yield f"REHEARSAL   {noise.warning}"


def describe_extrapolation(out: str, summary: dict[str, Any]) -> Iterator[str]:
    """Lines for the end of an extrapolation from tables: where things are, fidelity beside that of simpler methods."""
    counts, fidelity = summary["counts"], summary["fidelity"]
    yield f"scores      {storage.join(out, 'scores')}  ({counts['samples']:,} samples, {counts['measured']:,} measured)"
    if counts["left_out"]:
        yield f"left out    {storage.join(out, 'rejects')}  ({counts['left_out']:,} samples)"
    yield f"summary     {storage.join(out, 'summary.json')}"
    yield f"fidelity    {fidelity_sentence(fidelity)}"
    simpler = sorted(
        (found["spearman"], name)
        for name, found in fidelity["baselines"].items()
        if found["spearman"] is not None
    )
    if simpler:
        yield "            beside " + ", ".join(
            f"{name} {spearman:.2f}" for spearman, name in reversed(simpler)
        )
    yield from _doubled(summary["learning_curve"], "as many scored samples")


def fidelity_sentence(fidelity: dict[str, Any]) -> str:
    """The fidelity in words, with its interval."""
    spearman, bounds = fidelity.get("spearman"), fidelity.get("spearman_interval")
    if spearman is None:
        return f"unknown: {fidelity.get('note') or 'not judged yet'}"
    interval = f" (95 % interval {bounds[0]:.2f} to {bounds[1]:.2f})" if bounds else ""
    pearson = f", Pearson {fidelity['pearson']:.2f}" if fidelity.get("pearson") is not None else ""
    where = JUDGED_ON.get(fidelity.get("judged_on", ""), JUDGED_ON["seed"])
    return f"Spearman {spearman:.2f}{interval}{pearson}, on {fidelity.get('n_held', 0):,} {where}"


def _doubled(curve: dict[str, Any], what: str) -> Iterator[str]:
    doubled = curve.get("doubled") or {}
    if doubled.get("gain") is not None:
        low, high = doubled["gain_interval"]
        yield f"            twice {what}: predicted to add {doubled['gain']:.3f} ({low:.3f} to {high:.3f}) to Spearman"


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
