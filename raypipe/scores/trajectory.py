"""What a trajectory score is given, and the registry of all scores.

A measured score is either MoSo or GraNd, from gradients at the proxy's checkpoints, or a function of the proxy's
trajectory. A trajectory score is one file with one function

    score(trajectory: Trajectory, **options) -> float32 [samples]

and one line in `SCORES`. **Higher always means: keep.** A score whose paper keeps the low end is negated where it is defined.

Rules common to all trajectory scores:

- An epoch in which a sample was not seen (a probability that is not finite) takes the values of the epoch before it, as in
  the official code of Dynamic Uncertainty; before the first one seen, those of the first. A sample never seen is an error.
- Fewer epochs than a score needs is an error that names both numbers.
- Scores do not compare a sample with others, so a class with one sample is nothing special, and a large seed set is scored in parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from raypipe.errors import RaypipeError

SMALLEST = float(np.finfo(np.float16).smallest_subnormal)
"""Probabilities are stored as float16; one that became 0 there counts as this in a logarithm."""
STATISTICS = ("loss", "margin", "distance", "entropy")
"""What is stored of every sample and epoch beside the probabilities; see `Trajectory`."""


class ScoreError(RaypipeError):
    """A score cannot be computed from what it was given."""


class Trajectory:
    """What the proxy said of some samples at every epoch. Made by `trajectory` or `recorded`, which check and fill.

    label          int64 [samples]
    epochs         how many
    probabilities  float32 [epochs, samples, classes]
    loss           float32 [epochs, samples], cross-entropy: -log p(label)
    margin         float32 [epochs, samples], logit of the label minus the largest other logit
    distance       float32 [epochs, samples], Euclidean, from the probabilities to the one-hot label
    entropy        float32 [epochs, samples], of the probabilities, in nats
    own            float32 [epochs, samples], probability of the label
    other          float32 [epochs, samples], largest probability of another class

    The numbers per epoch are those of the training where they were stored, and come from the probabilities otherwise.
    """

    def __init__(self, label: np.ndarray, arrays: Mapping[str, np.ndarray]) -> None:
        self.label = label
        self.epochs = len(next(iter(arrays.values())))
        self._arrays = dict(arrays)

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
    def own(self) -> np.ndarray:
        return np.exp(-self.loss)

    @property
    def other(self) -> np.ndarray:
        return np.exp(-self.loss - self.margin)  # log p_other = log p_label - margin

    def _array(self, name: str) -> np.ndarray:
        if name not in self._arrays:
            if "probabilities" not in self._arrays:
                raise ScoreError(
                    f"the trajectory was read without {name}; name it in `reads` of the score's line in SCORES"
                )
            self._arrays[name] = _FROM_PROBABILITIES[name](self.probabilities, self.label)
        return self._arrays[name]


def trajectory(
    probabilities: np.ndarray, label: np.ndarray, margin: np.ndarray | None = None
) -> Trajectory:
    """A checked trajectory from probabilities.

    probabilities  float [epochs, samples, classes], not finite where a sample was not seen in an epoch
    label          int [samples]
    margin         float [epochs, samples] of the logits; without it, that of the log-probabilities, which is the same number
                   as long as no probability is 0
    Raises ScoreError for shapes that do not fit, labels outside the classes, and samples never seen.
    """
    probabilities = np.asarray(probabilities, np.float32)
    label = np.asarray(label, np.int64)
    if probabilities.ndim != 3 or label.shape != probabilities.shape[1:2]:
        raise ScoreError(
            f"a trajectory is [epochs, samples, classes] with a label per sample, not {probabilities.shape}, {label.shape}"
        )
    if probabilities.shape[0] < 1 or probabilities.shape[2] < 2:
        raise ScoreError(f"a trajectory needs an epoch and two classes, not {probabilities.shape}")
    if len(label) and not ((label >= 0) & (label < probabilities.shape[2])).all():
        raise ScoreError(f"labels must be 0..{probabilities.shape[2] - 1}")
    if margin is None:
        margin = margin_of(probabilities, label)
    margin = np.asarray(margin, np.float32)
    seen = np.isfinite(probabilities).all(2) & np.isfinite(margin)
    return Trajectory(label, _filled({"probabilities": probabilities, "margin": margin}, seen))


def recorded(label: np.ndarray, arrays: Mapping[str, np.ndarray]) -> Trajectory:
    """A checked trajectory from what the training stored: some of `NUMBERS`, at least one, and the probabilities or not.

    label   int64 [samples]
    arrays  by name, float32 [epochs, samples]; probabilities float32 [epochs, samples, classes]. Where a sample was not seen
            in an epoch, or its logits were not finite, the numbers are not finite; the probabilities are not searched.
    Raises ScoreError for samples never seen.
    """
    numbers = [values for name, values in arrays.items() if name in STATISTICS]
    return Trajectory(
        label, _filled(arrays, np.logical_and.reduce([np.isfinite(values) for values in numbers]))
    )


def _filled(arrays: Mapping[str, np.ndarray], seen: np.ndarray) -> Mapping[str, np.ndarray]:
    """The arrays, with the values of an epoch before where a sample was not seen."""
    if seen.all():
        return arrays
    never = ~seen.any(0)
    if never.any():
        raise ScoreError(
            f"{int(never.sum())} samples have no finite prediction in any epoch; the training diverged (lower proxy.lr)"
        )
    source, columns = _last_seen(seen), np.arange(seen.shape[1])[None]
    return {name: values[source, columns] for name, values in arrays.items()}


def margin_of(probabilities: np.ndarray, label: np.ndarray) -> np.ndarray:
    """log p_label - max log p_other, float32 [epochs, samples]."""
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(np.maximum(probabilities, SMALLEST, dtype=np.float32))
    own = np.take_along_axis(logs, label[None, :, None], 2)[..., 0]
    np.put_along_axis(logs, label[None, :, None], -np.inf, 2)
    return (own - logs.max(2)).astype(np.float32)


def _loss_of(probabilities: np.ndarray, label: np.ndarray) -> np.ndarray:
    own = np.take_along_axis(probabilities, label[None, :, None], 2)[..., 0]
    return -np.log(np.maximum(own, SMALLEST))


def _distance_of(probabilities: np.ndarray, label: np.ndarray) -> np.ndarray:
    difference = probabilities.astype(np.float64)
    difference[:, np.arange(len(label)), label] -= 1
    return np.sqrt(np.square(difference).sum(2)).astype(np.float32)


def _entropy_of(probabilities: np.ndarray, label: np.ndarray) -> np.ndarray:
    terms = probabilities * np.log(np.where(probabilities > 0, probabilities, 1))
    return -terms.sum(2, dtype=np.float64).astype(np.float32)


_FROM_PROBABILITIES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "loss": _loss_of,
    "margin": margin_of,
    "distance": _distance_of,
    "entropy": _entropy_of,
}


def _last_seen(seen: np.ndarray) -> np.ndarray:
    """For every epoch and sample the epoch whose values it takes: [epochs, samples]."""
    epochs = np.arange(len(seen))[:, None]
    last = np.maximum.accumulate(np.where(seen, epochs, -1), 0)
    return np.where(last < 0, seen.argmax(0)[None], last)


def need_epochs(name: str, epochs: int, least: int, why: str) -> None:
    """Raise ScoreError when there are fewer epochs than a score needs."""
    if epochs < least:
        raise ScoreError(
            f"{name} needs at least {least} epochs ({why}), the trajectory has {epochs}; raise proxy.epochs"
        )


def spans(epochs: int, first: int, last: int | None) -> slice:
    """The epochs a mean is taken over: `first` (0-based) up to and without `last` (None: to the end). Raises ScoreError when empty."""
    if not 0 <= first < (epochs if last is None else min(last, epochs)):
        raise ScoreError(
            f"no epochs between first_epoch {first} and last_epoch {last}: the trajectory has {epochs}"
        )
    return slice(first, last)


def sliding(values: np.ndarray, window: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Mean and sum of squared deviations of every window of `window` epochs in turn, float64 [samples] each.

    values  float [epochs, samples], probabilities: the sums are updated from window to window, which leaves the deviation of a
            window uncertain by about 1e-8 of the largest one of its sample
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
