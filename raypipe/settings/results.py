"""What is made of the measured scores: predictions, trust, keep-lists, the report; and where it runs."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from raypipe.settings.base import Positive, Settings
from raypipe.settings.measure import ScoreName
from raypipe.settings.proxy import PoolSettings

TrackerName = Literal["tensorboard", "mlflow", "wandb"]
KeepFraction = Annotated[float, Field(gt=0, le=1)]


class EmbedSettings(PoolSettings):
    """One forward pass over the whole source."""

    dtype: Literal["float32", "float16"] = Field("float32", description="how embeddings are stored")
    decode: Literal["cpu", "gpu", "auto"] = Field(
        "cpu",
        description="where JPEGs are decoded: gpu in batches on the actors' GPUs, other images as before; auto where there are any; pixels differ "
        "by a few levels, so that only cpu gives the same scores on every machine",
    )


HELD_OUT_OF_CLASS = 120
"""Samples of a class, on average, whose residuals say how wide its intervals are: their coverage then is right to about 3 points
(benchmarks/results/pipeline-cpu.txt)."""


SEARCHERS_PER_GPU = 8
"""Actors that share a GPU with `extrapolate.use_gpu`: the rest of their work is a CPU's, and takes longer."""


def gnn_epochs(seed: int) -> int:
    """`extrapolate.epochs: auto` of gnn, for so many seed samples: a network sees 30,000 samples in a fit, few seed samples more often."""
    return min(40, max(8, 30_000 // max(1, seed)))


class ExtrapolateSettings(Settings):
    """The score of every other sample, predicted."""

    score: ScoreName | Literal["auto"] = Field("auto", description="which of measure.scores; auto: the first")
    method: Literal["gnn", "knn", "mlp", "trees", "proxy", "gnn-published", "knn-published"] = Field(
        "gnn",
        description="gnn blends several; knn knows classes; mlp sees no neighbour; trees: boosted, on neighbours' scores; proxy: its "
        "loss, margin or entropy; *-published: as in arXiv 2506.09010",
    )
    rehearsal: bool | Literal["auto"] = Field(
        "auto",
        description="for scores that need training on the sample: train a second proxy on half of the seed set, and learn there what samples "
        "that no proxy was trained on would score; auto: with gnn, where there is no audit set",
    )
    neighbours: Positive | Literal["auto"] = Field(
        "auto", description="auto: 32 for gnn, 10 for gnn-published, chosen for knn, else 20 (mlp and proxy: for intervals alone)"
    )
    epochs: Positive | Literal["auto"] = Field(
        "auto",
        description="passes of the fit of gnn, gnn-published and mlp (at most); auto: 40 for gnn, fewer for more than 750 seed "
        "samples, 25 for gnn-published, 60 for mlp",
    )
    holdout: float = Field(0.2, gt=0, lt=0.5, description="share of the seed set kept out of a fit to judge its fidelity")
    folds: Positive | Literal["auto"] = Field(
        "auto",
        description="parts of that share held out in turn, a fit for each; auto: until there are about 120 samples for each class to "
        "tell how wide its intervals are, at most all of the seed set; 1 for gnn-published and after a rehearsal",
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
    max_actors: Positive | Literal["auto"] = Field("auto", description="auto: one per CPU, also of nodes that come later")
    use_gpu: bool = Field(
        False,
        description="search for neighbours on GPUs, each shared by eight actors, where the search is exact; the rest stays on CPUs",
    )

    @property
    def most_folds(self) -> int:
        """How many parts of the share `holdout` the seed set has."""
        return int(1 / self.holdout + 1e-9)

    def folds_of(self, seed: int, classes: int) -> int:
        """`folds` as a number, for a seed set of so many samples of so many classes."""
        if self.folds != "auto":
            return self.folds
        return min(self.most_folds, max(1, math.ceil(HELD_OUT_OF_CLASS * classes / (self.holdout * seed))))

    @model_validator(mode="after")
    def _parts_are_apart(self) -> ExtrapolateSettings:
        if self.folds != "auto" and self.folds > self.most_folds:
            raise ValueError(f"folds ({self.folds}) parts of holdout ({self.holdout:g}) are more than the seed set")
        return self

    @model_validator(mode="after")
    def _searches(self) -> ExtrapolateSettings:
        if self.use_gpu and self.method == "gnn-published":
            raise ValueError(
                "use_gpu: gnn-published finds neighbours once, for the graph of the whole source, on a CPU; leave it false"
            )
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
        "ccs",
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
    hard_cutoff: Annotated[float, Field(ge=0, lt=1)] | Literal["auto"] = Field(
        "auto", description="ccs: share of the samples, the hardest, that is left out first; auto: half of what is pruned"
    )
    strata: int = Field(50, ge=1, le=10_000, description="ccs: intervals of equal width of the score")
    beta_exponent: float = Field(4.0, gt=0, description="beta: c_D; the higher, the later easy samples are preferred")
    by_class: bool | Literal["auto"] = Field(
        "auto",
        description="the strategy works within each class, and every class keeps the same share (balanced: always); auto: with ccs",
    )
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

    @property
    def within_classes(self) -> bool:
        """`by_class` as it is meant."""
        return self.strategy == "ccs" if self.by_class == "auto" else self.by_class

    @field_validator("keep", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, int | float) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _fits(self) -> SelectSettings:
        if self.strategy == "ccs" and self.hard_cutoff != "auto" and max(self.keep) + self.hard_cutoff > 1 + 1e-9:
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
    """The HTML page, and where its figures go beside."""

    images: int = Field(24, ge=0, le=200, description="images in each grid; 0: no images at all")
    classes: int = Field(
        12,
        ge=0,
        le=100,
        description="classes with a histogram and images of their own; of more, those with the most extreme medians",
    )
    class_images: int = Field(5, ge=0, le=20, description="images at each end of the scores of such a class")
    cpu_price: float | None = Field(
        None, ge=0, description="dollars for an hour of a CPU, to say what the run cost; null: not said"
    )
    gpu_price: float | None = Field(None, ge=0, description="the same for an hour of a GPU")
    log_to: tuple[TrackerName, ...] = Field(
        (),
        description="figures and stage timings go there as well, at the end of a run: tensorboard (files in the run), mlflow, wandb (both with "
        "the page and its images); each needs its package: pip install 'raypipe[mlflow]'",
    )
    experiment: str = Field(
        "raypipe", min_length=1, max_length=128, description="MLflow's experiment and the project of Weights & Biases for log_to"
    )

    @field_validator("log_to", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("log_to")
    @classmethod
    def _once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError("each at most once")
        return value


class ClusterSettings(Settings):
    """How to reach Ray."""

    address: str = Field(
        "auto",
        min_length=1,
        description="auto: RAY_ADDRESS or the cluster a job runs in, else this machine alone; local: this machine",
    )
    patience_seconds: Positive = Field(600, description="a stage in which nothing moves for this long is stopped with an error")
