"""The settings of a run: one model per stage, validated before any work starts.

A configuration is YAML (safe loading only). An unknown key or a bad value raises `ConfigError`, naming the field, the
value and what is allowed. Field descriptions below are also the comments `raypipe init` prints.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from raypipe.errors import ConfigError

KeepFraction = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Section = TypeVar("Section", bound="Settings")
Share = Annotated[float, Field(ge=0, le=1)]
Spread = Annotated[float, Field(gt=0, le=1)]
Channels = tuple[float, float, float]
NORMALIZATIONS: dict[str, tuple[Channels, Channels]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Mean and standard deviation of red, green and blue, of pixels from 0 to 1; `half` brings them to -1..1."""
SELF_TERM_BELOW = 1000
"""`measure.moso.self_term: auto` takes the sample itself out for seed sets, or parts, smaller than this."""


class Settings(BaseModel):
    """Base of every section: unknown keys are refused, values are fixed once validated."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SourceSettings(Settings):
    """The dataset as its owner stores it."""

    uri: str = Field(
        description="folder, file, glob, brace pattern (shard-{000..127}.tar) or list of shards (.txt); local path, file:// or s3://; "
        "digits:// is the bundled set; torchvision://CIFAR10, huggingface://user/name a dataset by name; synthetic:// made-up images"
    )
    format: Literal[
        "auto", "parquet", "imagefolder", "filelist", "webdataset", "huggingface", "torchvision", "synthetic", "digits"
    ] = Field("auto", description="auto looks at the file names")
    root: str | None = Field(
        None,
        min_length=1,
        description="folder of a torchvision dataset's files, or below which the paths of a file list are",
    )
    split: str | None = Field(
        None, min_length=1, description="which split of a dataset that has several; of a torchvision dataset train, if not given"
    )
    config_name: str | None = Field(None, min_length=1, description="Hugging Face: which configuration of a dataset of the hub")
    download: bool = Field(True, description="fetch a torchvision dataset that is not in root")
    verify: bool = Field(True, description="check a torchvision dataset's files against the published checksums")
    include: str = Field("*", min_length=1, description="glob on the path below uri: only matching files are read")
    image_column: str = Field(
        "auto", min_length=1, description="Parquet, Hugging Face: column with the images; auto: image, img, ..., or the only one"
    )
    label_column: str = Field(
        "auto", min_length=1, description="column, or WebDataset .json field, with the label; auto: label, fine_label, class, ..."
    )
    id_column: str | None = Field(
        None, min_length=1, description="Parquet, Hugging Face: column with unique ids; default is file#row"
    )
    path_column: str | None = Field(
        None, min_length=1, description="file list: column with the paths; default: path, file, filename or image, else the first"
    )
    class_map: str | None = Field(
        None,
        min_length=1,
        description="image folder, file list: file that says which class a folder or label is; JSON or text lines",
    )
    num_classes: Positive | None = Field(None, description="default: found in the source")
    limit: Positive | None = Field(None, description="use only the first N samples (rehearsals)")
    fragment_samples: Positive = Field(1024, description="most samples in one unit of work")
    max_pixels: Positive = Field(100_000_000, description="an image with more pixels is rejected, not decoded")
    max_reject_fraction: float = Field(
        0.01,
        ge=0,
        le=1,
        description="a run stops when more of its samples than this cannot be read; fewer than 10 never stop it; 0: none may, 1: all may",
    )


class SeedSettings(Settings):
    """The randomly chosen few percent of samples that are scored by measurement."""

    fraction: float = Field(0.1, gt=0, le=1, description="share of the source that is measured")
    seed: int = Field(0, ge=0, description="another number draws another seed set")
    audit: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description="samples outside the seed set that are measured directly to judge the fidelity of scores at checkpoints, about; "
        "auto: a tenth of the seed set, 50 to 500; 0: none",
    )

    def audit_samples(self, samples: int) -> int:
        """How many samples an audit set should have where the source has so many."""
        return min(500, max(50, round(samples * self.fraction / 10))) if self.audit == "auto" else self.audit


class NormalizeSettings(Settings):
    """Mean and standard deviation of red, green and blue, of pixels from 0 to 1."""

    mean: tuple[Share, Share, Share] = Field(description="of each channel")
    std: tuple[Spread, Spread, Spread] = Field(description="of each channel")


def _kind_of_normalize(value: Any) -> str:
    return "mean-and-std" if isinstance(value, Mapping | NormalizeSettings) else "a-name"


class ProxySettings(Settings):
    """The small network trained on the seed set with Ray Train."""

    model: str = Field("resnet18", min_length=1, description="small, or a torchvision network: resnet18, resnet50, ...")
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
    schedule: Literal["onecycle", "cosine", "constant"] = Field("onecycle", description="learning rate over the training")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="training loss only; scores use the plain loss")
    flip: bool = Field(True, description="random horizontal flips while training")
    crop_padding: int = Field(4, ge=0, le=64, description="random shifts by up to this many pixels while training")
    checkpoints: Positive = Field(10, description="how many checkpoints are kept")
    checkpoint_choice: Literal["spaced", "random"] | tuple[int, ...] = Field(
        "spaced", description="evenly spaced, drawn at random (as the published MoSo code does), or a list of epochs from 0"
    )
    trajectory: Literal["train", "eval", "none"] = Field(
        "train", description="class probabilities per epoch: of the training forward pass (free), of an extra plain pass, or none"
    )
    seed: int = Field(0, ge=0, description="initial weights, order and augmentation; the division into parts")
    parts: Positive = Field(
        1, description="so many proxies, each trained and scored on its own random part of the seed set, as the MoSo paper does"
    )
    workers: Positive = Field(1, description="data-parallel workers of a training; batch_size is shared among them")
    use_gpu: bool | Literal["auto"] = Field("auto", description="one GPU per worker; auto: when the cluster has any")
    cpus_per_worker: Positive | Literal["auto"] = Field(
        "auto", description="auto: all CPUs of a CPU-only machine shared evenly, also among parts; else up to 4"
    )
    amp: bool = Field(True, description="bf16 mixed precision on GPU; CPU is always fp32")
    max_failures: int = Field(3, ge=0, description="worker failures a training survives before the stage gives up")

    @model_validator(mode="after")
    def _checkpoints_fit(self) -> ProxySettings:
        if isinstance(self.checkpoint_choice, tuple):
            wrong = [epoch for epoch in self.checkpoint_choice if not 0 <= epoch < self.epochs]
            if wrong or not self.checkpoint_choice:
                raise ValueError(f"checkpoint_choice names epochs {wrong}, but there are 0..{self.epochs - 1}")
        elif self.checkpoints > self.epochs:
            raise ValueError(f"checkpoints ({self.checkpoints}) cannot be more than epochs ({self.epochs})")
        return self

    def statistics(self, mean: Sequence[float], std: Sequence[float]) -> tuple[list[float], list[float]]:
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

            drawn = np.random.default_rng([self.seed, 1]).permutation(self.epochs)[: self.checkpoints]
            return sorted(drawn.tolist())
        return [math.ceil((index + 1) * self.epochs / self.checkpoints) - 1 for index in range(self.checkpoints)]


class PoolSettings(Settings):
    """Size of an autoscaling pool of actors."""

    batch_size: Positive | Literal["auto"] = Field(
        "auto", description="images in one forward pass; auto: 256 on a GPU, 64 on a CPU, where more only take memory"
    )
    min_actors: Positive = Field(1, description="actors that are always there")
    max_actors: Positive | Literal["auto"] = Field("auto", description="auto: one per GPU, or one per CPU where there is no GPU")
    use_gpu: bool | Literal["auto"] = Field("auto", description="auto: when the cluster has any")

    @model_validator(mode="after")
    def _bounds(self) -> PoolSettings:
        if self.max_actors != "auto" and self.max_actors < self.min_actors:
            raise ValueError(f"max_actors ({self.max_actors}) cannot be less than min_actors ({self.min_actors})")
        return self

    def images_at_once(self, gpu: bool) -> int:
        """`batch_size` as a number."""
        return self.batch_size if self.batch_size != "auto" else 256 if gpu else 64


class MosoSettings(Settings):
    """MoSo: alignment with the mean gradient."""

    weights: Literal["lr", "none", "normalized"] = Field(
        "lr", description="a checkpoint's weight: its learning rate (as published), equal, or equal after scaling to unit spread"
    )
    gradient: Literal["all", "head"] = Field(
        "all", description="over all weights, or the last layer's alone (closed form, one forward pass)"
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
    beta: float = Field(0.9, gt=0, le=1, description="weight of the newest window; no effect where epochs equal window")
    take: Literal["first", "last"] = Field("first", description="which epochs: the official code takes the first")


class DualSettings(Settings):
    """DUAL: Dynamic Uncertainty times improbability."""

    window: int = Field(10, ge=2, description="epochs in a window")
    epochs: Positive | None = Field(30, description="first epochs used: 30 for CIFAR, 60 for ImageNet as published; null: all")


class MeanSettings(Settings):
    """A mean over epochs of what the proxy says of a sample."""

    at: Literal["trajectory", "checkpoints"] = Field(
        "trajectory",
        description="at every epoch of the training, or by the proxy at its checkpoints, which can measure any sample: an audit set too",
    )
    first_epoch: int = Field(0, ge=0, description="first epoch of the mean, from 0")
    last_epoch: Positive | None = Field(None, description="the mean ends before this epoch; null: at the end")

    def takes(self, epoch: int) -> bool:
        """Whether an epoch, from 0, is in the mean."""
        return self.first_epoch <= epoch and (self.last_epoch is None or epoch < self.last_epoch)


class El2nSettings(MeanSettings):
    """EL2N: distance from the one-hot label."""

    last_epoch: Positive | None = Field(10, description="the mean ends before this epoch; null: at the end")


class ForgettingSettings(Settings):
    """Forgetting events."""

    never_learned: Literal["hardest", "easiest"] = Field("hardest", description="where samples go that were never correct")


class AumSettings(Settings):
    """Negated area under the margin."""

    softmax: bool = Field(False, description="margin of probabilities instead of logits")


class GrandSettings(Settings):
    """GraNd: length of a sample's gradient, mean over the checkpoints."""

    gradient: Literal["all", "head"] = Field("all", description="over all weights, or the last layer's alone (closed form)")


ScoreName = Literal["moso", "grand", "dynamic-uncertainty", "tdds", "el2n", "forgetting", "aum", "dual", "loss", "entropy"]


class MeasureSettings(PoolSettings):
    """The measured scores of every seed sample."""

    scores: tuple[ScoreName, ...] = Field(
        ("moso",), min_length=1, description="one or several, from one proxy training; see `raypipe scores`"
    )
    recalibrate: bool = Field(
        True,
        description="estimate BatchNorm's statistics anew on the seed set at every checkpoint, before anything is measured there; false: "
        "as published",
    )
    precision: Literal["float32", "tf32", "bfloat16"] = Field(
        "float32", description="of gradient scores on a GPU: float32 is exact, the others faster; a CPU always takes float32"
    )
    channels_last: bool = Field(True, description="memory format of gradient scores; faster on CPU and GPU, the same to rounding")
    compile: bool = Field(False, description="torch.compile of MoSo's alignments: a minute of compilation per checkpoint first")
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
            score for score in self.scores if score in ("moso", "grand") or self.options(score).get("at") == "checkpoints"
        )

    def settings_of(self, score: str) -> Settings:
        """The settings of one score."""
        settings: Settings = getattr(self, score.replace("-", "_"))
        return settings

    def options(self, score: str) -> dict[str, Any]:
        """The options of one score."""
        return self.settings_of(score).model_dump()


class EmbedSettings(PoolSettings):
    """One forward pass over the whole source."""

    dtype: Literal["float32", "float16"] = Field("float32", description="how embeddings are stored")
    decode: Literal["cpu", "gpu", "auto"] = Field(
        "cpu",
        description="where JPEGs are decoded: gpu in batches on the actors' GPUs, other images as before; auto where there are any; pixels differ "
        "by a few levels, so that only cpu gives the same scores on every machine",
    )


class ExtrapolateSettings(Settings):
    """The score of every other sample, predicted."""

    score: ScoreName | Literal["auto"] = Field("auto", description="which of measure.scores; auto: the first")
    method: Literal["gnn", "knn", "mlp", "trees", "proxy", "gnn-published", "knn-published"] = Field(
        "gnn",
        description="gnn blends several; knn knows classes; mlp sees no neighbour; trees: boosted, on neighbours' scores; proxy: its "
        "loss, margin or entropy; *-published: as in arXiv 2506.09010",
    )
    neighbours: Positive | Literal["auto"] = Field(
        "auto", description="auto: 32 for gnn, 10 for gnn-published, chosen for knn, else 20 (mlp and proxy: for intervals alone)"
    )
    epochs: Positive | Literal["auto"] = Field(
        "auto",
        description="passes of the fit of gnn, gnn-published and mlp (at most); auto: 40 for gnn, fewer for more than 1,500 seed "
        "samples, 25 for gnn-published, 60 for mlp",
    )
    holdout: float = Field(0.2, gt=0, lt=0.5, description="share of the seed set kept out of a fit to judge its fidelity")
    folds: Positive | Literal["auto"] = Field(
        "auto", description="parts of that share held out in turn, a fit for each; auto: all of the seed set, 1 for gnn-published"
    )
    judge_published: bool | Literal["auto"] = Field(
        "auto",
        description="judge gnn-published beside the method, whose graph holds the whole source; auto: up to 10,000 samples",
    )
    exact_neighbours: Positive = Field(
        50_000,
        description="samples up to which the search for neighbours among them is exact; more are searched by inverted lists with a "
        "recall of 0.95, measured",
    )
    confidence: float = Field(0.9, gt=0, lt=1, description="share of samples whose score lies between lower and upper")
    seed: int = Field(0, ge=0, description="hold-out split and initial weights")
    max_actors: Positive | Literal["auto"] = Field("auto", description="auto: one per CPU")

    @property
    def most_folds(self) -> int:
        """How many parts of the share `holdout` the seed set has."""
        return int(1 / self.holdout + 1e-9)

    @model_validator(mode="after")
    def _parts_are_apart(self) -> ExtrapolateSettings:
        if self.folds != "auto" and self.folds > self.most_folds:
            raise ValueError(f"folds ({self.folds}) parts of holdout ({self.holdout:g}) are more than the seed set")
        return self


class TrustSettings(Settings):
    """When predicted scores are good enough to prune by."""

    min_spearman: float = Field(
        0.2, ge=-1, le=1, description="no keep-lists where the lower end of the fidelity's interval is below; -1: never refuse"
    )


class SelectSettings(Settings):
    """Keep-lists."""

    keep: tuple[KeepFraction, ...] = Field((0.3, 0.5, 0.7, 0.9), min_length=1, description="fractions of the samples to keep")
    strategy: Literal["top", "balanced", "normalized", "moderate", "mixed", "random", "ccs", "beta"] = Field(
        "top",
        description="top: highest scores; balanced: the same share of each class; normalized: highest within the class; moderate: around "
        "the median; mixed: both ends; random; ccs: over the range of scores; beta: easier the more is pruned. See docs/keep-lists.md",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="random, ccs, beta: another number draws other samples")
    easy_fraction: float = Field(
        0.5, ge=0, le=1, description="mixed: share of the list from the easy end, the rest from the hard end"
    )
    difficulty: Literal["auto", "score", "loss"] = Field(
        "auto",
        description="mixed, ccs: what is hard, a high score or a high loss of the proxy; auto: the score where it is one of difficulty "
        "(aum, el2n, entropy, forgetting, grand, loss), else the loss",
    )
    hard_cutoff: float = Field(0.1, ge=0, lt=1, description="ccs: share of the samples, the hardest, that is left out first")
    strata: int = Field(50, ge=1, le=10_000, description="ccs: intervals of equal width of the score")
    beta_exponent: float = Field(4.0, gt=0, description="beta: c_D; the higher, the later easy samples are preferred")
    min_per_class: int = Field(0, ge=0, description="samples each class keeps at least, or all it has")
    always_keep: str | None = Field(
        None, min_length=1, description="ids in every list: text, one a line, or Parquet with sample_id"
    )
    never_keep: str | None = Field(None, min_length=1, description="ids in no list, as always_keep")
    near_duplicates: float | None = Field(
        None, gt=0, le=1, description="of embeddings with at least this cosine similarity only that of the highest score is kept"
    )
    weights: Literal["none", "inclusion", "class"] = Field(
        "none",
        description="column of training weights; inclusion: inverse probability of being drawn (random, ccs, beta); class: class "
        "frequencies of the source",
    )
    force: bool = Field(False, description="make keep-lists even where the fidelity is below trust.min_spearman")

    @field_validator("keep", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, int | float) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _fits(self) -> SelectSettings:
        if self.strategy == "ccs" and max(self.keep) + self.hard_cutoff > 1 + 1e-9:
            raise ValueError(
                f"keep ({max(self.keep)}) and hard_cutoff ({self.hard_cutoff}) of ccs cannot be more than 1 together"
            )
        if self.weights == "inclusion" and self.strategy not in {"random", "ccs", "beta"}:
            raise ValueError(
                f"weights: inclusion is for strategies that draw (random, ccs, beta), not {self.strategy}; use class"
            )
        if self.weights == "inclusion" and self.min_per_class:
            raise ValueError("weights: inclusion does not hold with min_per_class, which changes the probabilities; use class")
        return self


class ReportSettings(Settings):
    """The HTML page."""

    images: int = Field(24, ge=0, le=200, description="images in each grid")


class ClusterSettings(Settings):
    """How to reach Ray."""

    address: str = Field(
        "auto",
        min_length=1,
        description="auto: RAY_ADDRESS or the cluster a job runs in, else this machine alone; local: this machine",
    )
    patience_seconds: Positive = Field(600, description="a stage in which nothing moves for this long is stopped with an error")


class Config(Settings):
    """Everything that decides what a run produces."""

    run: str = Field(description="where everything is written: local path, file:// or s3://")
    source: SourceSettings
    seed: SeedSettings = SeedSettings()
    proxy: ProxySettings = ProxySettings()
    measure: MeasureSettings = MeasureSettings()
    embed: EmbedSettings = EmbedSettings()
    extrapolate: ExtrapolateSettings = ExtrapolateSettings()
    trust: TrustSettings = TrustSettings()
    select: SelectSettings = SelectSettings()
    report: ReportSettings = ReportSettings()
    cluster: ClusterSettings = ClusterSettings()

    @model_validator(mode="after")
    def _scores_fit(self) -> Config:
        wanted, given = self.extrapolate.score, self.measure.scores
        if wanted != "auto" and wanted not in given:
            raise ValueError(f"extrapolate.score: {wanted!r} is not one of measure.scores ({', '.join(given)})")
        followed = sorted(set(given) - set(self.measure.at_checkpoints))
        if self.proxy.trajectory == "none" and followed:
            raise ValueError("proxy.trajectory: 'none' leaves nothing to compute " + ", ".join(followed))
        epochs = self.proxy.checkpoint_epochs()
        for score in self.measure.at_checkpoints:
            settings = self.measure.settings_of(score)
            if isinstance(settings, MeanSettings) and not any(map(settings.takes, epochs)):
                raise ValueError(
                    f"measure.{score}: at checkpoints, but none is between first_epoch {settings.first_epoch} and last_epoch "
                    f"{settings.last_epoch}; they are of epochs {', '.join(map(str, epochs))} (from 0). See proxy.checkpoints"
                )
        return self

    @property
    def score(self) -> str:
        """The score that is extrapolated."""
        return self.measure.scores[0] if self.extrapolate.score == "auto" else self.extrapolate.score

    @field_validator("proxy")
    @classmethod
    def _model_exists(cls, value: ProxySettings) -> ProxySettings:
        from raypipe.names import PROXY_MODELS

        if value.model not in PROXY_MODELS:
            raise ValueError(f"model: {value.model!r} is not one of {', '.join(PROXY_MODELS)}")
        return value


def parse_config(data: Mapping[str, Any]) -> Config:
    """Validate a mapping. Raises `ConfigError` with one line for each wrong field."""
    try:
        return Config.model_validate(dict(data))
    except ValidationError as error:
        raise ConfigError("bad configuration\n" + "\n".join(_lines(error))) from None


def load_config(path: str, overrides: Iterable[str] = ()) -> Config:
    """Read YAML from a path or URI and apply `section.field=value` overrides. Raises `ConfigError`.

    Relative paths in the file (`run`, `source.uri`) are relative to the working directory, as on any command line.
    """
    return absolute_paths(parse_config(apply_overrides(read_config(path), overrides)))


def read_config(path: str) -> dict[str, Any]:
    """The sections of a YAML file as they stand there, not validated. Raises `ConfigError`."""
    from raypipe.storage import read_bytes

    try:
        data = yaml.safe_load(read_bytes(path))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected sections such as 'source:' and 'proxy:', found {type(data).__name__}")
    return data


def apply_overrides(data: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `data` with every `section.field=value` set; values are YAML. Raises `ConfigError` on a malformed one."""
    result = copy.deepcopy(dict(data))
    for item in overrides:
        name, equals, text = item.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"--set {item!r}: expected section.field=value")
        *sections, field = name.strip().split(".")
        target = result
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise ConfigError(f"--set {item!r}: {section!r} is a value, not a section")
        try:
            target[field] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {item!r}: not a YAML value: {error}") from None
    return result


def absolute_paths(config: Config) -> Config:
    """Make local paths absolute, since workers have other working directories."""

    def absolute(uri: str) -> str:
        return uri if "://" in uri else os.path.abspath(os.path.expanduser(uri))

    def absolute_in(section: Section, *names: str) -> Section:
        given = {name: getattr(section, name) for name in names}
        return section.model_copy(update={name: absolute(uri) for name, uri in given.items() if uri is not None})

    source = absolute_in(config.source, "uri", "root", "class_map")
    select = absolute_in(config.select, "always_keep", "never_keep")
    return config.model_copy(update={"run": absolute(config.run), "source": source, "select": select})


def dump_config(config: Config, sections: Mapping[str, Any] | None = None) -> str:
    """The resolved configuration, or some sections of it, as YAML that `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json", include=sections), sort_keys=False, allow_unicode=True)


def commented_config() -> str:
    """A complete configuration with a comment on every field, for `raypipe init`."""
    lines = ["# A raypipe configuration. Every value shown is the default; only run and source.uri are required.", ""]
    lines += ["run: runs/first              # " + str(Config.model_fields["run"].description)]
    for name, field in Config.model_fields.items():
        section = field.annotation
        if not (isinstance(section, type) and issubclass(section, Settings)):
            continue
        lines += ["", f"# {(section.__doc__ or '').strip()}", f"{name}:"]
        lines += _commented(section, "  ")
    return "\n".join(lines) + "\n"


def _commented(section: type[Settings], indent: str) -> Iterable[str]:
    for key, info in section.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Settings):
            yield f"{indent}{key}:".ljust(29) + f"# {(info.annotation.__doc__ or '').strip()}"
            yield from _commented(info.annotation, indent + "  ")
            continue
        default = "data/train" if info.is_required() else info.default
        value = yaml.safe_dump(list(default) if isinstance(default, tuple) else default, default_flow_style=True)
        value = value.removesuffix("\n").removesuffix("\n...").strip()
        yield f"{indent}{key}: {value}".ljust(29) + f"# {info.description}"


def _lines(error: ValidationError) -> Iterable[str]:
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"] if not _is_union_branch(part)) or "configuration"
        if item["type"] == "extra_forbidden":
            yield f"  {where}: unknown setting{_suggestion(item['loc'])}"
        elif item["type"] == "missing":
            yield f"  {where}: required, but missing"
        else:
            # of a rule on several settings the input is all of the section; the message names those that matter
            what = (
                "" if item["type"] == "value_error" and isinstance(item["input"], dict) else f"{item['input']!r} is not allowed: "
            )
            yield f"  {where}: {what}{item['msg'].removeprefix('Value error, ')}"


def _is_union_branch(part: str | int) -> bool:
    # pydantic puts the tried type ("int", "literal['auto']", "constrained-int") into the location of a union's error
    return isinstance(part, str) and (part in {"int", "bool", "float", "str"} or "[" in part or "-" in part)


def _suggestion(location: tuple[str | int, ...]) -> str:
    import difflib

    model: Any = Config
    for part in location[:-1]:
        model = model.model_fields[part].annotation if part in getattr(model, "model_fields", {}) else None
    names = list(getattr(model, "model_fields", {}))
    near = difflib.get_close_matches(str(location[-1]), names, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; allowed: {', '.join(names)}" if names else ""
