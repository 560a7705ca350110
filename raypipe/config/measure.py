"""Settings of the measured scores."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from raypipe.config.base import Positive, Settings
from raypipe.config.parts import OrPart, PartOptions, check_names
from raypipe.config.pool import PoolSettings
from raypipe.plugins import SCORE

SELF_TERM_BELOW = 1000
"""`measure.moso.self_term: auto` excludes the sample itself for seed sets (or parts) below this."""
RECALIBRATED = 10_000
"""Samples that `recalibrate` uses of a larger seed set. It takes every second, third, ... sample,
so up to twice as many. 1,000 to 10,000 samples give precise statistics (Wu and Johnson 2021, arXiv
2105.07576, section 3)."""


class MosoSettings(Settings):
    """MoSo: alignment of a sample's gradient with the mean gradient."""

    weights: Literal["late", "lr", "none", "normalized"] = Field(
        "late",
        description="Weight of a checkpoint. lr: its learning rate, as published. none: equal "
        "weights. normalized: equal weights after scaling each checkpoint to unit spread. late: "
        "the same over the second half of the checkpoints, on which trainings agree most.",
    )
    gradient: Literal["all", "head"] = Field(
        "all",
        description="all: gradient over all weights. head: over the last layer only (closed form, "
        "one forward pass).",
    )
    self_term: bool | Literal["auto"] = Field(
        "auto",
        description="Exclude the sample itself from the mean gradient. auto: for seed sets (or "
        "parts) below 1,000 samples, where it can matter.",
    )
    formula: Literal["paper", "code"] = Field(
        "paper",
        description="Formula with the self term. paper: Eq. 4. code: that of the published code.",
    )

    def uses_self_term(self, samples: int) -> bool:
        """Return `self_term` as a bool for a seed set, or part, of `samples` samples."""
        return samples < SELF_TERM_BELOW if self.self_term == "auto" else self.self_term


class DynamicUncertaintySettings(Settings):
    """Dynamic Uncertainty: spread of the label's probability over windows of epochs."""

    window: int = Field(10, ge=2, description="Epochs in a window.")
    variant: Literal["official", "paper", "extrapolation"] = Field(
        "official", description="Implementation whose windows and ddof are used."
    )


class TddsSettings(Settings):
    """TDDS: spread of the changes of all class probabilities."""

    epochs: Positive | None = Field(None, description="Number of epochs to use. Default: all.")
    window: int = Field(10, ge=3, description="Epochs in a window.")
    beta: float = Field(
        0.9,
        gt=0,
        le=1,
        description="Weight of the newest window. No effect if epochs equals window.",
    )
    take: Literal["first", "last"] = Field(
        "first", description="Which epochs to use. The official code takes the first."
    )


class DualSettings(Settings):
    """DUAL: Dynamic Uncertainty times improbability."""

    window: int = Field(10, ge=2, description="Epochs in a window.")
    epochs: Positive | None = Field(
        30,
        description="Number of epochs to use, from the first. Published: 30 for CIFAR, 60 for "
        "ImageNet. null: all.",
    )


class MeanSettings(Settings):
    """Mean over epochs of a statistic of the proxy's output."""

    at: Literal["embeddings", "checkpoints", "trajectory", "auto"] = Field(
        "auto",
        description="embeddings: of a linear probe on the embeddings of all samples, for every "
        "sample; needs proxy.cross_fit. checkpoints: of the proxy at its checkpoints, which also "
        "works on an audit set. trajectory: of the proxy at every epoch, while it is trained on "
        "the sample. auto: embeddings with proxy.cross_fit, otherwise trajectory.",
    )
    first_epoch: int = Field(0, ge=0, description="First epoch of the mean, counted from 0.")
    last_epoch: Positive | None = Field(
        None, description="The mean ends before this epoch. null: at the end."
    )

    def resolved(self, cross_fits: bool) -> MeanSettings:
        """Return these settings with `at: auto` replaced by what it means."""
        if self.at != "auto":
            return self
        return self.model_copy(update={"at": "embeddings" if cross_fits else "trajectory"})

    def takes(self, epoch: int) -> bool:
        """Return whether an epoch, counted from 0, is in the mean."""
        return self.first_epoch <= epoch and (self.last_epoch is None or epoch < self.last_epoch)


class El2nSettings(MeanSettings):
    """EL2N: distance from the one-hot label."""

    last_epoch: Positive | None = Field(
        10, description="The mean ends before this epoch. null: at the end."
    )


class ForgettingSettings(Settings):
    """Forgetting events."""

    never_learned: Literal["hardest", "easiest"] = Field(
        "hardest",
        description="Whether samples that were never classified correctly rank as hardest or "
        "easiest.",
    )


class AumSettings(Settings):
    """Negated area under the margin."""

    softmax: bool = Field(False, description="Use the margin of probabilities instead of logits.")


class GrandSettings(Settings):
    """GraNd: length of a sample's gradient, averaged over the checkpoints."""

    gradient: Literal["all", "head"] = Field(
        "all",
        description="all: gradient over all weights. head: over the last layer only (closed form).",
    )


OwnScore = Literal[
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
"""Scores of raypipe."""
OWN_SCORES: tuple[str, ...] = get_args(OwnScore)


class MeasureSettings(PoolSettings):
    """Measure: the scores of every seed sample."""

    scores: tuple[Annotated[str, OrPart(SCORE, OwnScore)], ...] = Field(
        ("loss",),
        min_length=1,
        description="Scores to measure, all from one proxy training. `raypipe scores` lists them. "
        "module:Class names one of your own.",
    )
    options: PartOptions = Field(
        {},
        description="Options of scores from other packages: {name: {option: value}}.",
    )
    recalibrate: bool = Field(
        True,
        description="Re-estimate the BatchNorm statistics at every checkpoint before measuring "
        "gradients, on the seed set or about 10,000 samples of it. false: as published.",
    )
    precision: Literal["float32", "tf32", "bfloat16"] = Field(
        "float32",
        description="Precision of gradient scores on a GPU. float32 is exact, the others are "
        "faster. A CPU always uses float32.",
    )
    channels_last: bool = Field(
        True,
        description="Use the channels-last memory format for gradient scores. Faster on CPU and "
        "GPU; results are equal up to rounding.",
    )
    compile: bool = Field(
        False,
        description="Compile MoSo's alignments with torch.compile. This first takes a minute per "
        "checkpoint.",
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

    @model_validator(mode="after")
    def _options_of_scores(self) -> MeasureSettings:
        check_names(self.options, OwnScore, "measure.<score>")
        unknown = sorted(set(self.options) - set(self.scores))
        if unknown:
            raise ValueError(f"options: {unknown[0]!r} is not one of measure.scores")
        return self

    @property
    def at_checkpoints(self) -> tuple[str, ...]:
        """Scores that are measured at checkpoints, which is possible for any sample."""
        return tuple(
            score
            for score in self.scores
            if score in ("moso", "grand") or self.options_of(score).get("at") == "checkpoints"
        )

    def resolved(self, cross_fits: bool) -> MeasureSettings:
        """Return these settings with every `at: auto` replaced; `cross_fits`: see the proxy."""
        update = {
            name: settings.resolved(cross_fits)
            for name in type(self).model_fields
            if isinstance(settings := getattr(self, name), MeanSettings)
        }
        return self.model_copy(update=update)

    @property
    def from_embeddings(self) -> tuple[str, ...]:
        """Scores of a linear probe, which every sample has: nothing is extrapolated."""
        return tuple(
            score for score in self.scores if self.options_of(score).get("at") == "embeddings"
        )

    @property
    def from_trajectory(self) -> tuple[str, ...]:
        """Scores that follow the training of a sample, and exist for seed samples only."""
        others = {*self.at_checkpoints, *self.from_embeddings}
        return tuple(score for score in self.scores if score not in others)

    @property
    def gradient_scores(self) -> tuple[str, ...]:
        """Scores that are computed from gradients at checkpoints."""
        return tuple(score for score in self.scores if score in ("moso", "grand"))

    @property
    def recalibrates(self) -> bool:
        """Whether BatchNorm statistics are re-estimated: `recalibrate`, for gradients."""
        return self.recalibrate and bool(self.gradient_scores)

    def uses_epoch(self, epoch: int) -> bool:
        """Return whether any score is measured at a checkpoint after an epoch, from 0."""
        means = set(self.at_checkpoints) - set(self.gradient_scores)
        return bool(self.gradient_scores) or any(
            settings.takes(epoch)
            for score in means
            if isinstance(settings := self.settings_of(score), MeanSettings)
        )

    def settings_of(self, score: str) -> Settings:
        """Return the settings of one of raypipe's own scores."""
        settings: Settings = getattr(self, score.replace("-", "_"))
        return settings

    def options_of(self, score: str) -> dict[str, Any]:
        """Return the options of one score by name."""
        if score not in OWN_SCORES:
            return dict(self.options.get(score, {}))
        return self.settings_of(score).model_dump()

    def own_options(self, score: str) -> dict[str, Any]:
        """Return the options of one of raypipe's own scores; nothing of any other.

        Fingerprints cover the options of other scores with their code.
        """
        return self.options_of(score) if score in OWN_SCORES else {}

    def trajectory_options(self, score: str) -> dict[str, Any]:
        """Return the keyword arguments of a score that is computed from the trajectory."""
        return {name: value for name, value in self.options_of(score).items() if name != "at"}
