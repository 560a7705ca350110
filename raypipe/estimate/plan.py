"""Plan a run over a source of some size, before the source exists.

    raypipe plan CONFIG --samples 1281167 --gpus 8

The plan has work, money, requests, files and bytes, and tells what breaks first. Processor and GPU
seconds are those of `raypipe.estimate.cost`, the estimate of `raypipe inspect`, at the rates of
`Rates`. Requests and files follow from what each stage reads and writes, counted below. It is a
plan, not a promise: slow storage, machines that wait for one another, and retries are not included.
No Ray, no torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raypipe import storage
from raypipe.config import Config
from raypipe.errors import ConfigError
from raypipe.estimate import rates as constants
from raypipe.estimate.cost import (
    Effort,
    Machine,
    Workload,
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
SELECT_PASSES = 12
"""How often `select` reads the score shards by its default strategy, if they exceed its memory."""
SELECT_ROW = 40
"""Bytes that a sample takes in the memory of `select`."""
LEDGER_BYTES = 12_000
"""Bytes of `run.json` for a run with few classes."""
LEDGER_CLASS = 1200
"""Bytes of `run.json` for each class: counts, intervals, neighbour search."""
NAME_BYTES = 24
"""Bytes of the index for the name of one small file among many, compressed."""
START_MB = 300
"""Memory of the driver before it holds any fragment: Ray and Arrow, imported and connected."""
CPUS_PER_GPU = 8
"""CPUs assumed for each GPU: those of a machine with one GPU."""
CPUS_WITHOUT_GPU = 16
"""CPUs assumed without GPUs."""
MAX_AMOUNT = 1e13
"""Largest number of samples, GPUs or CPUs that can be planned."""

# Practical limits: beyond these, something stops working or is not worth the wait; see `Bound`.
WORKER_GB = 2.0
"""Memory of a worker: what a CPU of the machines in cluster.yaml has."""
DRIVER_GB = 1.0
"""Memory of the driver."""
DECISION_SECONDS = 30.0
"""Processor seconds until a resumed run knows what is left to do."""
LISTING_MINUTES = 10.0
"""Processor minutes to list the source."""
TRAINING_HOURS = 48.0
"""Hours to train the proxy."""
FIT_HOURS = 6.0
"""Hours of one fit of the extrapolator, in one process."""
EMBED_HOURS = 168.0
"""Hours to embed the source."""
ALONE_HOURS = 6.0
"""Hours of the stages that are one process: keep-lists and report."""


@dataclass(frozen=True)
class Prices:
    """List prices in dollars; None if not given.

    Attributes
    ----------
    gpu, cpu
        Per hour.
    request
        Per million requests to storage.
    storage
        Per GB and month.
    """

    gpu: float | None = None
    cpu: float | None = None
    request: float | None = None
    storage: float | None = None


@dataclass(frozen=True)
class SourceSize:
    """A source that need not exist yet.

    Attributes
    ----------
    samples, classes
        Their numbers.
    image_bytes
        Mean size of an encoded image.
    file_samples
        Samples in a file; None for what is usual in the format.
    """

    samples: int
    image_bytes: float = 110_000.0
    file_samples: int | None = None
    classes: int = 1000


@dataclass(frozen=True)
class StagePlan:
    """The plan of one stage.

    Attributes
    ----------
    stage
        Its name.
    gpu_hours, cpu_hours
        Its work.
    hours
        Its duration on the clock.
    requests
        Requests to storage.
    bytes_read
        Bytes of the source that it reads.
    files
        Files that it writes.
    """

    stage: str
    gpu_hours: float
    cpu_hours: float
    hours: float
    requests: int
    bytes_read: int
    files: int


@dataclass(frozen=True)
class Bound:
    """A practical limit, and how close the run comes to it.

    Attributes
    ----------
    what
        A description.
    figure, limit
        In `unit`.
    remedy
        What helps if `figure` exceeds `limit`.
    """

    what: str
    figure: float
    limit: float
    unit: str
    remedy: str

    @property
    def share(self) -> float:
        """`figure` as a share of the limit; above 1 it is exceeded."""
        return self.figure / self.limit


@dataclass(frozen=True)
class RunPlan:
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
        """Return the sum of a figure over all stages."""
        return sum(getattr(stage, name) for stage in self.stages)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON can hold it."""
        result = dataclasses.asdict(self)
        for bound, item in zip(self.bounds, result["bounds"], strict=True):
            item["share"] = bound.share
        names = ("gpu_hours", "cpu_hours", "hours", "requests", "bytes_read", "files")
        return result | {"total": {name: self.total(name) for name in names}}


def plan(
    config: Config,
    size: SourceSize,
    *,
    gpus: float = 0,
    cpus: float | None = None,
    rates: Rates | None = None,
    prices: Prices | None = None,
    like: str | None = None,
) -> RunPlan:
    """Plan a run over a source of some size, whatever `source.uri` and `source.limit` say.

    Parameters
    ----------
    config
        The settings of the run.
    size
        The size of the source.
    gpus, cpus
        Of the cluster; default: CPUS_PER_GPU for each GPU, CPUS_WITHOUT_GPU without.
    rates, prices
        Rates of the machines, and list prices.
    like
        A finished run: its ledger tells what stages take, its folders how large their files are.

    Raises
    ------
    ConfigError
        If something cannot be planned.
    RunError
        If `like` is not a run.
    """
    check_scores(config)
    _check_amounts(size.samples, gpus, cpus)
    rates = rates or Rates()
    cpus = cpus if cpus is not None else (CPUS_PER_GPU * gpus or CPUS_WITHOUT_GPU)
    machine = Machine(cpus, gpus, "the cluster", rates.cpu_macs, rates.gpu_macs)
    format = "webdataset" if config.source.format == "auto" else config.source.format
    random_access = source_class(format).random_access
    work = _workload(config, size, rates, format)
    by_rates = efforts(work, machine)
    scaled = scaled_efforts(work, by_rates, machine, like) if like is not None else {}
    read = bytes_read(work, size.samples * size.image_bytes, random_access)
    written, files = _written(work, rates, like), _files(work)
    requests = _requests(work, random_access, read, files)
    stages = tuple(
        StagePlan(
            stage,
            gpu_hours=effort.gpu / 3600,
            cpu_hours=effort.cpu / 3600,
            hours=(constants.START_SECONDS[stage] + effort.wall_seconds(machine)) / 3600,
            requests=requests[stage],
            bytes_read=read.get(stage, 0),
            files=files[stage],
        )
        for stage, effort in (by_rates | scaled).items()
    )
    driver_bytes = START_MB * 1e6 + work.fragments * rates.driver_bytes
    return RunPlan(
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
        written_files=sum(stage.files for stage in stages),
        index_bytes=written["index"],
        ledger_bytes=LEDGER_BYTES + LEDGER_CLASS * work.classes,
        driver_bytes=round(driver_bytes),
        dollars=_dollars(stages, sum(written.values()), prices or Prices()),
        bounds=_bounds(work, rates, driver_bytes / 1e9, {stage.stage: stage for stage in stages}),
        rates=rates,
        notes=tuple(_notes(config, rates, gpus, like, by_rates, scaled)),
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
) -> RunPlan:
    """Plan a run from the options of the command line.

    Parameters
    ----------
    config
        The settings of the run.
    samples, image_bytes, images_per_file, classes
        The size of the source; see `SourceSize`.
    gpus, cpus, like
        As in `plan`.
    rates
        Path or URI of a JSON file with rates.
    decode_rate
        Images that a CPU decodes in a second.
    forward_rate
        Images that go through the proxy on one GPU in a second.
    **prices
        `gpu_price`, `cpu_price`, `request_price`, `storage_price`; see `Prices`.

    Raises
    ------
    ConfigError
        If something cannot be planned.
    RunError
        If `like` is not a run.
    """
    if image_bytes < 1 or classes < 1:
        raise ConfigError("image-bytes and classes: at least 1")
    known = read_rates(rates) if rates is not None else Rates()
    if decode_rate is not None:
        known = known.changed({"decode": {config.proxy.image_size: decode_rate}}, "--decode-rate")
    if forward_rate is not None:
        forward = constants.macs(config.proxy.model, config.proxy.image_size)
        known = known.changed({"gpu_macs": forward_rate * forward}, "--forward-rate")
    return plan(
        config,
        SourceSize(samples, image_bytes, images_per_file, classes),
        gpus=gpus,
        cpus=cpus,
        rates=known,
        prices=Prices(**{name.removesuffix("_price"): price for name, price in prices.items()}),
        like=like,
    )


def _check_amounts(samples: int, gpus: float, cpus: float | None) -> None:
    for name, value, smallest in (
        ("samples", samples, 1),
        ("gpus", gpus, 0),
        ("cpus", 1 if cpus is None else cpus, 1),
    ):
        if not smallest <= value <= MAX_AMOUNT:
            raise ConfigError(f"{name}: {value:g} is not allowed: at least {smallest}")


def _notes(
    config: Config,
    rates: Rates,
    gpus: float,
    like: str | None,
    by_rates: Mapping[str, Effort],
    scaled: Mapping[str, Effort],
) -> list[str]:
    """Return sentences on what the plan assumes."""
    notes = []
    if config.source.format == "auto":
        notes.append("source.format is auto: planned as webdataset")
    if like is not None:
        rest = [stage for stage in by_rates if stage not in scaled]
        notes.append(
            f"scaled from the ledger of {like}: {', '.join(scaled) or 'nothing'}; "
            f"by rates: {', '.join(rest)}"
        )
    if gpus and "assumed" in rates.sources["gpu_macs"]:
        notes.append(
            "GPU hours are for an assumed GPU: give --forward-rate, or --run with a run that used "
            "GPUs"
        )
    return notes


def _workload(config: Config, size: SourceSize, rates: Rates, format: str) -> Workload:
    scan_reads = source_class(format).scan_reads
    small_files = scan_reads == "nothing"
    file_samples = (1 if small_files else 1000) if size.file_samples is None else size.file_samples
    if file_samples < 1:
        raise ConfigError(f"images per file: {file_samples} is not allowed: at least 1")
    files = math.ceil(size.samples / file_samples)
    limit = config.source.fragment_samples
    seed = round(size.samples * config.seed.fraction)
    audit = config.seed.audit_samples(size.samples) if config.measure.at_checkpoints else 0
    return Workload(
        config=config,
        samples=size.samples,
        listed=files,
        listed_bytes=size.samples * size.image_bytes,
        scan_reads=scan_reads,
        fragments=(
            math.ceil(size.samples / limit)
            if small_files
            else files * math.ceil(file_samples / limit)
        ),
        classes=size.classes,
        seed=seed,
        audit=min(audit, size.samples - seed),
        decode_seconds=rates.decode_seconds(config.proxy.image_size),
    )


# -- files, requests, bytes ----------------------------------------------------------------------


def _shards(work: Workload) -> int:
    """Return the number of seed shards."""
    return math.ceil(work.seed / SEED_SHARD_SAMPLES)


def _proxy_files(work: Workload, parts: int) -> int:
    """Return the files of a training of the proxy: checkpoints, epochs, trajectory, manifest."""
    proxy = work.config.proxy
    trajectory = 0 if proxy.trajectory == "none" else proxy.epochs * proxy.workers
    return parts * (len(proxy.checkpoint_epochs()) + proxy.epochs + trajectory + 1)


def _files(work: Workload) -> dict[str, int]:
    """Return the number of files that each stage writes."""
    config, shards = work.config, _shards(work)
    count, parts = len(config.proxy.checkpoint_epochs()), config.proxy.parts
    mean_gradients = "moso" in config.measure.scores
    return {
        "index": math.ceil(work.fragments / INDEX_FILE_FRAGMENTS) + 1,
        "seed": 2 * shards + 1,
        # pseudo-labels: the labels of each shard; clusters, network, manifest, classes
        "label": shards * (1 + bool(work.audit)) + 4,
        "proxy": _proxy_files(work, parts),
        "measure": shards * (1 + bool(work.audit))
        + parts * count * (mean_gradients + config.measure.recalibrate)
        + shards * count,
        # images, scores and embeddings of each shard; the second proxy; manifest and classes
        "rehearse": 3 * shards + _proxy_files(work, parts) + 2,
        "embed": work.fragments,
        "extrapolate": work.fragments + 8,
        "select": len(config.select.keep),
        "report": 2,
    }


def _requests(
    work: Workload, random_access: bool, read: Mapping[str, int], files: Mapping[str, int]
) -> dict[str, int]:
    """Return the requests to storage of each stage.

    Listings count by page, small files one by one, large ones block by block, and every file that
    is written counts. A Parquet footer is two requests (size, footer); at their end, embed and
    extrapolate read the footer of every output.
    """
    config, shards, fragments = work.config, _shards(work), work.fragments
    count = len(config.proxy.checkpoint_epochs())
    workers = config.proxy.workers * config.proxy.parts
    source_pages = math.ceil(work.listed / PAGE)
    output_pages = math.ceil(2 * fragments / PAGE)
    scan = {
        "nothing": 0,
        "part": 3 * work.listed,
        "all": work.listed + math.ceil(read["index"] / BLOCK),
    }[work.scan_reads]
    whole = work.samples if random_access else fragments + math.ceil(read["embed"] / BLOCK)
    drawn = work.seed + work.audit if random_access else whole
    shard_footers, output_footers = 2 * 2 * shards, 2 * fragments
    reads = {
        "index": source_pages + scan,
        "seed": fragments + drawn + shard_footers,
        "label": shards * (1 + bool(work.audit)),
        "proxy": shards * workers,
        "measure": count * shards * (2 if "moso" in config.measure.scores else 1),
        "rehearse": 2 * shards + shards * workers,
        "embed": output_pages + fragments + whole + output_footers,
        "extrapolate": output_pages + 3 * fragments + fragments + 2 * output_footers,
        "select": _select_passes(work) * fragments,
        "report": fragments,
    }
    return {stage: number + files[stage] for stage, number in reads.items()}


def _select_passes(work: Workload) -> int:
    """Return how often `select` reads the score shards."""
    strategy = STRATEGIES[work.config.select.strategy]
    passes = 2 if work.samples * SELECT_ROW <= CACHE_BYTES else SELECT_PASSES
    # losses are a column of other files: size, footer and column
    return passes * (1 + 3 * (strategy.needs_loss or strategy.uses_difficulty))


def _written(work: Workload, rates: Rates, like: str | None) -> dict[str, int]:
    """Return the bytes of each folder of the run.

    Folders that grow with the samples are scaled from those of the run `like`.
    """
    small_files = work.scan_reads == "nothing"
    index = work.fragments * rates.index_bytes + small_files * work.samples * NAME_BYTES
    written = {"index": round(index), **bytes_written(work)}
    if like is None:
        return written
    run = Run(like)
    records = run.ledger()
    for folder, stage, samples in (
        ("seed", "seed", work.seed),
        ("embeddings", "embed", work.samples),
        ("scores", "extrapolate", work.samples),
    ):
        if stage in records and records[stage].state == "done" and records[stage].samples:
            folder_bytes = sum(file.size for file in storage.walk(run.path(folder)))
            written[folder] = round(folder_bytes * samples / records[stage].samples)
    return written


def _dollars(stages: Sequence[StagePlan], stored: int, prices: Prices) -> dict[str, float]:
    """Return the dollars for everything that has a price; storage for a month."""
    amounts = {
        "gpu": sum(stage.gpu_hours for stage in stages),
        "cpu": sum(stage.cpu_hours for stage in stages),
        "request": sum(stage.requests for stage in stages) / 1e6,
        "storage": stored / 1e9,
    }
    by_name = {name: getattr(prices, name) for name in amounts}
    for name, price in by_name.items():
        if price is not None and not 0 <= price < math.inf:
            raise ConfigError(f"--{name}-price: {price:g} is not allowed: 0 or more")
    return {name: amounts[name] * price for name, price in by_name.items() if price is not None}


# -- bounds --------------------------------------------------------------------------------------


def _bounds(
    work: Workload, rates: Rates, driver_gb: float, stages: Mapping[str, StagePlan]
) -> tuple[Bound, ...]:
    """Return the practical limits, the tightest first."""
    bounds = [*_seed_set_bounds(work, stages), *_fragment_bounds(work, rates, driver_gb)]
    bounds += [
        Bound(
            "listing of the source: files",
            work.listed * rates.list_seconds / 60,
            LISTING_MINUTES,
            "min",
            "tars or Parquet files instead of single images, larger files",
        ),
        Bound(
            "embedding of the source",
            stages["embed"].hours,
            EMBED_HOURS,
            "h",
            "more GPUs or CPUs, a smaller proxy",
        ),
        Bound(
            "keep-lists and report, one process",
            stages["select"].hours + stages["report"].hours,
            ALONE_HOURS,
            "h",
            "a run for each part of the source (source.include)",
        ),
    ]
    return tuple(sorted(bounds, key=lambda bound: -bound.share))


def _seed_set_bounds(work: Workload, stages: Mapping[str, StagePlan]) -> list[Bound]:
    """Return the limits of the number of measured samples."""
    config, model = work.config, work.config.proxy.model
    method = config.extrapolate.method
    worker_gb = 4.0 * constants.width(model) * work.seed / 1e9
    training = stages["proxy"].hours
    fit = constants.fit_seconds(method, work.seed, work.samples, None, model) / 3600

    def smaller_seed_set(figure: float, limit: float) -> str:
        fraction = config.seed.fraction * min(1.0, limit / max(figure, 1e-9))
        return f"seed.fraction {_rounded_down(fraction)}"

    return [
        Bound(
            "memory of a worker: measured samples",
            worker_gb,
            WORKER_GB,
            "GB",
            smaller_seed_set(worker_gb, WORKER_GB),
        ),
        Bound(
            "training of the proxy",
            training,
            TRAINING_HOURS,
            "h",
            f"proxy.workers, fewer proxy.epochs, or {smaller_seed_set(training, TRAINING_HOURS)}",
        ),
        Bound(
            "one fit of the extrapolator, one process",
            fit,
            FIT_HOURS,
            "h",
            f"extrapolate.method knn, or {smaller_seed_set(fit, FIT_HOURS)}",
        ),
    ]


def _fragment_bounds(work: Workload, rates: Rates, driver_gb: float) -> list[Bound]:
    """Return the limits of the number of fragments."""
    decision, start_gb = work.fragments * rates.decision_seconds, START_MB / 1e3
    times = math.ceil(
        max((driver_gb - start_gb) / (DRIVER_GB - start_gb), decision / DECISION_SECONDS)
    )
    fragment_samples = work.config.source.fragment_samples * times
    remedy = f"larger files, and source.fragment_samples {fragment_samples}"
    return [
        Bound("memory of the driver: fragments", driver_gb, DRIVER_GB, "GB", remedy),
        Bound("start of a resumed run: fragments", decision, DECISION_SECONDS, "s", remedy),
    ]


def _rounded_down(fraction: float) -> str:
    """Round to one digit, down, so that the remedy suffices."""
    digits = -math.floor(math.log10(fraction)) if fraction < 1 else 0
    return f"{math.floor(fraction * 10**digits) / 10**digits:g}"
