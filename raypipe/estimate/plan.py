"""Plan a run over a source of some size, before the source exists.

    raypipe plan CONFIG --samples 1281167 --gpus 8

The plan has work, money, requests, files and bytes, and tells what breaks first. Processor and GPU
seconds are those of `raypipe.estimate.cost`, the estimate of `raypipe inspect`, at the rates of
`Rates`. Requests and files follow from what each stage reads and writes. It is a plan, not a
promise: slow storage, machines that wait for one another, and retries are not included.
No Ray, no torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from raypipe.config import Config
from raypipe.config.source import OwnFormat
from raypipe.errors import ConfigError
from raypipe.estimate import rates as constants
from raypipe.estimate.cost import scaled_efforts
from raypipe.estimate.efforts import efforts
from raypipe.estimate.plan_bounds import START_MB, Bound, bounds_of
from raypipe.estimate.plan_rates import Rates, read_rates
from raypipe.estimate.plan_storage import files_written, planned_bytes, requests_of
from raypipe.estimate.seed_size import small_seed_set
from raypipe.estimate.volumes import bytes_read
from raypipe.estimate.workload import Effort, Machine, Workload
from raypipe.scores.registry import check_scores
from raypipe.sources import source_class
from raypipe.vision import network_costs

LEDGER_BYTES = 12_000
"""Bytes of `run.json` for a run with few classes."""
LEDGER_CLASS = 1200
"""Bytes of `run.json` for each class: counts, intervals, neighbour search."""
CPUS_PER_GPU = 8
"""CPUs assumed for each GPU: those of a machine with one GPU."""
CPUS_WITHOUT_GPU = 16
"""CPUs assumed without GPUs."""
MAX_AMOUNT = 1e13
"""Largest number of samples, GPUs or CPUs that can be planned."""


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
class RunPlan:
    """Everything that `raypipe plan` shows; sizes in bytes, bounds with the tightest first."""

    samples: int
    measured: int
    audit: int
    extremes: int
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
    format = _planned_format(config)
    random_access = source_class(format).random_access
    work = _workload(config, size, rates, format)
    by_rates = efforts(work, machine)
    scaled = scaled_efforts(work, by_rates, machine, like) if like is not None else {}
    read = bytes_read(work, size.samples * size.image_bytes, random_access)
    written, files = planned_bytes(work, rates, like), files_written(work)
    requests = requests_of(work, random_access, read, files)
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
        extremes=work.extremes,
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
        bounds=bounds_of(
            work, rates, driver_bytes / 1e9, {stage.stage: stage.hours for stage in stages}
        ),
        rates=rates,
        notes=tuple(_notes(work, rates, gpus, like, by_rates, scaled)),
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
    if not 1 <= image_bytes <= MAX_AMOUNT or not 1 <= classes <= MAX_AMOUNT:
        raise ConfigError(f"image-bytes and classes: give at least 1, at most {MAX_AMOUNT:g}")
    known = read_rates(rates) if rates is not None else Rates()
    if decode_rate is not None:
        known = known.changed({"decode": {config.proxy.image_size: decode_rate}}, "--decode-rate")
    if forward_rate is not None:
        forward = network_costs.macs(config.proxy.model, config.proxy.image_size)
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
            limit = f"at most {MAX_AMOUNT:g}" if value > MAX_AMOUNT else f"at least {smallest}"
            raise ConfigError(f"{name}: {value:g} is not allowed: give {limit}")


def _notes(
    work: Workload,
    rates: Rates,
    gpus: float,
    like: str | None,
    by_rates: Mapping[str, Effort],
    scaled: Mapping[str, Effort],
) -> list[str]:
    """Return sentences on what the plan assumes."""
    foreseen = (small_seed_set(work), work.config.proxy.too_few_steps(work.seed))
    notes = [sentence for sentence in foreseen if sentence]
    if (stated := work.config.source.format) != _planned_format(work.config):
        notes.append(f"source.format is {stated}: planned as webdataset")
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


def _planned_format(config: Config) -> str:
    """Return `source.format`, or webdataset for auto and for a source from outside raypipe."""
    own = set(get_args(OwnFormat)) - {"auto"}
    return config.source.format if config.source.format in own else "webdataset"


def _workload(config: Config, size: SourceSize, rates: Rates, format: str) -> Workload:
    scan_reads = source_class(format).scan_reads
    small_files = scan_reads == "nothing"
    file_samples = (1 if small_files else 1000) if size.file_samples is None else size.file_samples
    if file_samples < 1:
        raise ConfigError(f"images per file: {file_samples} is not allowed: give at least 1")
    files = math.ceil(size.samples / file_samples)
    limit = config.source.fragment_samples
    seed = round(size.samples * config.seed.fraction)
    audit = config.seed.audit_samples(size.samples) if config.measure.at_checkpoints else 0
    return Workload(
        config=config.for_seed_set(seed),
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
            raise ConfigError(f"--{name}-price: {price:g} is not allowed: give 0 or more")
    return {name: amounts[name] * price for name, price in by_name.items() if price is not None}
