"""What a run would cost: the work of every stage, from the settings and the size of the source, times measured rates.

An estimate to decide by (minutes or days, one machine or twenty), not to bill by. It knows nothing of how fast the storage is, nor of
other work on the machine.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from glob import glob

from raypipe.config import Config
from raypipe.config.extrapolate import SEARCHERS_PER_GPU
from raypipe.config.measure import RECALIBRATED
from raypipe.estimate import rates
from raypipe.estimate.facts import Cost, StageCost, Survey
from raypipe.runs.layout import STAGE_FOLDERS, Run
from raypipe.runs.ledger import StageRecord

SEED_SHARD, INDEX_FILES = 512, 32
"""Seed samples in a shard and files in a task, about: the units of work of the stages `seed`, `measure` and `index`."""
FOOTER_BYTES = 65_536.0
"""Read of a file to count its samples, where that does not take all of it."""
QUICK_PART, QUICK_FROM = 0.4, 100
"""Share of a fit's time that a part held out takes, with so many audit samples: see `raypipe.stages.extrapolate.assess.write_fold`."""
PUBLISHED = 10_000
"""Samples up to which `extrapolate.judge_published: auto` judges gnn-published as well."""


@dataclass(frozen=True)
class Machine:
    """Where a run would run; `where` in words. Multiply-adds per second of a CPU core and of a GPU: see `raypipe.estimate.rates`."""

    cpus: float
    gpus: float
    where: str
    cpu_macs: float = rates.CPU_MACS
    gpu_macs: float = rates.GPU_MACS

    def __str__(self) -> str:
        gpus = f"{self.gpus:g} GPU{'s' * (self.gpus != 1)}" if self.gpus else "no GPU"
        return f"{self.where}: {self.cpus:g} CPU{'s' * (self.cpus != 1)}, {gpus}"


def this_machine() -> Machine:
    """The CPUs this process may use, and the GPUs whose devices are there, without asking Ray or torch."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = (
        len(glob("/dev/nvidia[0-9]*"))
        if visible is None
        else len([item for item in visible.split(",") if item not in ("", "-1")])
    )
    return Machine(cpus, gpus, "this machine")


@dataclass(frozen=True)
class Work:
    """The size of a run: its source, seed and audit samples, and seconds to decode an image.

    listed, listed_bytes  files and bytes that the index looks through, whatever `source.limit`
    scan_reads            how much of them; see `Source.scan_reads`
    """

    config: Config
    samples: int
    listed: int
    listed_bytes: float
    scan_reads: str
    fragments: int
    classes: int
    seed: int
    audit: int
    decode_seconds: float

    @classmethod
    def of_survey(cls, survey: Survey, config: Config) -> Work:
        samples = min(survey.samples, config.source.limit or survey.samples)
        used = samples / max(1, survey.samples)
        readable = samples * (1 - survey.rejects.share)
        seed = round(readable * config.seed.fraction)
        audit = round(config.seed.audit_samples(samples)) if config.measure.at_checkpoints else 0
        return cls(
            config,
            samples,
            survey.files,
            survey.bytes,
            survey.scan_reads,
            max(1, round(survey.fragments * used)),
            config.pseudo_labels.clusters or len(survey.class_names),
            seed,
            min(audit, round(readable) - seed),
            survey.decode_seconds,
        )

    @classmethod
    def of_run(cls, run: Run, records: Mapping[str, StageRecord], beside: Work) -> Work:
        """Of a run over a source like that of `beside`, by its ledger."""
        index, seed = records["index"], records["seed"]
        detail = index.detail
        return cls(
            run.config(),
            index.samples,
            detail["files"],
            detail["bytes"],
            beside.scan_reads,
            detail["fragments"],
            detail["classes"],
            seed.samples,
            seed.detail.get("audit_samples", 0),
            beside.decode_seconds,
        )


@dataclass(frozen=True)
class Effort:
    """Of one stage: processor seconds, GPU seconds, and how many CPUs or GPUs can share them."""

    cpu: float
    gpu: float
    shared_by: float


def efforts(work: Work, machine: Machine) -> dict[str, Effort]:
    """What the constants of `raypipe.estimate.rates` say that each stage takes."""
    config, seed = work.config, work.seed
    forward = rates.macs(config.proxy.model, config.proxy.image_size)
    shards = seed / SEED_SHARD + 1
    scan = {
        "nothing": 0.0,
        "part": work.listed * rates.FILE_SECONDS,
        "all": work.samples * rates.HEADER_SECONDS,
    }[work.scan_reads]
    result = {
        "index": Effort(scan, 0, work.listed / INDEX_FILES + 1),
        "seed": Effort(
            (seed + work.audit) * work.decode_seconds + work.samples * 0.05e-3, 0, shards
        ),
        **({"label": _labelling(work, machine, forward)} if config.unsupervised else {}),
        "proxy": _training(work, machine, forward),
    }
    passes, audit_passes = _passes(config, seed)
    count = len(config.proxy.checkpoint_epochs())
    scored = count * (seed * passes + work.audit * audit_passes) * forward
    result["measure"] = _network(
        scored, (seed + work.audit) * rates.SAMPLE_SECONDS, config.measure.use_gpu, machine, shards
    )
    if config.rehearses:  # half of the samples are trained on, and all are looked at
        again = _training(replace(work, seed=seed // 2), machine, forward)
        look = _network(
            seed * forward, seed * rates.SAMPLE_SECONDS, config.embed.use_gpu, machine, shards
        )
        result["rehearse"] = Effort(again.cpu + look.cpu, again.gpu + look.gpu, again.shared_by)
    result["embed"] = _network(
        work.samples * (forward + _features(work, forward)),
        work.samples * (work.decode_seconds + rates.SAMPLE_SECONDS),
        config.embed.use_gpu,
        machine,
        work.fragments,
    )
    result["extrapolate"] = _extrapolation(work, machine)
    result["select"] = Effort(work.samples * 1e-5, 0, 1)
    result["report"] = Effort(1.0 + work.samples * 1e-5, 0, 1)
    return {
        stage: Effort(
            effort.cpu + rates.START_CPU_SECONDS.get(stage, 0), effort.gpu, effort.shared_by
        )
        for stage, effort in result.items()
    }


def _training(work: Work, machine: Machine, forward: float) -> Effort:
    proxy = work.config.proxy
    attack = rates.ATTACK * proxy.adversary.iterations if proxy.adversary is not None else 0.0
    passes = rates.TRAINING + attack + (proxy.trajectory == "eval") * (1 + attack)
    beside = (
        work.seed * proxy.epochs / proxy.batch_size * rates.STEP_SECONDS
        + proxy.epochs * proxy.parts * rates.EPOCH_SECONDS
    )
    amount = work.seed * proxy.epochs * passes * forward
    if _on_gpu(proxy.use_gpu, machine):
        return Effort(beside, amount / machine.gpu_macs + beside, proxy.workers * proxy.parts)
    alone = amount / machine.cpu_macs + beside
    side_by_side = min(float(proxy.parts * proxy.workers), machine.cpus)
    threads = (
        max(1.0, machine.cpus / side_by_side)
        if proxy.cpus_per_worker == "auto"
        else float(proxy.cpus_per_worker)
    )
    gain = threads**rates.THREADS_POWER
    return Effort(alone / gain * threads, 0, side_by_side * threads)


def _features(work: Work, forward: float) -> float:
    """Multiply-adds of the features that tell the pseudo-label of a sample; nothing where labels are the source's."""
    settings = work.config.pseudo_labels
    if settings.clusters is None:
        return 0.0
    return (
        forward
        if settings.features == "self-supervised"
        else rates.macs(settings.model, settings.image_size)
    )


def _labelled_by(config: Config) -> str:
    """The network whose features pseudo-labels come from."""
    settings = config.pseudo_labels
    return settings.model if settings.features == "backbone" else config.proxy.model


def _labelling(work: Work, machine: Machine, forward: float) -> Effort:
    """Self-supervised training takes two views of each image; the clusters themselves are not counted."""
    settings, proxy = work.config.pseudo_labels, work.config.proxy
    look = _network(work.seed * _features(work, forward), 0, proxy.use_gpu, machine, 1)
    if settings.features == "backbone":
        return look
    plan = {
        "epochs": settings.epochs,
        "checkpoints": 1,
        "checkpoint_choice": "spaced",
        "batch_size": settings.batch_size,
        "parts": 1,
        "adversary": None,
    }
    config = work.config.model_copy(
        update={"proxy": proxy.model_copy(update=plan | {"workers": 1, "trajectory": "none"})}
    )
    training = _training(replace(work, config=config, seed=2 * work.seed), machine, forward)
    return Effort(training.cpu + look.cpu, training.gpu + look.gpu, training.shared_by)


def _passes(config: Config, seed: int) -> tuple[float, float]:
    """Forward passes that one checkpoint takes per sample of the seed set and of the audit set."""
    measure, adversary = config.measure, config.proxy.adversary
    scores = measure.at_checkpoints
    if not scores:
        return 0.0, 0.0
    moso, grand = "moso" in scores, "grand" in scores
    norms = (moso and measure.moso.gradient == "all" and measure.moso.uses_self_term(seed)) or (
        grand and measure.grand.gradient == "all"
    )
    each = (
        rates.WITH_NORMS
        if norms
        else rates.ALIGNMENT
        if moso and measure.moso.gradient == "all"
        else 0.0
    )
    each += (moso and measure.moso.gradient == "head") or (
        grand and measure.grand.gradient == "head"
    )
    each += bool(set(scores) - {"moso", "grand"})
    whole = (rates.MEAN_GRADIENT if measure.moso.gradient == "all" else 1.0) if moso else 0.0
    attack = (
        rates.ATTACK * adversary.iterations if adversary is not None else 0.0
    )  # of each of the passes over the seed set
    recalibrated = measure.recalibrate / max(1, seed // config.proxy.parts // RECALIBRATED)
    passes = each + whole + recalibrated
    return passes + attack * (1 + moso + recalibrated), each + attack


def _extrapolation(work: Work, machine: Machine) -> Effort:
    settings, model = work.config.extrapolate, work.config.proxy.model
    whole = settings.method == "gnn-published"
    folds = settings.folds_of(max(1, work.seed), work.classes)
    if settings.folds == "auto" and (whole or work.config.rehearses):
        folds = 1
    part = QUICK_PART if settings.method == "gnn" and work.audit >= QUICK_FROM else 1.0
    epochs = None if settings.epochs == "auto" else settings.epochs
    fit = rates.fit_seconds(settings.method, work.seed, work.samples, epochs, model)
    cpu = (
        fit * (1 + folds * part * (1 - settings.holdout) + work.config.rehearses / 2)
        + rates.CURVE_SIGHT * work.seed
    )
    gpu = 0.0
    if not whole:
        searched_aside = (
            _on_gpu(settings.use_gpu, machine) and work.seed <= settings.exact_neighbours
        )
        predictions = work.samples * rates.predict_seconds(
            work.seed, model, search=not searched_aside
        )
        cpu, gpu = cpu + predictions, searched_aside * predictions / SEARCHERS_PER_GPU
        published = (
            work.samples <= PUBLISHED
            if settings.judge_published == "auto"
            else settings.judge_published
        )
        cpu += published * rates.fit_seconds("gnn-published", work.seed, work.samples, None, model)
    return Effort(cpu, gpu, max(folds + 1, work.fragments / 2))


def _network(
    amount: float, beside: float, use_gpu: bool | str, machine: Machine, units: float
) -> Effort:
    if _on_gpu(use_gpu, machine):
        return Effort(beside, amount / machine.gpu_macs, units)
    return Effort(beside + amount / machine.cpu_macs, 0, units)


def _on_gpu(wish: bool | str, machine: Machine) -> bool:
    return bool(wish) and machine.gpus > 0


def estimate(
    survey: Survey,
    config: Config,
    machine: Machine,
    *,
    settings: str = "default settings",
    like: str | None = None,
) -> Cost:
    """What a run of `config` over the surveyed source would cost.

    settings  how the configuration is called in words
    like      a run, finished or not, whose ledger is scaled to this one
    Raises RunError where `like` is no run.
    """
    work = Work.of_survey(survey, config)
    stated = efforts(work, machine)
    basis: list[str] = []
    scaled: dict[str, tuple[float, float]] = {}
    if like is not None:
        scaled = scaled_efforts(work, stated, machine, like)
        rest = [
            stage
            for stage, effort in stated.items()
            if stage not in (*scaled, "select", "report") and effort.cpu + effort.gpu
        ]
        basis.append(
            f"scaled from the ledger of {like}; its images are taken to be like these"
            + (f"; constants for {', '.join(rest)}" if rest else "")
        )
    else:
        basis.append(
            "constants of raypipe.estimate.rates, measured on one server core; --like RUN scales a run of your own instead"
        )
    if survey.decode_seconds:
        basis.append(f"decoding measured here: {survey.decode_seconds * 1e3:.2f} ms an image")
    asks = [
        name
        for name in ("proxy", "measure", "embed", "extrapolate")
        if getattr(config, name).use_gpu is True
    ]
    if asks and not machine.gpus:
        basis.append(
            f"the settings ask for GPUs ({', '.join(asks)}) and there is none: estimated on CPUs; --gpus N estimates with some"
        )
    if any(effort.gpu for stage, effort in stated.items() if stage not in scaled):
        basis.append(
            "no GPU was measured: about a T4 is assumed, others are up to ten times faster"
        )
    stages = []
    for stage, effort in stated.items():
        cpu, gpu = scaled.get(stage, (effort.cpu, effort.gpu))
        less, more = rates.SPREAD["run" if stage in scaled else "gpu" if gpu else "cpu"]
        seconds = max(
            cpu / max(1.0, min(machine.cpus, effort.shared_by)),
            gpu / max(1.0, min(machine.gpus, effort.shared_by)) if gpu else 0.0,
        )
        start = rates.START_SECONDS[stage]
        stages.append(
            StageCost(
                stage,
                round(cpu, 1),
                round(gpu, 1),
                round(start / 2 + less * seconds, 1),
                round(2 * start + more * seconds, 1),
            )
        )
    return Cost(
        machine=str(machine),
        settings=settings,
        samples=work.samples,
        seed_samples=work.seed,
        stages=tuple(stages),
        low=round(sum(stage.low for stage in stages), 1),
        high=round(sum(stage.high for stage in stages), 1),
        cpu_hours=sum(stage.cpu_seconds for stage in stages) / 3600,
        gpu_hours=sum(stage.gpu_seconds for stage in stages) / 3600,
        bytes_read=bytes_read(
            work, survey.bytes * work.samples / max(1, survey.samples), survey.reads_singly
        ),
        bytes_written=bytes_written(work),
        basis=tuple(basis),
    )


def scaled_efforts(
    work: Work, stated: Mapping[str, Effort], machine: Machine, like: str
) -> dict[str, tuple[float, float]]:
    """(processor seconds, GPU seconds) by stage: those of a run's ledger, times what the constants say this one takes beside that one."""
    run = Run(like)
    records = run.ledger()
    if any(stage not in records or records[stage].state != "done" for stage in ("index", "seed")):
        return {}
    gpus = any(record.gpu_seconds for record in records.values())
    other = efforts(Work.of_run(run, records, work), replace(machine, gpus=1.0 if gpus else 0.0))
    result = {}
    for stage, effort in stated.items():
        record, theirs = records.get(stage), other.get(stage)
        # seconds of a GPU say nothing of those of a CPU
        if (
            record is None
            or theirs is None
            or record.state != "done"
            or bool(effort.gpu) != bool(record.gpu_seconds)
            or stage in ("select", "report")
        ):
            continue
        if record.cpu_seconds and theirs.cpu:
            gpu = record.gpu_seconds * effort.gpu / theirs.gpu if effort.gpu and theirs.gpu else 0.0
            result[stage] = record.cpu_seconds * effort.cpu / theirs.cpu, gpu
    return result


def bytes_read(work: Work, stored: float, reads_singly: bool) -> dict[str, int]:
    """Of the source, by stage: a seed stage that cannot pick single samples reads what lies between them too.

    stored  bytes of the samples that are used
    """
    index = {
        "nothing": 0.0,
        "part": min(work.listed_bytes, work.listed * FOOTER_BYTES),
        "all": work.listed_bytes,
    }[work.scan_reads]
    drawn = (work.seed + work.audit) / max(1, work.samples) if reads_singly else 1.0
    return {"index": round(index), "seed": round(stored * min(1.0, drawn)), "embed": round(stored)}


def bytes_written(work: Work) -> dict[str, int]:
    """By folder of the run."""
    proxy, measure = work.config.proxy, work.config.measure
    weights = (
        4 * (rates.PARAMETERS[proxy.model] + rates.width(proxy.model) * work.classes) * proxy.parts
    )
    count, number = len(proxy.checkpoint_epochs()), 4 if work.config.embed.dtype == "float32" else 2
    kept = count * weights
    trajectory = (
        0 if proxy.trajectory == "none" else proxy.epochs * work.seed * (24 + 2 * work.classes)
    )
    at_checkpoints, image = bool(measure.at_checkpoints), 3 * proxy.image_size**2 + 40
    found = {
        "seed": (work.seed + work.audit) * image,
        "labels": work.config.unsupervised
        * (4 * rates.PARAMETERS[_labelled_by(work.config)] + 60 * (work.seed + work.audit)),
        "proxy": kept + trajectory,
        "measured": kept * (("moso" in measure.scores) + (measure.recalibrate and at_checkpoints))
        + work.seed * (60 + 12 * count),
        "rehearsal": work.config.rehearses
        * (
            (work.seed * image + trajectory) // 2
            + kept
            + work.seed * (4 * rates.width(proxy.model) + 60)
        ),
        "embeddings": work.samples * (number * rates.width(proxy.model) + 150),
        "extrapolator": 2 * work.seed * (4 * rates.width(proxy.model) + 100),
        "scores": work.samples * 30,
        "keep": round(sum(work.config.select.keep) * work.samples * 25),
    }
    return {
        folder: found[folder]
        for folders in STAGE_FOLDERS.values()
        for folder in folders
        if found.get(folder)
    }
