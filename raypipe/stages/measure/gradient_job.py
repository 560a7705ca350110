"""What the passes over the proxy's checkpoints work on, and the folders that they write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from raypipe.config import AdversarySettings, Config
from raypipe.distributed.actor_pool import WorkerContext
from raypipe.distributed.context import Context
from raypipe.runs.checkpoints import load_checkpoint
from raypipe.runs.ledger import fingerprint
from raypipe.runs.manifests import Checkpoint
from raypipe.runs.partition import SeedPart, proxy_parts
from raypipe.runs.run import Run
from raypipe.runs.seed_shards import shard_labels

if TYPE_CHECKING:
    from torch import Tensor

    from raypipe.proxies.networks import ProxyNet


@dataclass(frozen=True)
class GradientFolders:
    """Folders that the passes write, below the run. Their names end in a hash of the settings.

    Attributes
    ----------
    calibrated : str
        Checkpoints with recalibrated BatchNorm.
    gradients : str
        Mean gradients.
    checkpoints : str
        Per-sample values at the checkpoints.
    """

    calibrated: str
    gradients: str
    checkpoints: str

    @classmethod
    def of(cls, config: Config, run: Run) -> GradientFolders:
        """Return the folders that all proxies share."""
        measure = config.measure
        mean = fingerprint(
            run.ledger()["proxy"].fingerprint,
            measure.moso.gradient,
            measure.recalibrates,
            measure.precision,
        )
        values = fingerprint(
            mean,
            sorted(measure.at_checkpoints),
            needs_self_term(config, proxy_parts(run)),
            measure.grand.gradient,
            *(["cross-fit"] if config.proxy.cross_fits else []),
            *([] if measure.gradient_scores else [_epochs_used(config)]),
        )
        return cls(
            f"measured/calibrated-{mean}",
            f"measured/gradients-{mean}",
            f"measured/checkpoints-{values}",
        )

    def of_part(self, part: SeedPart) -> GradientFolders:
        """Return the folders of one proxy: below these when there are several proxies."""
        return GradientFolders(*(part.below(folder) for folder in vars(self).values()))


@dataclass(frozen=True)
class GradientJob:
    """The passes over the checkpoints of one proxy.

    Attributes
    ----------
    worker : WorkerContext
        The run, and the threads and GPU of each worker.
    folders : GradientFolders
        Folders of the proxy.
    part : SeedPart
        The trained proxy, with its part of the seed set.
    self_term : bool
        Whether MoSo takes the sample itself out of the mean gradient.
    """

    worker: WorkerContext
    folders: GradientFolders
    part: SeedPart
    self_term: bool

    @classmethod
    def of(cls, context: Context, part: SeedPart, self_term: bool) -> GradientJob:
        """Return the job of one part for the workers of the stage `measure`."""
        config = context.config
        worker = WorkerContext.of(context, context.cluster.pool(config.measure))
        folders = GradientFolders.of(config, context.run).of_part(part)
        return cls(worker, folders, part, self_term)

    @property
    def config(self) -> Config:
        """The configuration of the run."""
        return self.worker.config

    @property
    def run(self) -> Run:
        """The run."""
        return self.worker.run

    @property
    def device(self) -> str:
        """The torch device of a worker."""
        return self.worker.device

    @property
    def measured_rows(self) -> Callable[[Sequence[str]], np.ndarray]:
        """Rule from ids to the rows that this proxy measures.

        They are those of its own part, or with cross-fitting those of all other parts.
        """
        return self.part.other_rows if self.config.proxy.cross_fits else self.part.rows

    def read_measured(self, shard: str) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Read the samples of a seed or audit shard that this proxy measures.

        Returns ids, images and labels, as `SeedPart.read` does.
        """
        cross_fits = self.config.proxy.cross_fits
        read = self.part.read_others if cross_fits else self.part.read
        return read(self.run, shard)

    def count_measured(self, shard: str) -> int:
        """Count the samples of a seed or audit shard that this proxy measures."""
        ids = shard_labels(self.run, shard)["sample_id"].to_pylist()
        return len(self.measured_rows(ids))

    @property
    def images_at_once(self) -> int:
        """Images of a batch."""
        size = self.config.proxy.image_size
        return self.config.measure.images_at_once(self.worker.gpu, size)

    def load_checkpoint(self, file: str) -> ProxyNet:
        """Load a checkpoint with the BatchNorm statistics and memory layout of the settings."""
        import torch

        measure = self.config.measure
        folder = self.folders.calibrated if measure.recalibrates else self.part.checkpoints
        model: ProxyNet = load_checkpoint(self.run, file, self.device, folder=folder)
        if measure.channels_last:
            return model
        return model.to(memory_format=torch.contiguous_format)


def measured_checkpoints(config: Config, part: SeedPart) -> list[Checkpoint]:
    """Return the checkpoints of a part's proxy that any score is measured at, in order."""
    return [item for item in part.trained.checkpoints if config.measure.uses_epoch(item.epoch)]


def _epochs_used(config: Config) -> list[int]:
    return [epoch for epoch in config.proxy.checkpoint_epochs() if config.measure.uses_epoch(epoch)]


def smallest_part(parts: Sequence[SeedPart]) -> int:
    """Return the number of samples of the smallest part."""
    return min(part.samples for part in parts)


def needs_self_term(config: Config, parts: Sequence[SeedPart]) -> bool:
    """Return whether MoSo uses the self term.

    `self_term: auto` goes by the smallest part for all parts, so that their scores compare. With
    cross-fitting no sample is part of the mean gradient that it is aligned with.
    """
    if config.proxy.cross_fits:
        return False
    return config.measure.moso.uses_self_term(smallest_part(parts))


def attacked(
    model: ProxyNet | None, pixels: Tensor, target: Tensor, adversary: AdversarySettings | None
) -> Tensor:
    """Return the images at which a loss is taken.

    Without an adversary these are the images themselves; with one, the worst images that an attack
    on `model` finds near them. The attack starts at the images, so that the result depends neither
    on the order nor on the size of batches.
    """
    if adversary is None:
        return pixels
    from raypipe.vision.adversarial import attack

    assert model is not None
    return attack(model, pixels, target, adversary)
