"""The values of a sample at one checkpoint that scores are computed from.

Imports torch; only workers import this module.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors.torch import load
from torch import Tensor

from raypipe import storage
from raypipe.config import MeasureSettings
from raypipe.proxies.networks import ProxyNet
from raypipe.scores import forward_mode, head, per_sample
from raypipe.stages.measure.gradient_job import GradientJob, attacked
from raypipe.stages.measure.outputs import OUTPUTS
from raypipe.vision.output_statistics import output_statistics
from raypipe.vision.precision import use_precision


class GradientMethod(enum.Enum):
    """How a value of the gradient of each sample is computed."""

    FORWARD_MODE = "forward-mode"
    """Derivative along the mean gradient: alignments only, and the cheapest over all weights."""
    HEAD = "head"
    """Gradients of the last layer, in closed form."""
    PER_SAMPLE = "per-sample"
    """Gradients over all weights, one per sample: alignments and lengths."""

    @classmethod
    def of(cls, gradient: str) -> GradientMethod:
        """Return the method that the setting `gradient` (`all` or `head`) names."""
        return cls.HEAD if gradient == "head" else cls.PER_SAMPLE


@dataclass(frozen=True)
class ValuePlan:
    """Which values are computed, each in the cheapest way.

    Attributes
    ----------
    alignments : GradientMethod or None
        How alignments with the mean gradient are computed (MoSo); None: not at all.
    squares : bool
        Whether squared lengths are stored along with the alignments (MoSo with its self term).
    lengths : GradientMethod or None
        How lengths of gradients are computed (GraNd); None: not at all.
    outputs : tuple of str
        Statistics of the network's output (loss, EL2N, entropy).
    """

    alignments: GradientMethod | None
    squares: bool
    lengths: GradientMethod | None
    outputs: tuple[str, ...]

    @classmethod
    def choose(cls, measure: MeasureSettings, self_term: bool) -> ValuePlan:
        """Choose the cheapest way to compute what the scores need.

        Forward mode does not compute lengths. Where per-sample gradients over all weights are
        needed anyway, for the self term or for GraNd, they give the alignments as well.
        """
        moso, grand = "moso" in measure.scores, "grand" in measure.scores
        lengths = GradientMethod.of(measure.grand.gradient) if grand else None
        alignments = GradientMethod.of(measure.moso.gradient) if moso else None
        per_sample_needed = self_term or lengths is GradientMethod.PER_SAMPLE
        if alignments is GradientMethod.PER_SAMPLE and not per_sample_needed:
            alignments = GradientMethod.FORWARD_MODE
        outputs = tuple(OUTPUTS[score] for score in measure.at_checkpoints if score in OUTPUTS)
        return cls(alignments, moso and self_term, lengths, outputs)

    @property
    def forward_mode_only(self) -> bool:
        """Whether alignments in forward mode are the only values."""
        forward = self.alignments is GradientMethod.FORWARD_MODE
        return forward and self.lengths is None and not self.outputs


class CheckpointValues:
    """Computes the values of batches of samples at one checkpoint.

    Parameters
    ----------
    job
        The part of the seed set.
    plan
        The values.
    file
        The checkpoint.
    """

    def __init__(self, job: GradientJob, plan: ValuePlan, file: str) -> None:
        self._plan, self._device = plan, job.device
        self._precision = job.config.measure.precision
        self._adversary = job.config.proxy.adversary
        self._model: ProxyNet | None = job.load_checkpoint(file)
        self._mean_gradient: Mapping[str, Tensor] | None = None
        self._aligner: forward_mode.Aligner | None = None
        if plan.alignments is not None:
            stored = load(storage.read_bytes(job.run.path(job.folders.gradients, file)))
            self._mean_gradient = {name: value.to(job.device) for name, value in stored.items()}
            if plan.alignments is GradientMethod.FORWARD_MODE:
                self._aligner = forward_mode.Aligner(
                    self._model,
                    self._mean_gradient,
                    channels_last=job.config.measure.channels_last,
                    compiled=job.config.measure.compile,
                )
                if plan.forward_mode_only and self._aligner.traced and self._adversary is None:
                    # the aligner has its own copy of what it needs
                    self._model, self._mean_gradient = None, None

    def __call__(self, pixels: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return the values of n samples by name, [n] each.

        Parameters
        ----------
        pixels
            Images uint8 [n, 3, size, size].
        target
            Labels int64 [n].
        """
        with use_precision(self._precision, self._device):
            images = attacked(self._model, pixels, target, self._adversary)
            values: dict[str, Tensor] = {}
            if self._aligner is not None:
                values["alignments"] = self._aligner(images, target)
            # the order of the values is that of the columns in the file
            values |= self._gradient_values(GradientMethod.HEAD, images, target)
            values |= self._gradient_values(GradientMethod.PER_SAMPLE, images, target)
            if self._plan.outputs:
                assert self._model is not None
                with torch.no_grad():
                    statistics = output_statistics(self._model(images).float(), target)
                values |= {name: statistics[name] for name in self._plan.outputs}
            return values

    def _gradient_values(
        self, method: GradientMethod, images: Tensor, target: Tensor
    ) -> dict[str, Tensor]:
        """Return the alignments, squares and lengths that are computed by one method."""
        plan = self._plan
        aligns, measures_length = plan.alignments is method, plan.lengths is method
        if not aligns and not measures_length:
            return {}
        compute = (
            head.head_norms_and_alignments
            if method is GradientMethod.HEAD
            else per_sample.norms_and_alignments
        )
        assert self._model is not None
        direction = self._mean_gradient if aligns else None
        squares, alignments = compute(self._model, images, target, direction)
        values: dict[str, Tensor] = {}
        if aligns:
            values["alignments"] = alignments
            if plan.squares:
                values["squares"] = squares
        if measures_length:
            values["lengths"] = squares.sqrt()
        return values
