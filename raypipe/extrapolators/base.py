"""What every extrapolator takes and gives: samples as arrays in, predicted scores as an array out."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from raypipe.config import ExtrapolateSettings
from raypipe.errors import RaypipeError
from raypipe.extrapolators.neighbours import ClassNeighbours, NeighbourIndex
from raypipe.progress import ProgressCallback

TYPICAL_ROWS = 2048
"""Scored samples from which the typical distance is taken; more would cost quadratic time and change nothing."""


@dataclass(frozen=True)
class Nodes:
    """Samples as the extrapolators see them. Arrays are converted to the types below; lengths must agree.

    embedding  float32 [n, d], the proxy's features
    label      int64 [n], class index, -1 where there is no label
    signals    float32 [n, s], what the proxy says of the sample: loss, margin, entropy, in this order; s may be 0
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
                    f"{name} has shape {list(array.shape)}; expected {dims} dimensions, {len(self.embedding)} rows"
                )
            object.__setattr__(self, name, array)

    def __len__(self) -> int:
        return len(self.label)

    def take(self, rows: np.ndarray) -> Nodes:
        """The samples at `rows`: positions, or a mask of bools."""
        return Nodes(self.embedding[rows], self.label[rows], self.signals[rows])

    @staticmethod
    def concat(parts: Sequence[Nodes]) -> Nodes:
        """All samples of `parts`, in order. Raises RaypipeError when widths differ or there are no parts."""
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
    """Predicts the score of samples that were not measured from those that were.

    The same inputs, `settings.seed` and number of torch threads give the same predictions, bit for bit, whatever the state of
    the global random generators, which stays as it was. Everything runs on CPU (a fit is seconds to minutes), but for the search for
    neighbours after `search_on`.
    """

    name: ClassVar[str]
    transductive: ClassVar[bool] = False
    default_neighbours: ClassVar[int]
    default_epochs: ClassVar[int] = 1
    fewest: ClassVar[int] = 1
    """Scored samples below which `fit` refuses."""

    def __init__(self, settings: ExtrapolateSettings, num_classes: int) -> None:
        self.settings = settings
        self.num_classes = num_classes
        self.neighbours = (
            self.default_neighbours if settings.neighbours == "auto" else settings.neighbours
        )
        self.epochs = self.default_epochs if settings.epochs == "auto" else settings.epochs
        self._index: NeighbourIndex | None = None
        self._classes: ClassNeighbours | None = None
        self._typical = 1.0

    @abc.abstractmethod
    def fit(self, seed: Nodes, score: np.ndarray, progress: ProgressCallback | None = None) -> None:
        """Learn from the seed set and its measured scores, float [n]. Raises RaypipeError for input it cannot learn from."""

    @abc.abstractmethod
    def predict(self, nodes: Nodes) -> np.ndarray:
        """Predicted scores, float32 [n], of samples outside the fitted seed set. Each depends on its own sample alone."""

    def difficulty(self, nodes: Nodes) -> np.ndarray:
        """How far each sample lies from the scored ones, float32 [n]: its mean distance to the nearest, 1 = typical of the seed set."""
        self._check_nodes(nodes)
        return self._remoteness(self._nearest(nodes)[0])

    def predict_with_difficulty(self, nodes: Nodes) -> tuple[np.ndarray, np.ndarray]:
        """What `predict` and `difficulty` give, both float32 [n]; a method that looks at neighbours searches for them once."""
        return self.predict(nodes), self.difficulty(nodes)

    def index_of(self, embedding: np.ndarray) -> NeighbourIndex:
        """An index of these vectors, float32 [n, d]: that of the scored samples where they are the same, else a new one."""
        if self._index is not None and np.array_equal(self._index.vectors, embedding):
            return self._index
        return NeighbourIndex(embedding, self.settings.exact_neighbours)

    def search_on(self, device: str) -> None:
        """Look for neighbours among all scored samples on this device, cpu or cuda, from now on; those within classes are few.

        Raises RaypipeError before a fit.
        """
        self._scored.device = device

    @abc.abstractmethod
    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Everything fitted: tensors fit for safetensors, and meta data fit for JSON."""

    @abc.abstractmethod
    def load_state(self, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        """Restore what `state` gave; predictions are then bit-equal."""

    # -- for subclasses -------------------------------------------------------------------------------------------

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

    def _nearest(self, nodes: Nodes) -> tuple[np.ndarray, np.ndarray]:
        return self._scored.search(nodes.embedding, self.neighbours)

    def _remoteness(self, distance: np.ndarray) -> np.ndarray:
        """`difficulty` from the distances to the nearest, float32 [n, k]."""
        return (distance.mean(1) / self._typical).astype(np.float32)

    def _check_fit(self, seed: Nodes, score: np.ndarray) -> np.ndarray:
        """The scores as float64 [n]. Raises RaypipeError for too few samples, bad scores or bad labels."""
        score = np.asarray(score, dtype=np.float64)
        if score.shape != (len(seed),):
            raise RaypipeError(
                f"{self.name}: {len(seed)} seed samples but scores of shape {list(score.shape)}"
            )
        bad = int((~np.isfinite(score)).sum())
        if bad:
            raise RaypipeError(
                f"{self.name}: {bad} of {len(score)} measured scores are not finite; leave these samples out"
            )
        if len(seed) < self.fewest:
            raise RaypipeError(
                f"{self.name}: {len(seed)} measured samples are too few, it needs {self.fewest}; raise seed.fraction, "
                "or use extrapolate.method knn-published"
            )
        self._check_labels(seed)
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
                f"{self.name}: embeddings are {nodes.embedding.shape[1]} wide, but it was fitted on {self._scored.width}; "
                "embed and fit with the same proxy"
            )
        self._check_labels(nodes)

    def _build_index(
        self, embedding: np.ndarray, label: np.ndarray | None = None, most: int = 0
    ) -> None:
        """Index the scored samples, given labels also each class of them, and measure what distance to the nearest is typical.

        `most`: neighbours that a prediction asks for, where these may be more than `self.neighbours`.
        """
        exact, most = self.settings.exact_neighbours, max(most, self.neighbours)
        self._index = NeighbourIndex(embedding, exact, most)
        self._classes = (
            ClassNeighbours(self._index.vectors, label, exact, most) if label is not None else None
        )
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
        """Restore what `_base_state` gave; `classes`: also the indexes of classes, by the labels in the tensor `label`."""
        if meta.get("method") != self.name:
            raise RaypipeError(
                f"a fitted {meta.get('method')!r} cannot be loaded as {self.name!r}; fit the extrapolator again"
            )
        try:
            self.num_classes, self.neighbours = int(meta["num_classes"]), int(meta["neighbours"])
            self._typical = float(meta["typical"])
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
            raise RaypipeError(
                f"{self.name}: the fitted extrapolator is damaged ({error}); fit it again"
            ) from None


class TransductiveExtrapolator(Extrapolator):
    """An extrapolator whose graph holds all samples, scored or not, and so needs them all at once."""

    transductive = True

    def fit(self, seed: Nodes, score: np.ndarray, progress: ProgressCallback | None = None) -> None:
        """Refused: the graph needs all samples. Raises RaypipeError."""
        raise RaypipeError(f"{self.name}: the graph holds all samples; use fit_graph")

    def predict(self, nodes: Nodes) -> np.ndarray:
        """Refused: only samples of the graph have a prediction. Raises RaypipeError."""
        raise RaypipeError(
            f"{self.name}: only samples of the graph have a prediction; use attach_graph and predict_rows"
        )

    @abc.abstractmethod
    def fit_graph(
        self,
        nodes: Nodes,
        scored: np.ndarray,
        score: np.ndarray,
        progress: ProgressCallback | None = None,
    ) -> None:
        """Build the graph over all `nodes` and learn from those at rows `scored`, int64 [m], with scores float [m]."""

    @abc.abstractmethod
    def attach_graph(self, nodes: Nodes) -> None:
        """Build the graph over all `nodes` for predictions with what was fitted (after `load_state`, or with new samples)."""

    @abc.abstractmethod
    def predict_rows(self, rows: np.ndarray) -> np.ndarray:
        """Predicted scores, float32 [m], of the graph's samples at `rows`."""
