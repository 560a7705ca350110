"""The input of trajectory scores: what the proxy predicted for each sample at each epoch.

Rules common to all trajectory scores:

- An epoch in which a sample was not seen (its probabilities are not finite) takes the values of
  the epoch before it, as in the official code of Dynamic Uncertainty. Epochs before the first one
  seen take the values of that first one. A sample that was never seen is an error.
- A trajectory with fewer epochs than a score needs is an error that names both numbers.
- Scores never compare a sample with others. So a class with one sample is no special case, and a
  large seed set can be scored in parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from raypipe.errors import RaypipeError

MIN_PROBABILITY = float(np.finfo(np.float16).smallest_subnormal)
"""Lower bound of a probability inside a logarithm: float16 storage can round probabilities to 0."""
STATISTICS = ("loss", "margin", "distance", "entropy")
"""Statistics stored per sample and epoch, in storage order; `Trajectory` defines each of them.

`raypipe.vision.output_statistics` computes them during training. A score that lists only
statistics in `ScoreInfo.reads` does not need the much larger probabilities (see
`raypipe.scores.registry`).
"""


class ScoreError(RaypipeError):
    """A score cannot be computed from the given data."""


class Trajectory:
    """Predictions of the proxy for some samples at every epoch.

    Create one with `from_probabilities` or `from_recorded`: they check the data and fill epochs in
    which a sample was not seen. Statistics that were recorded during the training are used as they
    are; the others are computed from the probabilities.

    Attributes
    ----------
    label : np.ndarray
        Class labels, int64 [samples].
    epochs : int
        Number of epochs.
    probabilities : np.ndarray
        Class probabilities, float32 [epochs, samples, classes].
    loss : np.ndarray
        Cross-entropy, -log p(label), float32 [epochs, samples].
    margin : np.ndarray
        Logit of the label minus the largest other logit, float32 [epochs, samples].
    distance : np.ndarray
        Euclidean distance from the probabilities to the one-hot label, float32 [epochs, samples].
    entropy : np.ndarray
        Entropy of the probabilities in nats, float32 [epochs, samples].
    label_probability : np.ndarray
        Probability of the label, float32 [epochs, samples].
    runner_up_probability : np.ndarray
        Largest probability of another class, float32 [epochs, samples].
    """

    def __init__(self, label: np.ndarray, arrays: Mapping[str, np.ndarray]) -> None:
        self.label = label
        self.epochs = len(next(iter(arrays.values())))
        self._arrays = dict(arrays)

    @classmethod
    def from_probabilities(
        cls, probabilities: np.ndarray, label: np.ndarray, margin: np.ndarray | None = None
    ) -> Trajectory:
        """Return a checked trajectory computed from probabilities.

        Parameters
        ----------
        probabilities : np.ndarray
            Float [epochs, samples, classes]; not finite where a sample was not seen in an epoch.
        label : np.ndarray
            Int [samples].
        margin : np.ndarray, optional
            Margin of the logits, float [epochs, samples]. Without it the margin of the
            log-probabilities is used, which is the same number unless a probability is 0.

        Raises
        ------
        ScoreError
            If the shapes do not match, a label is not a class, or a sample was never seen.
        """
        probabilities = np.asarray(probabilities, np.float32)
        label = np.asarray(label, np.int64)
        if probabilities.ndim != 3 or label.shape != probabilities.shape[1:2]:
            raise ScoreError(
                "a trajectory needs probabilities [epochs, samples, classes] and one label per "
                f"sample; got {probabilities.shape} and {label.shape}"
            )
        if probabilities.shape[0] < 1 or probabilities.shape[2] < 2:
            raise ScoreError(
                f"a trajectory needs at least one epoch and two classes; got {probabilities.shape}"
            )
        if len(label) and not ((label >= 0) & (label < probabilities.shape[2])).all():
            raise ScoreError(f"labels must be 0..{probabilities.shape[2] - 1}")
        if margin is None:
            margin = label_margins(probabilities, label)
        margin = np.asarray(margin, np.float32)
        seen = np.isfinite(probabilities).all(2) & np.isfinite(margin)
        return cls(label, _fill_unseen({"probabilities": probabilities, "margin": margin}, seen))

    @classmethod
    def from_recorded(cls, label: np.ndarray, arrays: Mapping[str, np.ndarray]) -> Trajectory:
        """Return a checked trajectory from the arrays that the training stored.

        Parameters
        ----------
        label : np.ndarray
            Int64 [samples].
        arrays : Mapping[str, np.ndarray]
            At least one of `STATISTICS` by name, float32 [epochs, samples], and optionally
            "probabilities", float32 [epochs, samples, classes]. Statistics are not finite where a
            sample was not seen in an epoch or its logits were not finite; only they are checked,
            not the probabilities.

        Raises
        ------
        ScoreError
            If a sample was never seen.
        """
        statistics = [values for name, values in arrays.items() if name in STATISTICS]
        seen = np.logical_and.reduce([np.isfinite(values) for values in statistics])
        return cls(label, _fill_unseen(arrays, seen))

    @property
    def probabilities(self) -> np.ndarray:
        return self._array("probabilities")

    @property
    def loss(self) -> np.ndarray:
        return self._array("loss")

    @property
    def margin(self) -> np.ndarray:
        return self._array("margin")

    @property
    def distance(self) -> np.ndarray:
        return self._array("distance")

    @property
    def entropy(self) -> np.ndarray:
        return self._array("entropy")

    @property
    def label_probability(self) -> np.ndarray:
        return np.exp(-self.loss)

    @property
    def runner_up_probability(self) -> np.ndarray:
        return np.exp(-self.loss - self.margin)  # log p_other = log p_label - margin

    def _array(self, name: str) -> np.ndarray:
        if name not in self._arrays:
            if "probabilities" not in self._arrays:
                raise ScoreError(
                    f"the trajectory was read without {name}; add it to `reads` of the score"
                )
            self._arrays[name] = _FROM_PROBABILITIES[name](self.probabilities, self.label)
        return self._arrays[name]


def label_margins(probabilities: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Return log p_label - max log p_other, float32 [epochs, samples]."""
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(np.maximum(probabilities, MIN_PROBABILITY, dtype=np.float32))
    own = np.take_along_axis(logs, label[None, :, None], 2)[..., 0]
    np.put_along_axis(logs, label[None, :, None], -np.inf, 2)
    return (own - logs.max(2)).astype(np.float32)


def require_epochs(name: str, epochs: int, minimum: int, reason: str) -> None:
    """Raise ScoreError if `epochs` is below the `minimum` that the score `name` needs."""
    if epochs < minimum:
        raise ScoreError(
            f"{name} needs at least {minimum} epochs ({reason}), but the trajectory has {epochs}; "
            "raise proxy.epochs"
        )


def epoch_range(epochs: int, first: int, last: int | None) -> slice:
    """Return the epochs `first` (0-based) up to but excluding `last`; None means up to the end.

    Raises
    ------
    ScoreError
        If the range is empty.
    """
    if not 0 <= first < (epochs if last is None else min(last, epochs)):
        raise ScoreError(
            f"there are no epochs between first_epoch {first} and last_epoch {last}: the "
            f"trajectory has {epochs}"
        )
    return slice(first, last)


def sliding_moments(values: np.ndarray, window: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield mean and sum of squared deviations of every window, each float64 [samples].

    Parameters
    ----------
    values : np.ndarray
        Probabilities, float [epochs, samples].
    window : int
        Epochs in a window.

    Notes
    -----
    The sums are updated from window to window. This leaves an uncertainty in a window's deviation
    of about 1e-8 of the largest deviation of its sample.
    """
    shift = values[0].astype(np.float64)
    moved = values - shift  # a constant gives exactly 0
    total, squares = moved[:window].sum(0), np.square(moved[:window]).sum(0)
    for start in range(len(values) - window + 1):
        if start:
            new, old = moved[start + window - 1], moved[start - 1]
            total += new - old
            squares += np.square(new) - np.square(old)
        mean = total / window
        yield shift + mean, np.maximum(squares - total * mean, 0)


def _fill_unseen(arrays: Mapping[str, np.ndarray], seen: np.ndarray) -> Mapping[str, np.ndarray]:
    """Fill every epoch in which a sample was not seen with the values of an earlier epoch.

    `seen` is bool [epochs, samples]. Epochs before the first one seen take that one's values.
    """
    if seen.all():
        return arrays
    never = ~seen.any(0)
    if never.any():
        raise ScoreError(
            f"{int(never.sum())} samples have no finite prediction in any epoch; the training "
            "diverged (lower proxy.lr)"
        )
    source, columns = _last_seen(seen), np.arange(seen.shape[1])[None]
    return {name: values[source, columns] for name, values in arrays.items()}


def _last_seen(seen: np.ndarray) -> np.ndarray:
    """Return the epoch whose values each epoch and sample takes, int [epochs, samples]."""
    epochs = np.arange(len(seen))[:, None]
    last = np.maximum.accumulate(np.where(seen, epochs, -1), 0)
    return np.where(last < 0, seen.argmax(0)[None], last)


def _losses(probabilities: np.ndarray, label: np.ndarray) -> np.ndarray:
    own = np.take_along_axis(probabilities, label[None, :, None], 2)[..., 0]
    return -np.log(np.maximum(own, MIN_PROBABILITY))


def _distances(probabilities: np.ndarray, label: np.ndarray) -> np.ndarray:
    difference = probabilities.astype(np.float64)
    difference[:, np.arange(len(label)), label] -= 1
    return np.sqrt(np.square(difference).sum(2)).astype(np.float32)


def _entropies(probabilities: np.ndarray, label: np.ndarray) -> np.ndarray:
    terms = probabilities * np.log(np.where(probabilities > 0, probabilities, 1))
    return -terms.sum(2, dtype=np.float64).astype(np.float32)


_FROM_PROBABILITIES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "loss": _losses,
    "margin": label_margins,
    "distance": _distances,
    "entropy": _entropies,
}
