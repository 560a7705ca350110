"""What is made of the measured scores: predictions, trust, keep-lists, the report; and where it runs."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from raypipe.config.base import Positive, Settings
from raypipe.config.measure import ScoreName

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

    score: ScoreName | Literal["auto"] = Field(
        "auto", description="which of measure.scores; auto: the first"
    )
    method: Literal["gnn", "knn", "mlp", "trees", "proxy", "gnn-published", "knn-published"] = (
        Field(
            "gnn",
            description="gnn blends several; knn knows classes; mlp sees no neighbour; trees: boosted, on neighbours' scores; proxy: its "
            "loss, margin or entropy; *-published: as in arXiv 2506.09010",
        )
    )
    rehearsal: bool | Literal["auto"] = Field(
        "auto",
        description="for scores that need training on the sample: train a second proxy on half of the seed set, and learn there what samples "
        "that no proxy was trained on would score; auto: with gnn, where there is no audit set",
    )
    neighbours: Positive | Literal["auto"] = Field(
        "auto",
        description="auto: 32 for gnn, 10 for gnn-published, chosen for knn, else 20 (mlp and proxy: for intervals alone)",
    )
    epochs: Positive | Literal["auto"] = Field(
        "auto",
        description="passes of the fit of gnn, gnn-published and mlp (at most); auto: 40 for gnn, fewer for more than 750 seed "
        "samples, 25 for gnn-published, 60 for mlp",
    )
    holdout: float = Field(
        0.2,
        gt=0,
        lt=0.5,
        description="share of the seed set kept out of a fit to judge its fidelity",
    )
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
    confidence: float = Field(
        0.9, gt=0, lt=1, description="share of samples whose score lies between lower and upper"
    )
    seed: int = Field(0, ge=0, description="hold-out split and initial weights")
    max_actors: Positive | Literal["auto"] = Field(
        "auto", description="auto: one per CPU, also of nodes that come later"
    )
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
        return min(
            self.most_folds, max(1, math.ceil(HELD_OUT_OF_CLASS * classes / (self.holdout * seed)))
        )

    @model_validator(mode="after")
    def _parts_are_apart(self) -> ExtrapolateSettings:
        if self.folds != "auto" and self.folds > self.most_folds:
            raise ValueError(
                f"folds ({self.folds}) parts of holdout ({self.holdout:g}) are more than the seed set"
            )
        return self

    @model_validator(mode="after")
    def _searches(self) -> ExtrapolateSettings:
        if self.use_gpu and self.method == "gnn-published":
            raise ValueError(
                "use_gpu: gnn-published finds neighbours once, for the graph of the whole source, on a CPU; leave it false"
            )
        return self
