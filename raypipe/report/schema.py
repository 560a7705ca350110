"""The content of `report/summary.json`, section by section.

A figure that the run does not have is None. `score` values are scores, shares are from 0 to 1.
"""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict

Evaluation = dict[str, Any]
"""The content of `evaluation/summary.json`, and `outdated`: it was made for earlier scores."""


class SourceSection(TypedDict):
    """What was scored.

    `pseudo_labels` is a sentence where the source has no labels, `depth_note` one on what is lost
    of 16-bit images. `tables` has embeddings, scores and score_column of `raypipe extrapolate`.
    """

    uri: str
    format: str
    classes: int
    pseudo_labels: str | None
    files: int | None
    fragments: int | None
    bytes: int | None
    depth_note: str | None
    tables: dict[str, str] | None


class Counts(TypedDict):
    """Samples; `accounted`: every indexed sample has a score or is a reject."""

    indexed: int | None
    samples: int
    measured: int
    extrapolated: int
    unlabelled: int
    not_finite: int
    rejects: int
    unreadable_files: int
    accounted: bool | None


class Agreement(TypedDict):
    """Correlations of predicted with measured scores, and overlaps of their keep-lists.

    `overlap` and `overlap_interval` are by keep fraction, as text.
    """

    spearman: float | None
    spearman_low: float | None
    spearman_high: float | None
    pearson: float | None
    pearson_low: float | None
    pearson_high: float | None
    overlap: dict[str, float]
    overlap_interval: dict[str, list[float]]
    spearman_within: NotRequired[float | None]
    spearman_within_low: NotRequired[float | None]
    spearman_within_high: NotRequired[float | None]


class HeldOutFidelity(Agreement):
    """Agreement on held-out samples, of the extrapolator and of every baseline.

    `within_classes`: keep-lists are cut within classes, and so `spearman_within` decides.
    """

    n_fit: int | None
    n_held: int | None
    note: str | None
    judged_on: str | None
    baselines: dict[str, Agreement]
    within_classes: NotRequired[bool]
    n_extremes: NotRequired[int | None]
    rmse: NotRequired[float | None]
    spread: NotRequired[float | None]
    ceiling: NotRequired[dict[str, Any] | None]
    coverage: NotRequired[dict[str, Any] | None]
    proxy_accuracy: NotRequired[float | None]
    proxy_chance: NotRequired[float | None]
    proxy_balanced: NotRequired[dict[str, float] | None]


class Fidelity(HeldOutFidelity):
    """The fidelity to go by, with a one-word verdict and a sentence."""

    method: str | None
    score: str | None
    verdict: str
    sentence: str


class Histogram(TypedDict):
    """Counts of samples by score.

    `edges` has one number more than the counts; the end bins hold everything beyond.
    """

    edges: list[float]
    measured: list[int]
    extrapolated: list[int]


class Scores(TypedDict):
    """All finite scores."""

    low: float | None
    high: float | None
    mean: float | None
    histogram: Histogram | None


class ClassShare(TypedDict):
    """A class, and the share of it that a keep-list holds."""

    name: str
    share: float


class KeepListFigures(TypedDict):
    """What a keep-list holds; see `raypipe.report.keep_lists`.

    `reason` and `candidate`: with strategy auto, why it was cut like this, and the candidate of the
    pilot that it is; else empty.
    """

    fraction: float
    file: str
    strategy: str | None
    by_class: bool
    forced: bool
    samples: int
    lowest_score: float | None
    emptied_classes: int
    even_classes: float
    reason: str
    candidate: str
    least_kept: NotRequired[ClassShare]
    most_kept: NotRequired[ClassShare]


class SetFigures(TypedDict):
    """Share of a set that a keep-list holds, and the range that chance allows."""

    share: float
    low: float
    high: float
    within_chance: bool


class SetShares(TypedDict):
    """Whether keep-lists hold the same share of the seed set, the audit set and the rest.

    `samples` is by set, `lists` by file name and set. `sentence` names the lists whose shares
    differ by more than chance; empty without any.
    """

    samples: dict[str, int]
    lists: dict[str, dict[str, SetFigures]]
    sentence: str


class ClassName(TypedDict):
    """A class and its size; the label None stands for the unlabelled samples."""

    label: int | None
    name: str
    samples: int


class ShownClass(ClassName):
    """A class that the page lists, with quantiles of its scores."""

    q10: float | None
    q25: float | None
    q50: float | None
    q75: float | None
    q90: float | None


class ClassFigures(ShownClass):
    """Every class. `kept` counts its samples in each keep-list, by file name."""

    measured: int
    mean_score: float | None
    kept: dict[str, int]


class ClassHistogram(ClassName):
    """Counts of a class in bins of equal width between the outer edges of the histogram."""

    measured: list[int]
    extrapolated: list[int]


class StageCost(TypedDict):
    """What a stage took, from the ledger."""

    stage: str
    state: str
    samples: int
    wall_seconds: float
    cpu_seconds: float
    gpu_seconds: float
    attempts: int
    dollars: float | None


class TotalCost(TypedDict):
    """The stages together."""

    wall_seconds: float
    cpu_seconds: float
    gpu_seconds: float
    dollars: float | None


class Prices(TypedDict):
    """Dollars an hour."""

    cpu: float | None
    gpu: float | None


class Saving(TypedDict):
    """Seconds spent on the scores, and what measuring every sample would have taken."""

    measured_share: float | None
    spent: float | None
    everything: float | None
    factor: float | None


class Cost(TypedDict):
    """Time and money."""

    stages: list[StageCost]
    total: TotalCost
    prices: Prices
    saving: Saving


class Trained(TypedDict):
    """Accuracies in the evaluation: on the leading keep-list, on random lists, on everything."""

    model: str
    list: dict[str, Any]
    random: dict[str, Any]
    everything: dict[str, Any]


class Difference(TypedDict):
    """A difference of accuracies, as a share, with its 95 % interval."""

    mean: float
    low: float
    high: float


class Expected(TypedDict):
    """What the pilot predicts for a list of the whole source.

    `against_random`: None for a list that is random itself.
    """

    model: str
    tried: int
    against_random: Difference | None
    against_everything: Difference


class PilotList(TypedDict):
    """What the pilot predicts at a keep fraction: gains by candidate, and the list's own."""

    fraction: float
    gains: dict[str, dict[str, Any]]
    expected: Expected | None


class PilotSection(TypedDict):
    """The pilot. `lists` has an entry for each keep-list; empty if nothing was trained."""

    note: str
    trainings: int
    model: str
    samples: int
    tested: int
    lists: list[PilotList]


class HeadlineFigures(TypedDict):
    """The leading keep-list and what it saves; see `raypipe.report.cost.headline`."""

    fraction: float
    file: str
    strategy: str | None
    by_class: bool
    samples: int
    of: int
    least_kept: ClassShare | None
    most_kept: ClassShare | None
    saved_share: float
    epochs: int
    training_seconds: float | None
    saved_seconds: float | None
    scores_seconds: float | None
    trainings: int | None
    trained: Trained | None
    expected: Expected | None
    reason: str
    candidate: str


class Headline(HeadlineFigures):
    """The leading keep-list in figures and in sentences."""

    sentences: list[str]


class Embeddings(TypedDict):
    """What the embedding shards that were read contain."""

    shards_read: int
    shards: int
    suspects: int
    proxy_agrees: float | None
    mapped: int
    explained: tuple[float, float] | None
    kept: int | None


class Tile(TypedDict):
    """A sample of an image grid; see `raypipe.report.score_scan.Pick`."""

    sample_id: str
    fragment: str
    label: int | None
    score: float
    lower: float | None
    upper: float | None
    measured: bool
    prediction: int | None
    confidence: float | None
    margin: float | None
    label_name: str
    prediction_name: NotRequired[str]


class ClassGrid(ClassName):
    """The samples of a class with the lowest and with the highest scores."""

    lowest: list[Tile]
    highest: list[Tile]


class FragmentCount(TypedDict):
    """Fragments that were searched for class grids, of all fragments with scores."""

    read: int
    there: int


class RejectReason(TypedDict):
    """How many samples were rejected for a reason, and the id of one of them."""

    reason: str
    samples: int
    example: str


class UnreadableFile(TypedDict):
    """A file none of whose samples could be read."""

    path: str
    reason: str


class Rejects(TypedDict):
    """Samples and files that could not be used. The lists hold the most frequent or the first."""

    samples: int
    reasons: list[RejectReason]
    distinct_reasons: int
    files: int
    unreadable_files: list[UnreadableFile]


class Summary(TypedDict):
    """Everything in `summary.json`."""

    format: int
    raypipe: str
    made: str
    run: str
    unfinished: list[str]
    refused: str | None
    source: SourceSection
    counts: Counts
    headline: Headline | None
    high_is_hard: bool
    code: list[dict[str, Any]]
    fidelity: Fidelity
    fidelity_seed: HeldOutFidelity | None
    stability: dict[str, Any] | None
    learning_curve: dict[str, Any] | None
    neighbour_search: dict[str, Any] | None
    label_noise: dict[str, Any] | None
    scores: Scores
    keep: list[KeepListFigures]
    sets: SetShares | None
    even_classes: float
    classes: list[ClassFigures]
    shown_classes: list[ShownClass]
    class_histograms: list[ClassHistogram]
    cost: Cost
    pilot: PilotSection | None
    evaluation: Evaluation | None
    embeddings: Embeddings
    grids: dict[str, list[Tile]]
    class_grids: list[ClassGrid]
    class_fragments: FragmentCount
    rejects: Rejects
    settings: dict[str, Any]
