"""The network whose training the scores come from, and the pools of actors that run it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from raypipe.config.base import Positive, Settings

Share = Annotated[float, Field(ge=0, le=1)]
Spread = Annotated[float, Field(gt=0, le=1)]
Channels = tuple[float, float, float]
NORMALIZATIONS: dict[str, tuple[Channels, Channels]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Mean and standard deviation of red, green and blue, of pixels from 0 to 1; `half` brings them to -1..1."""


class NormalizeSettings(Settings):
    """Mean and standard deviation of red, green and blue, of pixels from 0 to 1."""

    mean: tuple[Share, Share, Share] = Field(description="of each channel")
    std: tuple[Spread, Spread, Spread] = Field(description="of each channel")


def _kind_of_normalize(value: Any) -> str:
    return "mean-and-std" if isinstance(value, Mapping | NormalizeSettings) else "a-name"


def _fraction(value: Any) -> Any:
    """8/255 as papers write it."""
    if isinstance(value, str):
        above, slash, below = value.partition("/")
        try:
            return float(above) / float(below) if slash else value
        except (ValueError, ZeroDivisionError):
            return value
    return value


Radius = Annotated[float, BeforeValidator(_fraction), Field(gt=0, le=1)]


class AdversarySettings(Settings):
    """Adversarial examples by projected gradient descent (PGD), in the maximum norm of pixels from 0 to 1."""

    eps: Radius = Field(
        8 / 255, description="furthest that a pixel is moved; a number, or as 8/255"
    )
    step_size: Radius = Field(2 / 255, description="how far it is moved in each iteration")
    iterations: Positive = Field(
        7, description="gradient steps; a training takes about 1 + 2/3 of them times as long"
    )


class ProxySettings(Settings):
    """The small network trained on the seed set with Ray Train."""

    model: str = Field(
        "resnet18",
        min_length=1,
        description="small, or a torchvision network: resnet18, resnet50, ...",
    )
    image_size: int = Field(64, ge=8, le=1024, description="pixels, square")
    normalize: Annotated[
        Annotated[Literal["measured", "imagenet", "cifar10", "half"], Tag("a-name")]
        | Annotated[NormalizeSettings, Tag("mean-and-std")],
        Discriminator(_kind_of_normalize),
    ] = Field(
        "measured",
        description="mean and standard deviation taken off each channel: measured (on the seed set), imagenet, cifar10, half (0.5 and 0.5), "
        "or {mean: [r, g, b], std: [r, g, b]} of pixels from 0 to 1",
    )
    epochs: Positive = Field(50, description="passes over the seed set")
    batch_size: Positive = Field(128, description="images per step, over all workers together")
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="sgd has Nesterov momentum 0.9")
    lr: float = Field(0.1, gt=0, description="peak learning rate")
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD only")
    weight_decay: float = Field(5e-4, ge=0, description="L2 (SGD) or decoupled (AdamW)")
    schedule: Literal["onecycle", "cosine", "constant"] = Field(
        "onecycle", description="learning rate over the training"
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="training loss only; scores use the plain loss"
    )
    flip: bool = Field(True, description="random horizontal flips while training")
    crop_padding: int = Field(
        4, ge=0, le=64, description="random shifts by up to this many pixels while training"
    )
    checkpoints: Positive = Field(10, description="how many checkpoints are kept")
    checkpoint_choice: Literal["spaced", "random"] | tuple[int, ...] = Field(
        "spaced",
        description="evenly spaced, drawn at random (as the published MoSo code does), or a list of epochs from 0",
    )
    adversary: AdversarySettings | None = Field(
        None,
        description="train, and measure, on adversarial examples: {eps: 8/255, step_size: 2/255, iterations: 7}, or {} for these; null: off",
    )
    trajectory: Literal["train", "eval", "none"] = Field(
        "train",
        description="class probabilities per epoch: of the training forward pass (free), of an extra plain pass, or none",
    )
    seed: int = Field(
        0, ge=0, description="initial weights, order and augmentation; the division into parts"
    )
    parts: Positive = Field(
        1,
        description="so many proxies, each trained and scored on its own random part of the seed set, as the MoSo paper does",
    )
    workers: Positive = Field(
        1, description="data-parallel workers of a training; batch_size is shared among them"
    )
    use_gpu: bool | Literal["auto"] = Field(
        "auto", description="one GPU per worker; auto: when the cluster has any"
    )
    cpus_per_worker: Positive | Literal["auto"] = Field(
        "auto",
        description="auto: all CPUs of a CPU-only machine shared evenly, also among parts; else up to 4",
    )
    amp: bool = Field(True, description="bf16 mixed precision on GPU; CPU is always fp32")
    max_failures: int = Field(
        3, ge=0, description="worker failures a training survives before the stage gives up"
    )

    @model_validator(mode="after")
    def _checkpoints_fit(self) -> ProxySettings:
        if isinstance(self.checkpoint_choice, tuple):
            wrong = [epoch for epoch in self.checkpoint_choice if not 0 <= epoch < self.epochs]
            if wrong or not self.checkpoint_choice:
                raise ValueError(
                    f"checkpoint_choice names epochs {wrong}, but there are 0..{self.epochs - 1}"
                )
        elif self.checkpoints > self.epochs:
            raise ValueError(
                f"checkpoints ({self.checkpoints}) cannot be more than epochs ({self.epochs})"
            )
        return self

    def statistics(
        self, mean: Sequence[float], std: Sequence[float]
    ) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of the channels that `normalize` names; those given are the measured ones."""
        if isinstance(self.normalize, NormalizeSettings):
            return list(self.normalize.mean), list(self.normalize.std)
        chosen = NORMALIZATIONS.get(self.normalize, (mean, std))
        return list(chosen[0]), list(chosen[1])

    def checkpoint_epochs(self) -> list[int]:
        """0-based epochs at whose end scores are measured.

        spaced: evenly over the epochs, the last one included. random: drawn without replacement, seeded. Otherwise those named.
        """
        if isinstance(self.checkpoint_choice, tuple):
            return sorted(set(self.checkpoint_choice))
        if self.checkpoint_choice == "random":
            import numpy as np

            drawn = np.random.default_rng([self.seed, 1]).permutation(self.epochs)[
                : self.checkpoints
            ]
            return sorted(drawn.tolist())
        return [
            math.ceil((index + 1) * self.epochs / self.checkpoints) - 1
            for index in range(self.checkpoints)
        ]
