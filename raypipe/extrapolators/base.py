"""Interface of the extrapolators: samples as arrays in, predicted scores as an array out."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from raypipe.config import ExtrapolateSettings
from raypipe.config.base import Settings
from raypipe.config.parts import NoOptions, validated_options
from raypipe.errors import RaypipeError
from raypipe.extrapolators.neighbours import ClassNeighbours, NeighbourIndex, Neighbours
from raypipe.plugins import EXTRAPOLATOR
from raypipe.progress import ProgressCallback

TYPICAL_ROWS = 2048
"""Scored samples from which the typical distance is measured. More would cost quadratic time and
change nothing."""

DOUBTS = ("distance", "statistics", "error", "disagreement")
"""Columns of `Extrapolator.doubt`."""


@dataclass(frozen=True)
class Nodes:
    """Samples as the extrapolators see them.

    Arrays are converted to the types below.

    Attributes
    ----------
    embedding
        The proxy's features, float32 [n, d].
    label
        Class indices, int64 [n]; -1 where a sample has no label.
    signals
        Proxy statistics, float32 [n, s]: loss, margin and entropy, in this order; s can be 0.

    Raises
    ------
    RaypipeError
        An array has another number of dimensions or rows.
    """

    embedding: np.ndarray
    label: np.ndarray
    signals: np.ndarray

    def __post_init__(self) -> None:
        for name, dtype, dims in (
            ("embedding", np.float32, 2),
            ("label", np.int64, 1),
            ("signals", np.float32, 2),
        ):
            array = np.ascontiguousarray(getattr(self, name), dtype=dtype)
            if array.ndim != dims or len(array) != len(self.embedding):
                raise RaypipeError(
                    f"{name} has shape {list(array.shape)}; "
                    f"expected {dims} dimensions, {len(self.embedding)} rows"
                )
            object.__setattr__(self, name, array)

    def __len__(self) -> int:
        return len(self.label)

    def take(self, rows: np.ndarray) -> Nodes:
        """Return the samples at `rows`: positions, or a boolean mask."""
        return Nodes(self.embedding[rows], self.label[rows], self.signals[rows])

    @staticmethod
    def concat(parts: Sequence[Nodes]) -> Nodes:
        """Return all samples of `parts`, in order.

        Raises
        ------
        RaypipeError
            There are no parts, or their widths differ.
        """
        if not parts:
            raise RaypipeError("no samples to join")
        for name in ("embedding", "signals"):
            widths = sorted({getattr(part, name).shape[1] for part in parts})
            if len(widths) > 1:
                raise RaypipeError(
                    f"samples with different widths of {name} cannot be joined: {widths}"
                )
        return Nodes(
            np.concatenate([part.embedding for part in parts]),
            np.concatenate([part.label for part in parts]),
            np.concatenate([part.signals for part in parts]),
        )


class Extrapolator(abc.ABC):
    """Predicts the scores of samples that were not measured from those that were.

    The same inputs, `settings.seed` and number of torch threads give the same predictions, bit for
    bit. The global random generators play no part and keep their state. Everything runs on the CPU
    (a fit takes seconds to minutes), except the neighbour search after `search_on`.

    Attributes
    ----------
    name
        The value of `extrapolate.method` that selects this class.
    summary
        What it does, in a few words; one from outside raypipe needs it.
    Options
        Options of one from outside raypipe, which stand in `extrapolate.options` under its name.
    options
        An instance of `Options`.
    transductive
        Whether a fit needs all samples, scored or not; see `TransductiveExtrapolator`.
    default_neighbours, default_epochs
        What the setting "auto" means.
    min_samples
        Number of scored samples below which `fit` raises.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    Options: ClassVar[type[Settings]] = NoOptions
    transductive: ClassVar[bool] = False
    default_neighbours: ClassVar[int]
    default_epochs: ClassVar[int] = 1
    min_samples: ClassVar[int] = 1

    def __init__(self, settings: ExtrapolateSettings, num_classes: int) -> None:
        self.settings = settings
        self.num_classes = num_classes
        self.options: Any = NoOptions()
        if self.Options is not NoOptions:
            own = validated_options(type(self), EXTRAPOLATOR, settings.method, settings.options)
            self.options = own
        self.neighbours = (
            self.default_neighbours if settings.neighbours == "auto" else settings.neighbours
        )
        self.epochs = self.default_epochs if settings.epochs == "auto" else settings.epochs
        self._index: NeighbourIndex | None = None
        self._classes: ClassNeighbours | None = None
        self._typical = 1.0
        self._statistics_scale: list[list[float]] = []

    @abc.abstractmethod
    def fit(self, seed: Nodes, score: np.ndarray, progress: ProgressCallback | None = None) -> None:
        """Learn from the seed set and its measured scores, float [n].

        Raises
        ------
        RaypipeError
            The input is unusable: too few samples, values that are not finite, labels out of range.
        """

    @abc.abstractmethod
    def predict(self, nodes: Nodes) -> np.ndarray:
        """Return predicted scores, float32 [n], of samples outside the seed set.

        Each prediction depends on its own sample alone.
        """

    def difficulty(self, nodes: Nodes) -> np.ndarray:
        """Return how far each sample lies from the scored ones, float32 [n].

        This is its mean distance to the nearest scored samples; 1 is typical of the seed set.
        """
        self._check_nodes(nodes)
        return self._remoteness(self._nearest(nodes).distance)

    def predict_with_difficulty(self, nodes: Nodes) -> tuple[np.ndarray, np.ndarray]:
        """Return `predict` and `difficulty`, both float32 [n], with a single neighbour search."""
        return self.predict(nodes), self.difficulty(nodes)

    def doubt(self, nodes: Nodes) -> np.ndarray:
        """Return reasons to doubt the predictions, float32 [n, 4], each at least 0.

        The columns are `DOUBTS`: the `difficulty`; how far the proxy statistics lie from their
        median in the seed set; the size of the proxy's error; and how much the parts of the
        extrapolator disagree. The last two are 0 where an extrapolator does not have them.
        """
        return self._doubts(nodes, self.difficulty(nodes))

    def predict_with_doubt(self, nodes: Nodes) -> tuple[np.ndarray, np.ndarray]:
        """Return `predict`, float32 [n], and `doubt`, float32 [n, 4]."""
        predicted, difficulty = self.predict_with_difficulty(nodes)
        return predicted, self._doubts(nodes, difficulty)

    def index_of(self, embedding: np.ndarray) -> NeighbourIndex:
        """Return an index of these vectors, float32 [n, d].

        If they are the embeddings of the scored samples, the existing index is returned.
        """
        if self._index is not None and np.array_equal(self._index.vectors, embedding):
            return self._index
        return NeighbourIndex(embedding, self.settings.exact_neighbours)

    def search_on(self, device: str) -> None:
        """Search neighbours among all scored samples on this device, "cpu" or "cuda".

        Searches within a class are small and stay on the CPU.

        Raises
        ------
        RaypipeError
            The extrapolator is not fitted.
        """
        self._scored.device = device

    @abc.abstractmethod
    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return everything fitted: tensors for safetensors and metadata for JSON."""

    @abc.abstractmethod
    def load_state(self, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        """Restore a fitted extrapolator from its `state`; its predictions are bit-identical.

        Raises
        ------
        RaypipeError
            The state belongs to another method or is damaged.
        """

    # -- for subclasses -------------------------------------------------------------------------

    @property
    def _scored(self) -> NeighbourIndex:
        if self._index is None:
            raise RaypipeError(f"{self.name}: not fitted yet; call fit or load_state first")
        return self._index

    @property
    def _of_class(self) -> ClassNeighbours:
        if self._classes is None:
            raise RaypipeError(f"{self.name}: not fitted yet; call fit or load_state first")
        return self._classes

    def _nearest(self, nodes: Nodes) -> Neighbours:
        return self._scored.search(nodes.embedding, self.neighbours)

    def _remoteness(self, distance: np.ndarray) -> np.ndarray:
        """Return `difficulty` from the distances to the nearest scored samples, float32 [n, k]."""
        return (distance.mean(1) / self._typical).astype(np.float32)

    def _doubts(
        self,
        nodes: Nodes,
        difficulty: np.ndarray,
        error: np.ndarray | None = None,
        disagreement: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return `doubt`, float32 [n, 4], from its parts."""
        result = np.zeros((len(nodes), len(DOUBTS)), np.float32)
        result[:, 0] = difficulty
        if self._statistics_scale and nodes.signals.shape[1] == len(self._statistics_scale):
            scale = np.array(self._statistics_scale)
            deviation = np.abs(nodes.signals.astype(np.float64) - scale[:, 0]) / scale[:, 1]
            # the middle for statistics that are not finite, as in the fit
            result[:, 1] = np.log1p(np.where(np.isfinite(deviation), deviation, 0)).mean(1)
        for column, values in ((2, error), (3, disagreement)):
            if values is not None:
                result[:, column] = values
        return result

    def _learn_statistics(self, signals: np.ndarray) -> None:
        """Learn median and interquartile range of each proxy statistic."""
        self._statistics_scale = []
        for column in signals.T.astype(np.float64):
            finite = column[np.isfinite(column)]
            low, middle, high = np.quantile(finite, [0.25, 0.5, 0.75]) if len(finite) else (0, 0, 0)
            reach = float(high - low) or float(np.ptp(finite)) if len(finite) else 0.0
            self._statistics_scale.append([float(middle), reach or 1.0])

    def _check_fit(self, seed: Nodes, score: np.ndarray) -> np.ndarray:
        """Return the scores as float64 [n].

        Raises
        ------
        RaypipeError
            There are too few samples, a score is not finite or a label is out of range.
        """
        score = np.asarray(score, dtype=np.float64)
        if score.shape != (len(seed),):
            raise RaypipeError(
                f"{self.name}: {len(seed)} seed samples but scores of shape {list(score.shape)}"
            )
        bad = int((~np.isfinite(score)).sum())
        if bad:
            raise RaypipeError(
                f"{self.name}: {bad} of {len(score)} measured scores are not finite; "
                "leave these samples out"
            )
        if len(seed) < self.min_samples:
            raise RaypipeError(
                f"{self.name}: {len(seed)} measured samples are too few, it needs "
                f"{self.min_samples}; raise seed.fraction or use extrapolate.method knn-published"
            )
        self._check_labels(seed)
        self._learn_statistics(seed.signals)
        return score

    def _check_labels(self, nodes: Nodes) -> None:
        bad = int(((nodes.label < -1) | (nodes.label >= self.num_classes)).sum())
        if bad:
            raise RaypipeError(
                f"{self.name}: {bad} of {len(nodes)} labels are outside -1..{self.num_classes - 1}"
            )

    def _check_nodes(self, nodes: Nodes) -> None:
        if nodes.embedding.shape[1] != self._scored.width:
            raise RaypipeError(
                f"{self.name}: embeddings are {nodes.embedding.shape[1]} wide, but it was fitted "
                f"on width {self._scored.width}; embed and fit with the same proxy"
            )
        self._check_labels(nodes)

    def _build_index(
        self, embedding: np.ndarray, label: np.ndarray | None = None, max_neighbours: int = 0
    ) -> None:
        """Index the scored samples and measure their typical distance to the nearest.

        Parameters
        ----------
        embedding
            Embeddings of the scored samples, float32 [n, d].
        label
            Their classes, int64 [n]; if present, each class gets an index too.
        max_neighbours
            Neighbours that a prediction needs, if this can be more than `self.neighbours`.
        """
        exact = self.settings.exact_neighbours
        k = max(max_neighbours, self.neighbours)
        self._index = NeighbourIndex(embedding, exact, k)
        self._classes = None
        if label is not None:
            self._classes = ClassNeighbours(self._index.vectors, label, exact, k)
        rows = np.unique(
            np.linspace(0, len(embedding) - 1, min(len(embedding), TYPICAL_ROWS)).astype(np.int64)
        )
        distance, _ = self._index.search(embedding[rows], self.neighbours, exclude=rows)
        typical = float(np.median(distance.mean(1))) if distance.shape[1] else 0.0
        self._typical = typical if typical > 0 else 1.0

    def _base_state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        meta = {
            "method": self.name,
            "num_classes": self.num_classes,
            "neighbours": self.neighbours,
            "typical": self._typical,
            "statistics": self._statistics_scale,
        }
        tensors = {f"index.{name}": value for name, value in self._scored.tensors().items()}
        search = self._scored.quality.as_dict()
        if self._classes is not None:
            tensors |= {f"class.{name}": value for name, value in self._classes.lists().items()}
            search["classes"] = {
                str(y): quality.as_dict() for y, quality in self._classes.quality().items()
            }
        return tensors, meta | {"search": search}

    def _load_base(
        self, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any], classes: bool = False
    ) -> None:
        """Restore what `_base_state` returned.

        With `classes`, also restore the class indexes, using the labels in the tensor `label`.
        """
        if meta.get("method") != self.name:
            raise RaypipeError(
                f"a fitted {meta.get('method')!r} cannot be loaded as {self.name!r}; "
                "fit the extrapolator again"
            )
        try:
            self.num_classes, self.neighbours = int(meta["num_classes"]), int(meta["neighbours"])
            self._typical = float(meta["typical"])
            # version 0.2.0 or older did not have it
            self._statistics_scale = [
                [float(middle), float(reach)] for middle, reach in meta.get("statistics", [])
            ]
            self._index = NeighbourIndex.from_tensors(tensors, "index.")
            if classes:
                label = np.array(tensors["label"], np.int64)
                if label.shape != (len(self._index),):
                    raise ValueError(
                        f"{list(label.shape)} labels do not match an index of {len(self._index)}"
                    )
                lists = {
                    name.removeprefix("class."): value
                    for name, value in tensors.items()
                    if name.startswith("class.")
                }
                self._classes = ClassNeighbours(self._index.vectors, label, lists=lists)
        except KeyError as error:
            raise RaypipeError(
                f"{self.name}: the fitted extrapolator is damaged: {error} is missing; fit it again"
            ) from None
        except (TypeError, ValueError) as error:
            raise self._damaged(error) from None

    def _damaged(self, error: Exception) -> RaypipeError:
        """Return the error to raise for a state that cannot be restored."""
        return RaypipeError(
            f"{self.name}: the fitted extrapolator is damaged ({error}); fit it again"
        )


class TransductiveExtrapolator(Extrapolator):
    """An extrapolator whose graph holds all samples, scored or not; it needs them all at once."""

    transductive = True

    def fit(self, seed: Nodes, score: np.ndarray, progress: ProgressCallback | None = None) -> None:
        """Raise RaypipeError: the graph needs all samples."""
        raise RaypipeError(f"{self.name}: the graph holds all samples; use fit_graph")

    def predict(self, nodes: Nodes) -> np.ndarray:
        """Raise RaypipeError: only samples in the graph have a prediction."""
        raise RaypipeError(
            f"{self.name}: only samples in the graph have a prediction; "
            "use attach_graph and predict_rows"
        )

    @abc.abstractmethod
    def fit_graph(
        self,
        nodes: Nodes,
        scored: np.ndarray,
        score: np.ndarray,
        progress: ProgressCallback | None = None,
    ) -> None:
        """Build the graph over all samples and learn from the scored ones.

        Parameters
        ----------
        nodes
            All n samples.
        scored
            Rows of the scored samples in `nodes`, int64 [m].
        score
            Their scores, float [m].
        progress
            Called as the fit advances.
        """

    @abc.abstractmethod
    def attach_graph(self, nodes: Nodes) -> None:
        """Build the graph over all `nodes` for predictions by a fitted extrapolator.

        Needed after `load_state`, and for new samples.
        """

    @abc.abstractmethod
    def predict_rows(self, rows: np.ndarray) -> np.ndarray:
        """Return predicted scores, float32 [m], of the graph's samples at `rows`."""
