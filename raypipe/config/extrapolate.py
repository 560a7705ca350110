"""Settings of the extrapolation of measured scores to all other samples."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from raypipe.config.base import Positive, Settings
from raypipe.config.measure import OwnScore
from raypipe.config.parts import OrPart, PartOptions, check_names
from raypipe.plugins import EXTRAPOLATOR, SCORE

HELD_OUT_OF_CLASS = 120
"""Held-out samples per class, on average, that calibrate the width of its intervals. The coverage
is then right to about 3 points (benchmarks/results/pipeline-cpu.txt)."""
SEARCHERS_PER_GPU = 8
"""Actors that share a GPU with `extrapolate.use_gpu`. The rest of their work runs on a CPU and
takes longer."""


OwnMethod = Literal["gnn", "knn", "mlp", "trees", "proxy", "gnn-published", "knn-published"]
"""Extrapolators of raypipe."""


def gnn_epochs(seed: int) -> int:
    """Return `extrapolate.epochs: auto` of gnn for a seed set of `seed` samples.

    A network sees about 30,000 samples in a fit, so a small seed set is passed more often.
    """
    return min(40, max(8, 30_000 // max(1, seed)))


class ExtrapolateSettings(Settings):
    """Extrapolate: predict the score of every sample that was not measured."""

    score: Annotated[str, OrPart(SCORE, Literal[OwnScore, "auto"])] = Field(
        "auto", description="Score to extrapolate, one of measure.scores. auto: the first."
    )
    method: Annotated[str, OrPart(EXTRAPOLATOR, OwnMethod)] = Field(
        "gnn",
        description="Extrapolator. gnn blends several. knn: neighbours, aware of classes. mlp: "
        "uses no neighbours. trees: boosted trees on the neighbours' scores. proxy: the proxy's "
        "loss, margin or entropy. *-published: as in arXiv 2506.09010. module:Class names one of "
        "your own.",
    )
    options: PartOptions = Field(
        {},
        description="Options of extrapolators from other packages: {name: {option: value}}.",
    )
    rehearsal: bool | Literal["auto"] = Field(
        "auto",
        description="Train a second proxy on half of the seed set, to learn how samples outside "
        "the training set score. For scores that require training on the sample. auto: with gnn, "
        "if the score cannot be measured on an audit set.",
    )
    neighbours: Positive | Literal["auto"] = Field(
        "auto",
        description="Neighbours per sample. auto: 32 for gnn, 10 for gnn-published, chosen from "
        "the data for knn, otherwise 20 (mlp and proxy use them for intervals only).",
    )
    epochs: Positive | Literal["auto"] = Field(
        "auto",
        description="Passes of the fit over the seed set, for gnn, gnn-published and mlp (at "
        "most). auto: 40 for gnn, fewer above 750 seed samples; 25 for gnn-published; 60 for mlp.",
    )
    holdout: float = Field(
        0.2,
        gt=0,
        lt=0.5,
        description="Share of the seed set held out of a fit to assess its fidelity, below 0.5.",
    )
    folds: Positive | Literal["auto"] = Field(
        "auto",
        description="Cross-validation folds of size holdout, one fit each. auto: enough for about "
        "120 held-out samples per class to calibrate intervals, at most the whole seed set; 1 for "
        "gnn-published and after a rehearsal.",
    )
    judge_published: bool | Literal["auto"] = Field(
        "auto",
        description="Also assess gnn-published for comparison. Its graph holds the whole source. "
        "auto: for sources up to 10,000 samples.",
    )
    audit_extremes: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description="Samples with extreme predictions to measure in addition, to assess scores at "
        "checkpoints where errors are largest. auto: about as many as seed.audit. 0: none.",
    )
    exact_neighbours: Positive = Field(
        50_000,
        description="Largest number of samples that is searched exactly for neighbours. Above it, "
        "inverted lists are searched with a measured recall of 0.95.",
    )
    confidence: float = Field(
        0.9,
        gt=0,
        lt=1,
        description="Share of samples whose score should lie between lower and upper, 0 to 1.",
    )
    seed: int = Field(
        0, ge=0, description="Random seed of the hold-out split and the initial weights."
    )
    max_actors: Positive | Literal["auto"] = Field(
        "auto",
        description="Largest number of actors. auto: one per CPU, including nodes that join later.",
    )
    use_gpu: bool = Field(
        False,
        description="Run the exact neighbour search on GPUs, each shared by eight actors. "
        "Everything else stays on CPUs.",
    )

    @property
    def max_folds(self) -> int:
        """Number of folds of size `holdout` in the seed set."""
        return int(1 / self.holdout + 1e-9)

    def folds_of(self, seed: int, classes: int) -> int:
        """Return `folds` as a number for a seed set of `seed` samples in `classes` classes."""
        if self.folds != "auto":
            return self.folds
        return min(
            self.max_folds, max(1, math.ceil(HELD_OUT_OF_CLASS * classes / (self.holdout * seed)))
        )

    @model_validator(mode="after")
    def _folds_fit(self) -> ExtrapolateSettings:
        if self.folds != "auto" and self.folds > self.max_folds:
            raise ValueError(
                f"folds ({self.folds}) of size holdout ({self.holdout:g}) are more than the seed "
                f"set; set folds to at most {self.max_folds}"
            )
        return self

    @model_validator(mode="after")
    def _options_of_others(self) -> ExtrapolateSettings:
        check_names(self.options, OwnMethod, "extrapolate")
        return self

    @model_validator(mode="after")
    def _gpu_search_possible(self) -> ExtrapolateSettings:
        if self.use_gpu and self.method == "gnn-published":
            raise ValueError(
                "use_gpu: gnn-published searches neighbours once, on a CPU, for the graph of the "
                "whole source; set use_gpu to false"
            )
        return self
