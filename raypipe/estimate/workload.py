"""The size of a run, the machine it runs on, and the work of a stage."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from glob import glob

from raypipe.config import Config
from raypipe.estimate import rates
from raypipe.estimate.facts import Survey
from raypipe.estimate.feature_cost import FeatureCost, feature_cost
from raypipe.runs.ledger import StageRecord
from raypipe.runs.run import Run
from raypipe.runs.sizes import SEED_SHARD_SAMPLES
from raypipe.text import plural
from raypipe.vision import network_costs


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
        Multiply-adds per second of a CPU core and of a GPU; see `raypipe.vision.network_costs` and
        `raypipe.estimate.rates`.
    """

    cpus: float
    gpus: float
    where: str
    cpu_macs: float = network_costs.CPU_MACS
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
            config=config.for_seed_set(seed),
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
            config=run.config().for_seed_set(seed.samples),
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
    def extremes(self) -> int:
        """Samples with extreme predictions that are measured in addition, about."""
        return min(self.config.extreme_samples(self.samples), self.samples - self.seed - self.audit)

    @property
    def forward_macs(self) -> float:
        """Multiply-adds of a forward pass of the proxy."""
        return network_costs.macs(self.config.proxy.model, self.config.proxy.image_size)

    @property
    def proxy_width(self) -> int:
        """Length of an embedding by one proxy."""
        return rates.width(self.config.proxy.model, self.config.proxy.image_size)

    @property
    def embedding_width(self) -> int:
        """Length of a stored embedding, without that of a table (`embed.from`)."""
        by_proxy = self.proxy_width if self.config.embed.uses_proxy else 0
        return by_proxy + (self.features.width if self.features else 0)

    @property
    def embedding_values(self) -> int:
        """Length of the embeddings that an extrapolator sees side by side, without a table's."""
        others = self.config.proxy.repeats - 1 if self.config.embed.uses_proxy else 0
        return self.embedding_width + others * self.proxy_width

    @cached_property
    def features(self) -> FeatureCost | None:
        """The network of `embed.model`; None without one."""
        return feature_cost(self.config)

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
