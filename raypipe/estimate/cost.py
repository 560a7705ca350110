"""Estimate a run: the work of every stage, from settings and size of the source, times rates.

The estimate is for decisions (minutes or days, one machine or twenty), not for billing. It does not
know how fast the storage is, nor what else the machines do.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from glob import glob

from raypipe.assessment.conformal import MIN_SAMPLES_TO_RESCALE
from raypipe.config import Config
from raypipe.config.extrapolate import SEARCHERS_PER_GPU
from raypipe.config.measure import RECALIBRATED
from raypipe.estimate import rates
from raypipe.estimate.facts import CostEstimate, StageEstimate, Survey
from raypipe.runs.layout import STAGE_FOLDERS
from raypipe.runs.ledger import StageRecord
from raypipe.runs.run import Run
from raypipe.runs.sizes import INDEX_TASK_FILES, PUBLISHED_SAMPLES, SEED_SHARD_SAMPLES
from raypipe.text import plural

FOOTER_BYTES = 65_536.0
"""Bytes read of a file to count its samples, if that does not require all of it."""
QUICK_FOLD = 0.4
"""Time of a quick fold as a share of a fit: one network, where the audit set sets the intervals.

See `raypipe.stages.extrapolate.assess.write_fold`.
"""
LAST_STAGES = ("select", "report")
"""Stages that are never scaled from a ledger: they are short."""


@dataclass(frozen=True)
class Machine:
    """Where a run would take place.

    Attributes
    ----------
    cpus, gpus
        CPU cores and GPUs.
    where
        A description.
    cpu_macs, gpu_macs
        Multiply-adds per second of a CPU core and of a GPU; see `raypipe.estimate.rates`.
    """

    cpus: float
    gpus: float
    where: str
    cpu_macs: float = rates.CPU_MACS
    gpu_macs: float = rates.GPU_MACS

    def __str__(self) -> str:
        gpus = f"{self.gpus:g} {plural(self.gpus, 'GPU')}" if self.gpus else "no GPU"
        return f"{self.where}: {self.cpus:g} {plural(self.cpus, 'CPU')}, {gpus}"

    def uses_gpu(self, setting: bool | str) -> bool:
        """Tell whether a stage with this `use_gpu` would run on a GPU."""
        return bool(setting) and self.gpus > 0


def this_machine() -> Machine:
    """Return the CPUs this process may use, and this machine's GPUs, without Ray and torch."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = (
        len(glob("/dev/nvidia[0-9]*"))
        if visible is None
        else len([item for item in visible.split(",") if item not in ("", "-1")])
    )
    return Machine(cpus, gpus, "this machine")


@dataclass(frozen=True)
class Workload:
    """The size of a run.

    Attributes
    ----------
    config
        The settings.
    samples
        Samples to score.
    listed, listed_bytes
        Files and bytes that the index looks through, whatever `source.limit` is.
    scan_reads
        How much of them it reads; see `raypipe.sources.Source.scan_reads`.
    fragments, classes
        Of the source.
    seed, audit
        Samples of the seed set and of the audit set.
    decode_seconds
        Processor seconds to decode an image.
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
    def of_survey(cls, survey: Survey, config: Config) -> Workload:
        """Return the workload of a run over an inspected source."""
        samples = min(survey.samples, config.source.limit or survey.samples)
        used = samples / max(1, survey.samples)
        readable = samples * (1 - survey.rejects.share)
        seed = round(readable * config.seed.fraction)
        audit = round(config.seed.audit_samples(samples)) if config.measure.at_checkpoints else 0
        return cls(
            config=config,
            samples=samples,
            listed=survey.files,
            listed_bytes=survey.bytes,
            scan_reads=survey.scan_reads,
            fragments=max(1, round(survey.fragments * used)),
            classes=config.pseudo_labels.clusters or len(survey.class_names),
            seed=seed,
            audit=min(audit, round(readable) - seed),
            decode_seconds=survey.decode_seconds,
        )

    @classmethod
    def of_run(cls, run: Run, records: Mapping[str, StageRecord], similar: Workload) -> Workload:
        """Return the workload of an earlier run over a source of the same kind as `similar`."""
        index, seed = records["index"], records["seed"]
        return cls(
            config=run.config(),
            samples=index.samples,
            listed=index.detail["files"],
            listed_bytes=index.detail["bytes"],
            scan_reads=similar.scan_reads,
            fragments=index.detail["fragments"],
            classes=index.detail["classes"],
            seed=seed.samples,
            audit=seed.detail.get("audit_samples", 0),
            decode_seconds=similar.decode_seconds,
        )

    @property
    def forward_macs(self) -> float:
        """Multiply-adds of a forward pass of the proxy."""
        return rates.macs(self.config.proxy.model, self.config.proxy.image_size)

    @property
    def seed_shards(self) -> float:
        """Shards of the seed set, about."""
        return self.seed / SEED_SHARD_SAMPLES + 1


@dataclass(frozen=True)
class Effort:
    """The work of one stage: processor seconds, GPU seconds, and how many CPUs or GPUs share it."""

    cpu: float
    gpu: float
    shared_by: float

    def wall_seconds(self, machine: Machine) -> float:
        """Return seconds on the clock if every CPU or GPU that can share the work is busy."""
        cpu = self.cpu / max(1.0, min(machine.cpus, self.shared_by))
        gpu = self.gpu / max(1.0, min(machine.gpus, self.shared_by)) if self.gpu else 0.0
        return max(cpu, gpu)


def efforts(work: Workload, machine: Machine) -> dict[str, Effort]:
    """Return the work of each stage, by the constants of `raypipe.estimate.rates`."""
    config = work.config
    by_stage = {
        "index": _indexing(work),
        "seed": _drawing(work),
        **({"label": _labelling(work, machine)} if config.unsupervised else {}),
        "proxy": _training(work, machine),
        "measure": _measuring(work, machine),
        **({"rehearse": _rehearsal(work, machine)} if config.rehearses else {}),
        "embed": _embedding(work, machine),
        "extrapolate": _extrapolation(work, machine),
        "select": Effort(work.samples * 1e-5, 0, 1),
        "report": Effort(1.0 + work.samples * 1e-5, 0, 1),
    }
    return {
        stage: replace(effort, cpu=effort.cpu + rates.START_CPU_SECONDS.get(stage, 0))
        for stage, effort in by_stage.items()
    }


def _indexing(work: Workload) -> Effort:
    scan = {
        "nothing": 0.0,
        "part": work.listed * rates.FILE_SECONDS,
        "all": work.samples * rates.HEADER_SECONDS,
    }[work.scan_reads]
    return Effort(scan, 0, work.listed / INDEX_TASK_FILES + 1)


def _drawing(work: Workload) -> Effort:
    """Return the work of the stage `seed`: hash every id, decode the samples that are drawn."""
    decoding = (work.seed + work.audit) * work.decode_seconds
    return Effort(decoding + work.samples * rates.HASH_SECONDS, 0, work.seed_shards)


def _training(work: Workload, machine: Machine) -> Effort:
    proxy = work.config.proxy
    attack = rates.ATTACK * proxy.adversary.iterations if proxy.adversary is not None else 0.0
    passes = rates.TRAINING + attack + (proxy.trajectory == "eval") * (1 + attack)
    overhead = (
        work.seed * proxy.epochs / proxy.batch_size * rates.STEP_SECONDS
        + proxy.epochs * proxy.parts * rates.EPOCH_SECONDS
    )
    amount = work.seed * proxy.epochs * passes * work.forward_macs
    if machine.uses_gpu(proxy.use_gpu):
        return Effort(overhead, amount / machine.gpu_macs + overhead, proxy.workers * proxy.parts)
    on_one_thread = amount / machine.cpu_macs + overhead
    workers = min(float(proxy.parts * proxy.workers), machine.cpus)
    threads = (
        max(1.0, machine.cpus / workers)
        if proxy.cpus_per_worker == "auto"
        else float(proxy.cpus_per_worker)
    )
    speed_up = threads**rates.THREADS_POWER
    return Effort(on_one_thread / speed_up * threads, 0, workers * threads)


def _measuring(work: Workload, machine: Machine) -> Effort:
    config = work.config
    passes, audit_passes = _passes(config, work.seed)
    checkpoints = len(config.proxy.checkpoint_epochs())
    amount = checkpoints * (work.seed * passes + work.audit * audit_passes) * work.forward_macs
    overhead = (work.seed + work.audit) * rates.SAMPLE_SECONDS
    return _network(amount, overhead, config.measure.use_gpu, machine, work.seed_shards)


def _rehearsal(work: Workload, machine: Machine) -> Effort:
    """Return the work of a rehearsal: half of the samples are trained on, all are embedded."""
    training = _training(replace(work, seed=work.seed // 2), machine)
    embedding = _network(
        work.seed * work.forward_macs,
        work.seed * rates.SAMPLE_SECONDS,
        work.config.embed.use_gpu,
        machine,
        work.seed_shards,
    )
    return Effort(training.cpu + embedding.cpu, training.gpu + embedding.gpu, training.shared_by)


def _embedding(work: Workload, machine: Machine) -> Effort:
    return _network(
        work.samples * (work.forward_macs + _label_feature_macs(work)),
        work.samples * (work.decode_seconds + rates.SAMPLE_SECONDS),
        work.config.embed.use_gpu,
        machine,
        work.fragments,
    )


def _label_feature_macs(work: Workload) -> float:
    """Return the multiply-adds of the features that give a sample its pseudo-label.

    They are 0 if the source has labels.
    """
    settings = work.config.pseudo_labels
    if settings.clusters is None:
        return 0.0
    if settings.features == "self-supervised":
        return work.forward_macs
    return rates.macs(settings.model, settings.image_size)


def _label_network(config: Config) -> str:
    """Return the network whose features give samples their pseudo-labels."""
    settings = config.pseudo_labels
    return settings.model if settings.features == "backbone" else config.proxy.model


def _labelling(work: Workload, machine: Machine) -> Effort:
    """Return the work of pseudo-labels, without the clustering itself.

    Self-supervised training takes two views of each image.
    """
    settings, proxy = work.config.pseudo_labels, work.config.proxy
    features = _network(work.seed * _label_feature_macs(work), 0, proxy.use_gpu, machine, 1)
    if settings.features == "backbone":
        return features
    like_proxy = proxy.model_copy(
        update={
            "epochs": settings.epochs,
            "checkpoints": 1,
            "checkpoint_choice": "spaced",
            "batch_size": settings.batch_size,
            "parts": 1,
            "adversary": None,
            "workers": 1,
            "trajectory": "none",
        }
    )
    config = work.config.model_copy(update={"proxy": like_proxy})
    training = _training(replace(work, config=config, seed=2 * work.seed), machine)
    return Effort(training.cpu + features.cpu, training.gpu + features.gpu, training.shared_by)


def _passes(config: Config, seed: int) -> tuple[float, float]:
    """Return the forward passes that a checkpoint is worth, per seed and per audit sample."""
    measure, adversary = config.measure, config.proxy.adversary
    scores = measure.at_checkpoints
    if not scores:
        return 0.0, 0.0
    moso, grand = "moso" in scores, "grand" in scores
    norms = (moso and measure.moso.gradient == "all" and measure.moso.uses_self_term(seed)) or (
        grand and measure.grand.gradient == "all"
    )
    if norms:
        each = rates.WITH_NORMS
    else:
        each = rates.ALIGNMENT if moso and measure.moso.gradient == "all" else 0.0
    each += (moso and measure.moso.gradient == "head") or (
        grand and measure.grand.gradient == "head"
    )
    each += bool(set(scores) - {"moso", "grand"})
    mean = (rates.MEAN_GRADIENT if measure.moso.gradient == "all" else 1.0) if moso else 0.0
    # an attack precedes each pass over the seed set
    attack = rates.ATTACK * adversary.iterations if adversary is not None else 0.0
    recalibrated = measure.recalibrate / max(1, seed // config.proxy.parts // RECALIBRATED)
    return each + mean + recalibrated + attack * (1 + moso + recalibrated), each + attack


def _extrapolation(work: Workload, machine: Machine) -> Effort:
    settings, model = work.config.extrapolate, work.config.proxy.model
    folds = _folds(work)
    quick = settings.method == "gnn" and work.audit >= MIN_SAMPLES_TO_RESCALE
    fold = (QUICK_FOLD if quick else 1.0) * (1 - settings.holdout)
    epochs = None if settings.epochs == "auto" else settings.epochs
    fit = rates.fit_seconds(settings.method, work.seed, work.samples, epochs, model)
    cpu = fit * (1 + folds * fold + work.config.rehearses / 2) + rates.CURVE_SAMPLE * work.seed
    gpu = 0.0
    if settings.method != "gnn-published":
        on_gpu = machine.uses_gpu(settings.use_gpu) and work.seed <= settings.exact_neighbours
        predictions = work.samples * rates.predict_seconds(work.seed, model, search=not on_gpu)
        cpu, gpu = cpu + predictions, on_gpu * predictions / SEARCHERS_PER_GPU
        published = (
            work.samples <= PUBLISHED_SAMPLES
            if settings.judge_published == "auto"
            else settings.judge_published
        )
        cpu += published * rates.fit_seconds("gnn-published", work.seed, work.samples, None, model)
    return Effort(cpu, gpu, max(folds + 1, work.fragments / 2))


def _folds(work: Workload) -> int:
    settings = work.config.extrapolate
    one_will_do = settings.method == "gnn-published" or work.config.rehearses
    if settings.folds == "auto" and one_will_do:
        return 1
    return settings.folds_of(max(1, work.seed), work.classes)


def _network(
    macs: float, overhead: float, use_gpu: bool | str, machine: Machine, shared_by: float
) -> Effort:
    """Return the work of forward passes, with `overhead` processor seconds alongside."""
    if machine.uses_gpu(use_gpu):
        return Effort(overhead, macs / machine.gpu_macs, shared_by)
    return Effort(overhead + macs / machine.cpu_macs, 0, shared_by)


# -- the estimate of a run -----------------------------------------------------------------------


def estimate(
    survey: Survey,
    config: Config,
    machine: Machine,
    *,
    settings: str = "default settings",
    like: str | None = None,
) -> CostEstimate:
    """Estimate what a run over an inspected source would cost.

    Parameters
    ----------
    survey, config, machine
        Source, settings and place of the run.
    settings
        A description of the configuration.
    like
        An earlier run, finished or not, whose ledger is scaled to this one.

    Raises
    ------
    RunError
        If `like` is not a run.
    """
    work = Workload.of_survey(survey, config)
    by_constants = efforts(work, machine)
    scaled = scaled_efforts(work, by_constants, machine, like) if like is not None else {}
    stages = tuple(
        _stage_estimate(stage, scaled.get(stage, effort), machine, from_run=stage in scaled)
        for stage, effort in by_constants.items()
    )
    used_bytes = survey.bytes * work.samples / max(1, survey.samples)
    return CostEstimate(
        machine=str(machine),
        settings=settings,
        samples=work.samples,
        seed_samples=work.seed,
        stages=stages,
        low=round(sum(stage.low for stage in stages), 1),
        high=round(sum(stage.high for stage in stages), 1),
        cpu_hours=sum(stage.cpu_seconds for stage in stages) / 3600,
        gpu_hours=sum(stage.gpu_seconds for stage in stages) / 3600,
        bytes_read=bytes_read(work, used_bytes, survey.reads_singly),
        bytes_written=bytes_written(work),
        basis=tuple(_basis(work, machine, by_constants, scaled, like)),
    )


def _stage_estimate(
    stage: str, effort: Effort, machine: Machine, *, from_run: bool
) -> StageEstimate:
    less, more = rates.SPREAD["run" if from_run else "gpu" if effort.gpu else "cpu"]
    seconds, start = effort.wall_seconds(machine), rates.START_SECONDS[stage]
    return StageEstimate(
        stage,
        cpu_seconds=round(effort.cpu, 1),
        gpu_seconds=round(effort.gpu, 1),
        low=round(start / 2 + less * seconds, 1),
        high=round(2 * start + more * seconds, 1),
    )


def _basis(
    work: Workload,
    machine: Machine,
    by_constants: Mapping[str, Effort],
    scaled: Mapping[str, Effort],
    like: str | None,
) -> list[str]:
    """Return sentences on what the estimate is based on."""
    if like is not None:
        rest = [
            stage
            for stage, effort in by_constants.items()
            if stage not in (*scaled, *LAST_STAGES) and effort.cpu + effort.gpu
        ]
        basis = [
            f"scaled from the ledger of {like}, assuming similar images"
            + (f"; constants for {', '.join(rest)}" if rest else "")
        ]
    else:
        basis = [
            "constants of raypipe.estimate.rates, measured on one server core; "
            "--like RUN scales one of your own runs instead"
        ]
    if work.decode_seconds:
        basis.append(f"decoding measured here: {work.decode_seconds * 1e3:.2f} ms per image")
    want_gpus = [
        name
        for name in ("proxy", "measure", "embed", "extrapolate")
        if getattr(work.config, name).use_gpu is True
    ]
    if want_gpus and not machine.gpus:
        basis.append(
            f"the settings ask for GPUs ({', '.join(want_gpus)}), but there are none: "
            "estimated on CPUs; --gpus N estimates with GPUs"
        )
    if any(effort.gpu for stage, effort in by_constants.items() if stage not in scaled):
        basis.append(
            "no GPU was measured: about a T4 is assumed; others are up to ten times faster"
        )
    return basis


def scaled_efforts(
    work: Workload, by_constants: Mapping[str, Effort], machine: Machine, like: str
) -> dict[str, Effort]:
    """Scale what the stages of an earlier run took to this one.

    The scale of a stage is the ratio of what the constants give for the two runs. Stages that
    cannot be scaled are left out.

    Raises
    ------
    RunError
        If `like` is not a run.
    """
    run = Run(like)
    records = run.ledger()
    if any(stage not in records or records[stage].state != "done" for stage in ("index", "seed")):
        return {}
    gpus = any(record.gpu_seconds for record in records.values())
    earlier = efforts(
        Workload.of_run(run, records, work), replace(machine, gpus=1.0 if gpus else 0.0)
    )
    scaled = {}
    for stage, effort in by_constants.items():
        if stage in records and stage in earlier and stage not in LAST_STAGES:
            found = _scaled(effort, records[stage], earlier[stage])
            if found is not None:
                scaled[stage] = found
    return scaled


def _scaled(effort: Effort, record: StageRecord, earlier: Effort) -> Effort | None:
    """Scale one stage; None if its record does not allow it."""
    # seconds on a GPU say nothing about seconds on a CPU
    if record.state != "done" or bool(effort.gpu) != bool(record.gpu_seconds):
        return None
    if not record.cpu_seconds or not earlier.cpu:
        return None
    gpu = record.gpu_seconds * effort.gpu / earlier.gpu if effort.gpu and earlier.gpu else 0.0
    return Effort(record.cpu_seconds * effort.cpu / earlier.cpu, gpu, effort.shared_by)


def bytes_read(work: Workload, stored: float, random_access: bool) -> dict[str, int]:
    """Return the bytes of the source that each stage reads.

    Parameters
    ----------
    work
        The run.
    stored
        Bytes of the samples that are used.
    random_access
        Whether single samples can be read; otherwise the stage `seed` reads what lies between.
    """
    index = {
        "nothing": 0.0,
        "part": min(work.listed_bytes, work.listed * FOOTER_BYTES),
        "all": work.listed_bytes,
    }[work.scan_reads]
    drawn = (work.seed + work.audit) / max(1, work.samples) if random_access else 1.0
    return {"index": round(index), "seed": round(stored * min(1.0, drawn)), "embed": round(stored)}


def bytes_written(work: Workload) -> dict[str, int]:
    """Return the bytes of each folder of the run."""
    config, proxy, measure = work.config, work.config.proxy, work.config.measure
    width = rates.width(proxy.model)
    checkpoint = 4 * (rates.PARAMETERS[proxy.model] + width * work.classes) * proxy.parts
    count = len(proxy.checkpoint_epochs())
    checkpoints = count * checkpoint
    trajectory = (
        0 if proxy.trajectory == "none" else proxy.epochs * work.seed * (24 + 2 * work.classes)
    )
    image = 3 * proxy.image_size**2 + 40
    drawn = work.seed + work.audit
    recalibrated = measure.recalibrate and bool(measure.at_checkpoints)
    feature = 4 if config.embed.dtype == "float32" else 2
    labeller = 4 * rates.PARAMETERS[_label_network(config)] + 60 * drawn
    rehearsal = (work.seed * image + trajectory) // 2 + checkpoints + work.seed * (4 * width + 60)
    folder_bytes = {
        "seed": drawn * image,
        "labels": config.unsupervised * labeller,
        "proxy": checkpoints + trajectory,
        "measured": (
            checkpoints * (("moso" in measure.scores) + recalibrated)
            + work.seed * (60 + 12 * count)
        ),
        "rehearsal": config.rehearses * rehearsal,
        "embeddings": work.samples * (feature * width + 150),
        "extrapolator": 2 * work.seed * (4 * width + 100),
        "scores": work.samples * 30,
        "keep": round(sum(config.select.keep) * work.samples * 25),
    }
    return {
        folder: folder_bytes[folder]
        for folders in STAGE_FOLDERS.values()
        for folder in folders
        if folder_bytes.get(folder)
    }
