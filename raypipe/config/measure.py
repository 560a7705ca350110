"""The measured scores, each with its options."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from raypipe.config.base import Positive, Settings
from raypipe.config.pool import PoolSettings

SELF_TERM_BELOW = 1000
"""`measure.moso.self_term: auto` takes the sample itself out for seed sets, or parts, smaller than this."""
RECALIBRATED = 10_000
"""Samples that `recalibrate` takes of a larger seed set, or up to twice as many, so that they are every second, third, ... one: 1,000 to
10,000 give precise statistics (Wu and Johnson 2021, arXiv 2105.07576, section 3)."""


class MosoSettings(Settings):
    """MoSo: alignment with the mean gradient."""

    weights: Literal["lr", "none", "normalized"] = Field(
        "lr",
        description="a checkpoint's weight: its learning rate (as published), equal, or equal after scaling to unit spread",
    )
    gradient: Literal["all", "head"] = Field(
        "all",
        description="over all weights, or the last layer's alone (closed form, one forward pass)",
    )
    self_term: bool | Literal["auto"] = Field(
        "auto",
        description="take the sample itself out of the mean gradient; auto: for seed sets (or parts) below 1,000, where it can matter",
    )
    formula: Literal["paper", "code"] = Field(
        "paper", description="paper: Eq. 4; code: the published code's own, for self_term only"
    )

    def uses_self_term(self, samples: int) -> bool:
        """`self_term` for a seed set, or part, of so many samples."""
        return samples < SELF_TERM_BELOW if self.self_term == "auto" else self.self_term


class DynamicUncertaintySettings(Settings):
    """Dynamic Uncertainty: spread of the label's probability over windows of epochs."""

    window: int = Field(10, ge=2, description="epochs in a window")
    variant: Literal["official", "paper", "extrapolation"] = Field(
        "official", description="windows and ddof of which implementation"
    )


class TddsSettings(Settings):
    """TDDS: spread of the change of all probabilities."""

    epochs: Positive | None = Field(None, description="epochs used; default: all")
    window: int = Field(10, ge=3, description="epochs in a window")
    beta: float = Field(
        0.9,
        gt=0,
        le=1,
        description="weight of the newest window; no effect where epochs equal window",
    )
    take: Literal["first", "last"] = Field(
        "first", description="which epochs: the official code takes the first"
    )


class DualSettings(Settings):
    """DUAL: Dynamic Uncertainty times improbability."""

    window: int = Field(10, ge=2, description="epochs in a window")
    epochs: Positive | None = Field(
        30, description="first epochs used: 30 for CIFAR, 60 for ImageNet as published; null: all"
    )


class MeanSettings(Settings):
    """A mean over epochs of what the proxy says of a sample."""

    at: Literal["trajectory", "checkpoints"] = Field(
        "trajectory",
        description="at every epoch of the training, or by the proxy at its checkpoints, which can measure any sample: an audit set too",
    )
    first_epoch: int = Field(0, ge=0, description="first epoch of the mean, from 0")
    last_epoch: Positive | None = Field(
        None, description="the mean ends before this epoch; null: at the end"
    )

    def takes(self, epoch: int) -> bool:
        """Whether an epoch, from 0, is in the mean."""
        return self.first_epoch <= epoch and (self.last_epoch is None or epoch < self.last_epoch)


class El2nSettings(MeanSettings):
    """EL2N: distance from the one-hot label."""

    last_epoch: Positive | None = Field(
        10, description="the mean ends before this epoch; null: at the end"
    )


class ForgettingSettings(Settings):
    """Forgetting events."""

    never_learned: Literal["hardest", "easiest"] = Field(
        "hardest", description="where samples go that were never correct"
    )


class AumSettings(Settings):
    """Negated area under the margin."""

    softmax: bool = Field(False, description="margin of probabilities instead of logits")


class GrandSettings(Settings):
    """GraNd: length of a sample's gradient, mean over the checkpoints."""

    gradient: Literal["all", "head"] = Field(
        "all", description="over all weights, or the last layer's alone (closed form)"
    )


ScoreName = Literal[
    "moso",
    "grand",
    "dynamic-uncertainty",
    "tdds",
    "el2n",
    "forgetting",
    "aum",
    "dual",
    "loss",
    "entropy",
]


class MeasureSettings(PoolSettings):
    """The measured scores of every seed sample."""

    scores: tuple[ScoreName, ...] = Field(
        ("moso",),
        min_length=1,
        description="one or several, from one proxy training; see `raypipe scores`",
    )
    recalibrate: bool = Field(
        True,
        description="estimate BatchNorm's statistics anew at every checkpoint, on the seed set or about 10,000 samples of it, before anything "
        "is measured there; false: as published",
    )
    precision: Literal["float32", "tf32", "bfloat16"] = Field(
        "float32",
        description="of gradient scores on a GPU: float32 is exact, the others faster; a CPU always takes float32",
    )
    channels_last: bool = Field(
        True,
        description="memory format of gradient scores; faster on CPU and GPU, the same to rounding",
    )
    compile: bool = Field(
        False,
        description="torch.compile of MoSo's alignments: a minute of compilation per checkpoint first",
    )
    moso: MosoSettings = MosoSettings()
    grand: GrandSettings = GrandSettings()
    dynamic_uncertainty: DynamicUncertaintySettings = DynamicUncertaintySettings()
    tdds: TddsSettings = TddsSettings()
    el2n: El2nSettings = El2nSettings()
    forgetting: ForgettingSettings = ForgettingSettings()
    aum: AumSettings = AumSettings()
    dual: DualSettings = DualSettings()
    loss: MeanSettings = MeanSettings()
    entropy: MeanSettings = MeanSettings()

    @field_validator("scores", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("scores")
    @classmethod
    def _each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) != len(value):
            raise ValueError("a score is named twice")
        return value

    @property
    def at_checkpoints(self) -> tuple[str, ...]:
        """The scores that the proxy's checkpoints give, of any sample; the others follow the training of a sample."""
        return tuple(
            score
            for score in self.scores
            if score in ("moso", "grand") or self.options(score).get("at") == "checkpoints"
        )

    def settings_of(self, score: str) -> Settings:
        """The settings of one score."""
        settings: Settings = getattr(self, score.replace("-", "_"))
        return settings

    def options(self, score: str) -> dict[str, Any]:
        """The options of one score."""
        return self.settings_of(score).model_dump()

    def trajectory_options(self, score: str) -> dict[str, Any]:
        """What the function of a score takes that is computed from the trajectory."""
        return {name: value for name, value in self.options(score).items() if name != "at"}
