"""What the passes over the proxy's checkpoints work on, and the folders that they write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raypipe.config import AdversarySettings, Config
from raypipe.distributed.actor_pool import WorkerContext
from raypipe.distributed.context import Context
from raypipe.runs.checkpoints import load_checkpoint
from raypipe.runs.ledger import fingerprint
from raypipe.runs.partition import SeedPart, proxy_parts
from raypipe.runs.run import Run

if TYPE_CHECKING:
    from torch import Tensor

    from raypipe.vision.networks import ProxyNet


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
        """Return the folders that all parts share."""
        measure = config.measure
        mean = fingerprint(
            run.ledger()["proxy"].fingerprint,
            measure.moso.gradient,
            measure.recalibrate,
            measure.precision,
        )
        values = fingerprint(
            mean,
            sorted(measure.at_checkpoints),
            needs_self_term(config, proxy_parts(run)),
            measure.grand.gradient,
        )
        return cls(
            f"measured/calibrated-{mean}",
            f"measured/gradients-{mean}",
            f"measured/checkpoints-{values}",
        )

    def of_part(self, part: SeedPart) -> GradientFolders:
        """Return the folders of one part: below these when there are several parts."""
        return GradientFolders(*(part.below(folder) for folder in vars(self).values()))


@dataclass(frozen=True)
class GradientJob:
    """The passes over the checkpoints of the proxy of one part of the seed set.

    Attributes
    ----------
    worker : WorkerContext
        The run, and the threads and GPU of each worker.
    folders : GradientFolders
        Folders of the part.
    part : SeedPart
        The part, with its trained proxy.
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
    def images_at_once(self) -> int:
        """Images of a batch."""
        size = self.config.proxy.image_size
        return self.config.measure.images_at_once(self.worker.gpu, size)

    def load_checkpoint(self, file: str) -> ProxyNet:
        """Load a checkpoint with the BatchNorm statistics and memory layout of the settings."""
        import torch

        measure = self.config.measure
        folder = self.folders.calibrated if measure.recalibrate else self.part.checkpoints
        model: ProxyNet = load_checkpoint(self.run, file, self.device, folder=folder)
        if measure.channels_last:
            return model
        return model.to(memory_format=torch.contiguous_format)


def smallest_part(parts: Sequence[SeedPart]) -> int:
    """Return the number of samples of the smallest part."""
    return min(part.samples for part in parts)


def needs_self_term(config: Config, parts: Sequence[SeedPart]) -> bool:
    """Return whether MoSo uses the self term.

    `self_term: auto` goes by the smallest part for all parts, so that their scores compare.
    """
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
