"""Settings of the proxy, the network whose training the scores come from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from raypipe.config.base import Positive, Settings
from raypipe.config.choices import PROXY_MODELS
from raypipe.config.parts import Reference

Share = Annotated[float, Field(ge=0, le=1)]
Spread = Annotated[float, Field(gt=0, le=1)]
Channels = tuple[float, float, float]
MIN_CROSS_FIT_PARTS = 3
"""Parts that cross-fitting needs: that of the sample, that of the proxy which embeds it, and one
whose scores are extrapolated to it."""
DEFAULT_EPOCHS = 50
"""Epochs of `auto`, unless the seed set is too small for them."""
MIN_STEPS = 300
"""Optimiser steps that `auto` takes at least."""
SMALLER_FIRST = ((0.4, 0.5), (0.7, 0.75))
"""Progressive resizing: up to this share of the epochs, images have this share of their side."""
SIZE_STEP, SMALLEST_SIZE = 4, 16
"""Sides of smaller images are multiples of one, and at least the other, in pixels."""
TOO_FEW_STEPS = 100
"""Optimiser steps below which a warning says that a proxy learns too little."""
NORMALIZATIONS: dict[str, tuple[Channels, Channels]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}
"""Mean and standard deviation of red, green and blue for pixels from 0 to 1."""


class NormalizeSettings(Settings):
    """Mean and standard deviation of each channel for pixels from 0 to 1."""

    mean: tuple[Share, ...] = Field(description="Mean of each channel.")
    std: tuple[Spread, ...] = Field(description="Standard deviation of each channel.")


def _kind_of_normalize(value: Any) -> str:
    return "mean-and-std" if isinstance(value, Mapping | NormalizeSettings) else "a-name"


def _fraction(value: Any) -> Any:
    """Parse a fraction such as "8/255", as papers write it."""
    if isinstance(value, str):
        numerator, slash, denominator = value.partition("/")
        try:
            return float(numerator) / float(denominator) if slash else value
        except (ValueError, ZeroDivisionError):
            return value
    return value


Radius = Annotated[float, BeforeValidator(_fraction), Field(gt=0, le=1)]


class AdversarySettings(Settings):
    """Adversarial examples by projected gradient descent (PGD).

    Distances are in the maximum norm, for pixels from 0 to 1.
    """

    eps: Radius = Field(
        8 / 255, description="Largest change of a pixel: a number, or a fraction such as 8/255."
    )
    step_size: Radius = Field(
        2 / 255, description="Change of a pixel per iteration, in the same unit."
    )
    iterations: Positive = Field(
        7, description="Gradient steps. A training takes about 1 + 2/3 x iterations times as long."
    )


class ProxySettings(Settings):
    """Proxy: the small network trained on the seed set with Ray Train."""

    model: str = Field(
        "resnet18",
        min_length=1,
        description="Network. small (0.3 M parameters), a ResNet for small images (resnet18, "
        "resnet50, ...), torchvision:NAME or timm:NAME, a classifier as that library builds it, "
        "or module:function, code of your own that returns one for (classes, image_size, "
        "channels).",
    )
    image_size: int = Field(
        64, ge=8, le=1024, description="Side in pixels that images are scaled to, square."
    )
    channels: int = Field(
        3,
        ge=1,
        le=64,
        description="Channels of an image. 1: grey. Other numbers than 1 and 3 need "
        "source.transform, or a source that yields such arrays.",
    )
    normalize: Annotated[
        Annotated[
            Literal["auto", "measured", "network", "imagenet", "cifar10", "half"], Tag("a-name")
        ]
        | Annotated[NormalizeSettings, Tag("mean-and-std")],
        Discriminator(_kind_of_normalize),
    ] = Field(
        "auto",
        description="Mean and standard deviation that normalise each channel: measured (on the "
        "seed set), network (those that the network states, else measured), imagenet, cifar10, "
        "half (0.5 and 0.5), or {mean: [r, g, b], std: [r, g, b]} for pixels from 0 to 1. auto: "
        "network if weights are given, else measured.",
    )
    weights: str = Field(
        "none",
        min_length=1,
        description="Weights that each training starts from. none: drawn at random. pretrained: "
        "those that the network's library publishes, through its own download and cache. Or the "
        "path or URI of a safetensors file: a state dict of the network, or a checkpoint of a "
        "run. A last layer of another width is drawn at random.",
    )
    freeze: Literal["none", "backbone", "norm"] = Field(
        "none",
        description="Layers that stay as they are, with their statistics and without dropout. "
        "backbone: all but the last. norm: the normalisation layers.",
    )
    train: Literal["full", "head"] = Field(
        "full",
        description="Weights to train. full: all that freeze leaves. head: those of the last "
        "layer; statistics of BatchNorm still follow the images unless they are frozen.",
    )
    epochs: Positive | Literal["auto"] = Field(
        "auto",
        description="Passes over the seed set. auto: 50, or more where the seed set is so small "
        f"that 50 passes are fewer than {MIN_STEPS} optimiser steps of each training.",
    )
    batch_size: Positive = Field(128, description="Images per step, over all workers together.")
    optimizer: Literal["sgd", "adamw"] = Field(
        "sgd", description="Optimiser. sgd uses Nesterov momentum."
    )
    lr: float = Field(0.1, gt=0, description="Peak learning rate.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of SGD. AdamW ignores it.")
    weight_decay: float = Field(
        5e-4, ge=0, description="Weight decay: L2 for SGD, decoupled for AdamW."
    )
    schedule: Literal["onecycle", "cosine", "constant"] = Field(
        "onecycle", description="Learning rate schedule."
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Label smoothing of the training loss. Scores use the plain loss.",
    )
    flip: bool = Field(
        True,
        description="Flip images horizontally at random while training. Switch it off if mirrored "
        "images have another meaning, such as digits.",
    )
    augment: Reference | None = Field(
        None,
        description="Function of your own that changes images while training the proxies, as "
        "module:function: it takes uint8 [height, width, channels] and a numpy Generator, and "
        "returns the same shape. It comes before flip and crop_padding.",
    )
    crop_padding: int = Field(
        4,
        ge=0,
        le=64,
        description="Shift images at random by up to this many pixels while training. 0: off.",
    )
    progressive_resizing: bool | Literal["auto"] = Field(
        "auto",
        description="Train on smaller images first: half the side for the first 40 % of the "
        "epochs, three quarters of it up to 70 %, at least 16 pixels. auto: for raypipe's own "
        "networks, if all scores come from embeddings (at: embeddings). Scores of earlier epochs "
        "would be those of networks that have not seen images of full size.",
    )
    checkpoints: Positive = Field(
        10,
        description="Number of checkpoints to keep; by default at most one per epoch. Each adds "
        "measurement time for scores such as MoSo.",
    )
    checkpoint_choice: Literal["spaced", "random"] | tuple[int, ...] = Field(
        "spaced",
        description="Epochs of the checkpoints. spaced: evenly. random: as in the published MoSo "
        "code. Or a list of epochs, counted from 0.",
    )
    adversary: AdversarySettings | None = Field(
        None,
        description="Train and measure on adversarial examples: {eps: 8/255, step_size: 2/255, "
        "iterations: 7}, or {} for these defaults. null: off.",
    )
    trajectory: Literal["train", "eval", "none"] = Field(
        "train",
        description="Class probabilities to record per epoch. train: from the training forward "
        "pass (free). eval: from an extra pass without augmentation. none: no trajectory.",
    )
    seed: int = Field(
        0,
        ge=0,
        description="Random seed of initial weights, order, augmentation and the division into "
        "parts.",
    )
    parts: Positive = Field(
        3,
        description="Random parts of the seed set. Each proxy is trained on one of them.",
    )
    repeats: Positive = Field(
        1,
        description="Proxies for each part. They differ in initial weights, order of batches and "
        "augmentation. Scores are averaged over them. Training, measuring and forward passes cost "
        "this many times as much.",
    )
    cross_fit: bool | Literal["auto"] = Field(
        "auto",
        description="Cross-fitting: a sample is seen and scored only by proxies that were not "
        "trained on it, so that scores mean the same inside and outside the seed set. Needs 3 "
        "parts or more. auto: with 3 parts or more. false: each proxy scores its own part, as in "
        "the MoSo paper.",
    )
    workers: Positive = Field(
        1, description="Data-parallel workers of a training. They share batch_size."
    )
    use_gpu: bool | Literal["auto"] = Field(
        "auto", description="Use one GPU per worker. auto: if the cluster has GPUs."
    )
    cpus_per_worker: Positive | Literal["auto"] = Field(
        "auto",
        description="CPUs per worker. auto: without GPUs, all CPUs of a machine shared evenly, "
        "also among parts; otherwise up to 4.",
    )
    amp: bool = Field(
        True, description="Use bfloat16 mixed precision on GPUs. CPUs always use float32."
    )
    keep_intermediate: bool = Field(
        False,
        description="Keep files of the training that none of measure.scores needs when the run is "
        "done: checkpoints but the last, and the trajectory. Without them, other scores need "
        "another training (--redo proxy).",
    )
    max_failures: int = Field(
        3,
        ge=0,
        description="Worker failures that a training survives before the stage fails. Machines "
        "that go without notice count; those whose end was announced to Ray do not.",
    )

    @model_validator(mode="after")
    def _channels_fit(self) -> ProxySettings:
        if isinstance(self.normalize, NormalizeSettings):
            for name in ("mean", "std"):
                values = getattr(self.normalize, name)
                if len(values) != self.channels:
                    raise ValueError(
                        f"normalize.{name} has {len(values)} values for {self.channels} channels"
                    )
        elif self.channels != 3 and self.normalize in ("imagenet", "cifar10"):
            raise ValueError(
                f"normalize: {self.normalize} is for 3 channels, not {self.channels}; use measured"
            )
        return self

    @model_validator(mode="after")
    def _resolve_auto(self) -> ProxySettings:
        if self.normalize == "auto":
            resolved = "measured" if self.weights == "none" else "network"
            object.__setattr__(self, "normalize", resolved)  # settings are fixed, except here
        return self

    @model_validator(mode="after")
    def _cross_fit_possible(self) -> ProxySettings:
        if self.cross_fit is True and self.parts < MIN_CROSS_FIT_PARTS:
            raise ValueError(
                f"cross_fit needs {MIN_CROSS_FIT_PARTS} parts or more: a proxy that embeds samples "
                "or scores what is extrapolated to them must not be trained on them"
            )
        return self

    @model_validator(mode="after")
    def _resizing_possible(self) -> ProxySettings:
        if self.progressive_resizing is True and self.adversary is not None:
            raise ValueError(
                "progressive_resizing: adversarial examples are images of full size; set it to auto"
            )
        return self

    def resolved(self, *, from_embeddings: bool) -> ProxySettings:
        """Return the settings with `progressive_resizing: auto` replaced by what it means.

        `from_embeddings`: whether all scores come from embeddings.
        """
        if self.progressive_resizing != "auto":
            return self
        own = self.model in PROXY_MODELS and self.weights == "none" and self.adversary is None
        return self.model_copy(update={"progressive_resizing": own and from_embeddings})

    def size_in_epoch(self, epoch: int) -> int:
        """Return the side of the training images in an epoch, counted from 0, in pixels."""
        if self.progressive_resizing is not True:
            return self.image_size
        for until, side in SMALLER_FIRST:
            if epoch < until * self.passes:
                size = SIZE_STEP * round(side * self.image_size / SIZE_STEP)
                return min(max(size, SMALLEST_SIZE), self.image_size)
        return self.image_size

    @property
    def pixel_share(self) -> float:
        """Pixels of all training images as a share of those of full size."""
        sides = [self.size_in_epoch(epoch) / self.image_size for epoch in range(self.passes)]
        return sum(side**2 for side in sides) / self.passes

    @property
    def proxies(self) -> int:
        """Number of proxies in all."""
        return self.parts * self.repeats

    @property
    def cross_fits(self) -> bool:
        """Whether samples are seen and scored by proxies that were not trained on them."""
        enough = self.parts >= MIN_CROSS_FIT_PARTS
        return enough if self.cross_fit == "auto" else self.cross_fit

    @property
    def passes(self) -> int:
        """`epochs` as a number: of `auto`, those of a large seed set."""
        return DEFAULT_EPOCHS if self.epochs == "auto" else self.epochs

    def steps(self, seed_samples: int) -> int:
        """Return the optimiser steps of each training with a seed set of this size."""
        return self.for_seed_set(seed_samples).passes * self._steps_per_epoch(seed_samples)

    def for_seed_set(self, seed_samples: int) -> ProxySettings:
        """Return the settings with a number in place of `epochs: auto`."""
        if self.epochs != "auto":
            return self
        least = math.ceil(MIN_STEPS / self._steps_per_epoch(seed_samples))
        return self.model_copy(update={"epochs": max(DEFAULT_EPOCHS, least)})

    def _steps_per_epoch(self, seed_samples: int) -> int:
        return max(1, math.ceil(seed_samples / self.parts / self.batch_size))

    def too_few_steps(self, seed_samples: int) -> str:
        """Return a sentence if each training would take too few steps to learn; else nothing."""
        steps = self.steps(seed_samples)
        if steps >= TOO_FEW_STEPS:
            return ""
        return (
            f"each proxy is trained for {steps:,} steps only ({self.passes} epochs over "
            f"{round(seed_samples / self.parts):,} samples), which can be too few to learn "
            f"anything: set proxy.epochs to auto (at least {MIN_STEPS} steps), or raise "
            "seed.fraction"
        )

    @model_validator(mode="after")
    def _checkpoints_fit(self) -> ProxySettings:
        if isinstance(self.checkpoint_choice, tuple):
            wrong = [epoch for epoch in self.checkpoint_choice if not 0 <= epoch < self.passes]
            if wrong or not self.checkpoint_choice:
                raise ValueError(
                    f"checkpoint_choice names epochs {wrong}, but epochs are 0..{self.passes - 1}"
                )
        elif self.checkpoints == ProxySettings.model_fields["checkpoints"].default:
            # also where it is stated, as in the configuration that `raypipe init` prints
            fewer = min(self.checkpoints, self.passes)
            object.__setattr__(self, "checkpoints", fewer)  # settings are fixed, except here
        elif self.checkpoints > self.passes:
            raise ValueError(
                f"checkpoints ({self.checkpoints}) cannot be more than epochs ({self.passes})"
            )
        return self

    def statistics(
        self, mean: Sequence[float], std: Sequence[float]
    ) -> tuple[list[float], list[float]]:
        """Return mean and standard deviation of the channels, as `normalize` chooses them.

        `network` is up to `raypipe.proxies.normalisation`; here it means the measured values.

        Parameters
        ----------
        mean, std : sequence of float
            The measured values of red, green and blue, for pixels from 0 to 1.
        """
        if isinstance(self.normalize, NormalizeSettings):
            return list(self.normalize.mean), list(self.normalize.std)
        if self.normalize == "half":
            return [0.5] * self.channels, [0.5] * self.channels
        chosen = NORMALIZATIONS.get(self.normalize, (mean, std))
        return list(chosen[0]), list(chosen[1])

    def checkpoint_epochs(self) -> list[int]:
        """Return the epochs, counted from 0, after which scores are measured.

        spaced: evenly over all epochs, including the last. random: drawn without replacement, from
        `seed`. Otherwise the listed epochs.
        """
        if isinstance(self.checkpoint_choice, tuple):
            return sorted(set(self.checkpoint_choice))
        if self.checkpoint_choice == "random":
            import numpy as np

            drawn = np.random.default_rng([self.seed, 1]).permutation(self.passes)[
                : self.checkpoints
            ]
            return sorted(drawn.tolist())
        return [
            math.ceil((index + 1) * self.passes / self.checkpoints) - 1
            for index in range(self.checkpoints)
        ]
