"""What a run over a source of some size costs, before there is a source: work, money, requests, files, bytes, and what breaks first.

    raypipe plan CONFIG --samples 1281167 --gpus 8

Processor and GPU seconds are those of `raypipe.estimate.cost`, the estimate of `raypipe inspect`, at the rates of `Rates`; requests and files
follow from what each stage reads and writes, counted below. It plans and does not promise: storage that is slow, machines that
wait for one another, and retries are not in it. No Ray, no torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raypipe import storage
from raypipe.config import Config
from raypipe.errors import ConfigError
from raypipe.estimate import rates as constants
from raypipe.estimate.cost import (
    Effort,
    Machine,
    Work,
    bytes_read,
    bytes_written,
    efforts,
    scaled_efforts,
)
from raypipe.estimate.plan_rates import Rates, read_rates
from raypipe.runs.run import Run
from raypipe.runs.score_stream import CACHE_BYTES
from raypipe.runs.sizes import INDEX_FILE_FRAGMENTS, SEED_SHARD_SAMPLES
from raypipe.scores.registry import check_scores
from raypipe.selection import STRATEGIES
from raypipe.sources import source_class
from raypipe.storage.remote_listing import PAGE

BLOCK = 4 << 20
"""Bytes of one read of a large file."""
SELECT_PASSES, SELECT_ROW = 12, 40
"""How often `select` reads the score shards where they do not stay in memory (else twice), by its default strategy; and what a sample
takes there, in bytes."""
LEDGER_BYTES, LEDGER_CLASS = 12_000, 1200
"""Of `run.json`: of a run with few classes, and of each class more (counts, intervals, neighbour search)."""
NAME_BYTES = 24
"""Of the index: of the name of one small file among many, compressed."""
START_MB = 300
"""Of the driver's memory before it holds a fragment: Ray and Arrow, imported and connected."""
WORKER_GB, DRIVER_GB, DECISION_SECONDS, LISTING_MINUTES = 2.0, 1.0, 30.0, 10.0
TRAINING_HOURS, FIT_HOURS, EMBED_HOURS, ALONE_HOURS = 48.0, 6.0, 168.0, 6.0
"""What is taken for the end of what works or is worth waiting for: see `Bound`. A CPU of the machines in cluster.yaml has 2 GB."""
CPUS_BESIDE_GPU = 8
"""CPUs for each GPU where they are not said: those of a machine with one."""


@dataclass(frozen=True)
class Prices:
    """Dollars for an hour of a GPU and of a CPU, a million requests, a GB of what is stored for a month. None: not said."""

    gpu: float | None = None
    cpu: float | None = None
    request: float | None = None
    storage: float | None = None


@dataclass(frozen=True)
class Size:
    """A source that may not be there yet: samples, their mean encoded size in bytes, samples in a file (None: as usual), classes."""

    samples: int
    image_bytes: float = 110_000.0
    file_samples: int | None = None
    classes: int = 1000


@dataclass(frozen=True)
class StagePlan:
    """Of one stage: hours of GPUs and CPUs, hours of the clock, requests to storage, bytes of the source that are read, files written."""

    stage: str
    gpu_hours: float
    cpu_hours: float
    hours: float
    requests: int
    bytes_read: int
    files: int


@dataclass(frozen=True)
class Bound:
    """Something that has a limit: `figure` in `unit`, where more than `limit` does not work or is not worth waiting for."""

    what: str
    figure: float
    limit: float
    unit: str
    remedy: str

    @property
    def share(self) -> float:
        """Of the limit; above 1 it breaks."""
        return self.figure / self.limit


@dataclass(frozen=True)
class Plan:
    """Everything that `raypipe plan` shows; sizes in bytes, bounds with the tightest first."""

    samples: int
    measured: int
    audit: int
    files: int
    source_bytes: int
    format: str
    fragments: int
    gpus: float
    cpus: float
    stages: tuple[StagePlan, ...]
    written: dict[str, int]
    written_files: int
    index_bytes: int
    ledger_bytes: int
    driver_bytes: int
    dollars: dict[str, float]
    bounds: tuple[Bound, ...]
    rates: Rates
    notes: tuple[str, ...]

    def total(self, name: str) -> float:
        """Of a figure over all stages."""
        return sum(getattr(stage, name) for stage in self.stages)

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it."""
        result = dataclasses.asdict(self)
        for bound, item in zip(self.bounds, result["bounds"], strict=True):
            item["share"] = bound.share
        names = ("gpu_hours", "cpu_hours", "hours", "requests", "bytes_read", "files")
        return result | {"total": {name: self.total(name) for name in names}}


def plan(
    config: Config,
    size: Size,
    *,
    gpus: float = 0,
    cpus: float | None = None,
    rates: Rates | None = None,
    prices: Prices | None = None,
    like: str | None = None,
) -> Plan:
    """Plan a run of `config` over a source of that size, whatever `source.uri` and `source.limit` say.

    cpus  default: CPUS_BESIDE_GPU for each GPU, 16 without
    like  a finished run, whose ledger says what its stages took, and whose folders what they weigh
    Raises ConfigError for what cannot be planned, RunError where `like` is no run.
    """
    check_scores(config)
    rates = rates or Rates()
    for name, value, least in (
        ("samples", size.samples, 1),
        ("gpus", gpus, 0),
        ("cpus", 1 if cpus is None else cpus, 1),
    ):
        if not least <= value <= 1e13:
            raise ConfigError(f"{name}: {value:g} is not allowed: at least {least}")
    cpus = cpus if cpus is not None else (CPUS_BESIDE_GPU * gpus or 16)
    machine = Machine(cpus, gpus, "the cluster", rates.cpu_macs, rates.gpu_macs)
    format = "webdataset" if config.source.format == "auto" else config.source.format
    kind, work = source_class(format), _work(config, size, rates, format)
    stated = efforts(work, machine)
    notes = (
        [] if config.source.format != "auto" else ["source.format is auto: planned as webdataset"]
    )
    if like is not None:
        scaled = {
            stage: Effort(*found, stated[stage].shared_by)
            for stage, found in scaled_efforts(work, stated, machine, like).items()
        }
        stated |= scaled
        rest = [stage for stage in stated if stage not in scaled]
        notes.append(
            f"scaled from the ledger of {like}: {', '.join(scaled) or 'nothing'}; by rates: {', '.join(rest)}"
        )
    if gpus and "assumed" in rates.sources["gpu_macs"]:
        notes.append(
            "GPU hours rest on an assumed GPU: give --forward-rate, or --run with a run that used some"
        )
    read = bytes_read(work, size.samples * size.image_bytes, kind.random_access)
    written = _written(work, rates, like)
    files, asked = _files(work), _requests(work, kind.random_access, read)
    stages = tuple(
        StagePlan(
            stage,
            effort.gpu / 3600,
            effort.cpu / 3600,
            _seconds(effort, machine, stage) / 3600,
            asked[stage],
            read.get(stage, 0),
            files[stage],
        )
        for stage, effort in stated.items()
    )
    driver = START_MB * 1e6 + work.fragments * rates.driver_bytes
    ledger = LEDGER_BYTES + LEDGER_CLASS * work.classes
    return Plan(
        samples=size.samples,
        measured=work.seed,
        audit=work.audit,
        files=work.listed,
        source_bytes=round(size.samples * size.image_bytes),
        format=format,
        fragments=work.fragments,
        gpus=gpus,
        cpus=cpus,
        stages=stages,
        written=written,
        written_files=sum(files.values()),
        index_bytes=written["index"],
        ledger_bytes=ledger,
        driver_bytes=round(driver),
        dollars=_dollars(stages, sum(written.values()), prices or Prices()),
        bounds=_bounds(work, rates, driver / 1e9, {stage.stage: stage for stage in stages}),
        rates=rates,
        notes=tuple(notes),
    )


def plan_of_options(
    config: Config,
    *,
    samples: int,
    gpus: float = 0,
    cpus: float | None = None,
    image_bytes: float = 110_000,
    images_per_file: int | None = None,
    classes: int = 1000,
    rates: str | None = None,
    decode_rate: float | None = None,
    forward_rate: float | None = None,
    like: str | None = None,
    **prices: float | None,
) -> Plan:
    """`plan` from the options of the command line; prices as `gpu_price`, .... Raises what `plan` does."""
    if image_bytes < 1 or classes < 1:
        raise ConfigError("image-bytes and classes: at least 1")
    found = read_rates(rates) if rates is not None else Rates()
    if decode_rate is not None:
        found = found.changed({"decode": {config.proxy.image_size: decode_rate}}, "--decode-rate")
    if forward_rate is not None:
        forward = constants.macs(config.proxy.model, config.proxy.image_size)
        found = found.changed({"gpu_macs": forward_rate * forward}, "--forward-rate")
    return plan(
        config,
        Size(samples, image_bytes, images_per_file, classes),
        gpus=gpus,
        cpus=cpus,
        rates=found,
        prices=Prices(**{name.removesuffix("_price"): price for name, price in prices.items()}),
        like=like,
    )


def _work(config: Config, size: Size, rates: Rates, format: str) -> Work:
    kind = source_class(format)
    small = kind.scan_reads == "nothing"
    a_file = (1 if small else 1000) if size.file_samples is None else size.file_samples
    if a_file < 1:
        raise ConfigError(f"images per file: {a_file} is not allowed: at least 1")
    listed = math.ceil(size.samples / a_file)
    limit = config.source.fragment_samples
    fragments = math.ceil(size.samples / limit) if small else listed * math.ceil(a_file / limit)
    seed = round(size.samples * config.seed.fraction)
    audit = config.seed.audit_samples(size.samples) if config.measure.at_checkpoints else 0
    return Work(
        config,
        size.samples,
        listed,
        size.samples * size.image_bytes,
        kind.scan_reads,
        fragments,
        size.classes,
        seed,
        min(audit, size.samples - seed),
        rates.decode_seconds(config.proxy.image_size),
    )


def _seconds(effort: Effort, machine: Machine, stage: str) -> float:
    """Of the clock, where every machine is busy as far as the work can be shared."""
    cpu = effort.cpu / max(1.0, min(machine.cpus, effort.shared_by))
    gpu = effort.gpu / max(1.0, min(machine.gpus, effort.shared_by)) if effort.gpu else 0.0
    return constants.START_SECONDS[stage] + max(cpu, gpu)


def _shards(work: Work) -> int:
    return math.ceil(work.seed / SEED_SHARD_SAMPLES)


def _files(work: Work) -> dict[str, int]:
    """Files that each stage writes."""
    config, shards = work.config, _shards(work)
    count, parts, epochs = (
        len(config.proxy.checkpoint_epochs()),
        config.proxy.parts,
        config.proxy.epochs,
    )
    trajectory = 0 if config.proxy.trajectory == "none" else epochs * config.proxy.workers
    moso = "moso" in config.measure.scores
    return {
        "index": math.ceil(work.fragments / INDEX_FILE_FRAGMENTS) + 1,
        "seed": 2 * shards + 1,
        "proxy": parts * (count + epochs + trajectory + 1),
        "measure": shards * (1 + bool(work.audit))
        + parts * count * (moso + config.measure.recalibrate)
        + shards * count,
        "embed": work.fragments,
        "extrapolate": work.fragments + 8,
        "select": len(config.select.keep),
        "report": 2,
    }


def _requests(work: Work, singly: bool, read: Mapping[str, int]) -> dict[str, int]:
    """Requests to storage of each stage: listings by page, small files one by one, large ones block by block, and what is written.

    A footer of Parquet is two requests (size, footer); the end of embed and of extrapolate looks at those of every output.
    """
    config, shards, fragments = work.config, _shards(work), work.fragments
    count, files = len(config.proxy.checkpoint_epochs()), _files(work)
    pages = {
        name: math.ceil(number / PAGE)
        for name, number in (("source", work.listed), ("outputs", 2 * fragments))
    }
    scan = {
        "nothing": 0,
        "part": 3 * work.listed,
        "all": work.listed + math.ceil(read["index"] / BLOCK),
    }[work.scan_reads]
    whole = work.samples if singly else fragments + math.ceil(read["embed"] / BLOCK)
    drawn = work.seed + work.audit if singly else whole
    strategy = STRATEGIES[config.select.strategy]
    passes = 2 if work.samples * SELECT_ROW <= CACHE_BYTES else SELECT_PASSES
    passes *= 1 + 3 * (
        strategy.needs_loss or strategy.uses_difficulty
    )  # size, footer and column of the losses
    return {
        "index": pages["source"] + scan + files["index"],
        "seed": fragments + drawn + 2 * 2 * shards + files["seed"],
        "proxy": shards * config.proxy.workers * config.proxy.parts + files["proxy"],
        "measure": count * shards * (2 if "moso" in config.measure.scores else 1)
        + files["measure"],
        "embed": pages["outputs"] + fragments + whole + 2 * fragments + files["embed"],
        "extrapolate": pages["outputs"]
        + 3 * fragments
        + fragments
        + 2 * 2 * fragments
        + files["extrapolate"],
        "select": passes * fragments + files["select"],
        "report": fragments + files["report"],
    }


def _written(work: Work, rates: Rates, like: str | None) -> dict[str, int]:
    """Bytes by folder of the run; with a run to go by, those folders that grow with the samples as they weigh there."""
    small = work.scan_reads == "nothing"
    found = {
        "index": round(work.fragments * rates.index_bytes + small * work.samples * NAME_BYTES),
        **bytes_written(work),
    }
    if like is None:
        return found
    run = Run(like)
    records = run.ledger()
    for folder, stage, samples in (
        ("seed", "seed", work.seed),
        ("embeddings", "embed", work.samples),
        ("scores", "extrapolate", work.samples),
    ):
        if stage in records and records[stage].state == "done" and records[stage].samples:
            weight = sum(file.size for file in storage.walk(run.path(folder)))
            found[folder] = round(weight * samples / records[stage].samples)
    return found


def _dollars(stages: tuple[StagePlan, ...], stored: int, prices: Prices) -> dict[str, float]:
    """By what has a price; storage for a month."""
    amounts = {
        "gpu": sum(stage.gpu_hours for stage in stages),
        "cpu": sum(stage.cpu_hours for stage in stages),
        "request": sum(stage.requests for stage in stages) / 1e6,
        "storage": stored / 1e9,
    }
    given = {name: getattr(prices, name) for name in amounts}
    for name, price in given.items():
        if price is not None and not 0 <= price < math.inf:
            raise ConfigError(f"--{name}-price: {price:g} is not allowed: 0 or more")
    return {name: amounts[name] * price for name, price in given.items() if price is not None}


def _bounds(
    work: Work, rates: Rates, driver: float, stages: Mapping[str, StagePlan]
) -> tuple[Bound, ...]:
    """What has a limit, the tightest first."""
    config, model = work.config, work.config.proxy.model
    scored = 4.0 * constants.width(model) * work.seed / 1e9
    fit = (
        constants.fit_seconds(config.extrapolate.method, work.seed, work.samples, None, model)
        / 3600
    )
    decision, listing = (
        work.fragments * rates.decision_seconds,
        work.listed * rates.list_seconds / 60,
    )
    training, alone = stages["proxy"].hours, stages["select"].hours + stages["report"].hours

    def fewer(figure: float, limit: float) -> str:
        return f"seed.fraction {_rounded_down(config.seed.fraction * min(1.0, limit / max(figure, 1e-9)))}"

    start = START_MB / 1e3
    times = math.ceil(max((driver - start) / (DRIVER_GB - start), decision / DECISION_SECONDS))
    larger = f"larger files, and source.fragment_samples {config.source.fragment_samples * times}"
    of_proxy = f"proxy.workers, fewer proxy.epochs, or {fewer(training, TRAINING_HOURS)}"
    of_fit = f"extrapolate.method knn, or {fewer(fit, FIT_HOURS)}"
    bounds = [
        Bound(
            "memory of a worker: measured samples",
            scored,
            WORKER_GB,
            "GB",
            fewer(scored, WORKER_GB),
        ),
        Bound("memory of the driver: fragments", driver, DRIVER_GB, "GB", larger),
        Bound("decision of a resumed run: fragments", decision, DECISION_SECONDS, "s", larger),
        Bound(
            "listing of the source: files",
            listing,
            LISTING_MINUTES,
            "min",
            "tars or Parquet in place of images, larger files",
        ),
        Bound("training of the proxy", training, TRAINING_HOURS, "h", of_proxy),
        Bound("one fit of the extrapolator, one process", fit, FIT_HOURS, "h", of_fit),
        Bound(
            "embedding of the source",
            stages["embed"].hours,
            EMBED_HOURS,
            "h",
            "more GPUs or CPUs, a smaller proxy",
        ),
        Bound(
            "keep-lists and report, one process",
            alone,
            ALONE_HOURS,
            "h",
            "a run for each part of the source (source.include)",
        ),
    ]
    return tuple(sorted(bounds, key=lambda bound: -bound.share))


def _rounded_down(fraction: float) -> str:
    """To one digit, so that it is enough."""
    digits = -math.floor(math.log10(fraction)) if fraction < 1 else 0
    return f"{math.floor(fraction * 10**digits) / 10**digits:g}"
