"""Linear probe: how well a linear classifier on embeddings recognises the label of each sample.

The classifier is linear discriminant analysis. With class means m_c and the covariance S of the
embeddings z around them, regularised by a share of its mean variance,

    logit_c(z) = z' A m_c - m_c' A m_c / 2 ,   A = (S + RIDGE tr(S) / d I)^-1

(Hastie, Tibshirani & Friedman 2009, section 4.3, with equal priors; the mean of a class is pulled
towards the mean of all samples with the weight of one sample). A sample is left out of the mean of
its own class, m_y -> (n m_y - z) / (n - 1), so that a small class does not recognise its samples by
themselves. The logits are divided by the temperature that minimises the mean loss (Guo et al. 2017,
arXiv 1706.04599, section 4.2): embeddings are not normally distributed, and without it nearly all
losses would be 0.

The probe is fitted to the labels of many more samples than the proxy that gives the embeddings was
trained on. Its loss therefore depends less on the accidents of one training than the loss of the
proxy's own last layer: benchmarks/results/reproducibility-cpu.txt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from raypipe.errors import RaypipeError

RIDGE = 0.3
"""Regularisation of the covariance, in units of its mean variance."""
PRIOR = 1.0
"""Weight of the mean of all samples in that of a class, in samples."""
TEMPERATURE_SAMPLES = 20_000
"""Samples of the fit, the first ones, that choose the temperature."""
BLOCK = 4096
"""Samples whose logits are computed at a time."""


@dataclass(frozen=True)
class LinearProbe:
    """A fitted probe for d-dimensional embeddings and C classes.

    Attributes
    ----------
    mean : np.ndarray
        Regularised class means, float64 [C, d].
    count : np.ndarray
        Weight of each mean: samples of the class plus `PRIOR`, float64 [C].
    precision : np.ndarray
        A, float64 [d, d].
    temperature : float
        Divides the logits.
    """

    mean: np.ndarray
    count: np.ndarray
    precision: np.ndarray
    temperature: float = 1.0

    @classmethod
    def fit(cls, embedding: np.ndarray, label: np.ndarray, classes: int) -> LinearProbe:
        """Fit a probe. The order of the samples changes the result by rounding only.

        Parameters
        ----------
        embedding
            Float [n, d].
        label
            Int [n]; samples with -1 are left out.
        classes
            Number of classes.

        Raises
        ------
        RaypipeError
            Fewer than two classes have samples.
        """
        rows = np.flatnonzero(label >= 0)
        count = np.bincount(label[rows], minlength=classes).astype(np.float64)
        if (count > 0).sum() < 2:
            raise RaypipeError("a linear probe needs labelled samples of at least two classes")
        width = embedding.shape[1]
        total = np.zeros((classes, width))
        for block in _blocks(rows):
            np.add.at(total, label[block], embedding[block].astype(np.float64))
        mean = (total + PRIOR * total.sum(0) / len(rows)) / (count + PRIOR)[:, None]
        covariance = np.zeros((width, width))
        for block in _blocks(rows):
            rest = embedding[block] - mean[label[block]]
            covariance += rest.T @ rest / len(rows)
        variance = float(np.trace(covariance)) / width
        ridge = RIDGE * variance if variance > 0 else 1.0
        precision = np.linalg.inv(covariance + ridge * np.eye(width))
        probe = cls(mean, count + PRIOR, precision)
        first = rows[:TEMPERATURE_SAMPLES]
        logits, y = probe._logits(embedding[first].astype(np.float64), label[first])
        return replace(probe, temperature=_best_temperature(logits, y))

    def statistics(self, embedding: np.ndarray, label: np.ndarray) -> dict[str, np.ndarray]:
        """Return loss, margin, distance and entropy of samples, float32 [n] by name.

        They are defined in `raypipe.scores.trajectory.Trajectory`. A sample without a label (-1)
        counts as one of the class that the probe predicts.
        """
        names = ("loss", "margin", "distance", "entropy")
        result = {name: np.empty(len(label), np.float32) for name in names}
        for start in range(0, len(label), BLOCK):
            rows = slice(start, start + BLOCK)
            logits, y = self._logits(embedding[rows].astype(np.float64), label[rows])
            logits /= self.temperature
            for name, values in _output_statistics(logits, y).items():
                result[name][rows] = values
        return result

    def _logits(self, z: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return logits [n, C] at temperature 1, each sample left out of its class, and labels.

        A label -1 is replaced by the predicted class.
        """
        weight = self.mean @ self.precision
        bias = 0.5 * np.einsum("cd,cd->c", weight, self.mean)
        logits = z @ weight.T - bias
        y = np.where(label >= 0, label, logits.argmax(1))
        own = label >= 0
        rows, count = np.flatnonzero(own), self.count[y[own]][:, None]
        mean = (count * self.mean[y[own]] - z[own]) / np.maximum(count - 1, PRIOR)
        direction = mean @ self.precision
        logits[rows, y[own]] = np.einsum("nd,nd->n", direction, z[own] - mean / 2)
        return logits, y

    def tensors(self) -> dict[str, np.ndarray]:
        """Return everything fitted."""
        return {
            "mean": self.mean,
            "count": self.count,
            "precision": self.precision,
            "temperature": np.array(self.temperature),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray]) -> LinearProbe:
        """Restore a probe from its `tensors`."""
        return cls(
            tensors["mean"], tensors["count"], tensors["precision"], float(tensors["temperature"])
        )


def _blocks(rows: np.ndarray) -> Iterator[np.ndarray]:
    """Yield a few rows at a time, so that no copy of all embeddings in float64 is held."""
    for start in range(0, len(rows), BLOCK):
        yield rows[start : start + BLOCK]


def _best_temperature(logits: np.ndarray, label: np.ndarray) -> float:
    """Return the temperature in 1/100 .. 10,000 that minimises the mean loss."""
    from scipy.optimize import minimize_scalar

    shifted = logits - logits.max(1, keepdims=True)
    own = shifted[np.arange(len(label)), label]

    def mean_loss(logarithm: float) -> float:
        scale = np.exp(-logarithm)
        return float((np.log(np.exp(scale * shifted).sum(1)) - scale * own).mean())

    bounds = (np.log(1e-2), np.log(1e4))
    found = minimize_scalar(mean_loss, bounds=bounds, method="bounded", options={"xatol": 1e-3})
    return float(np.exp(found.x))


def _output_statistics(logits: np.ndarray, label: np.ndarray) -> dict[str, np.ndarray]:
    """Return what `raypipe.vision.output_statistics` does, in float64 without torch."""
    rows = np.arange(len(label))
    shifted = logits - logits.max(1, keepdims=True)
    log_sum = np.log(np.exp(shifted).sum(1))
    log_probability = shifted - log_sum[:, None]
    probability = np.exp(log_probability)
    others = logits.copy()
    others[rows, label] = -np.inf
    error = probability.copy()
    error[rows, label] -= 1
    return {
        "loss": -log_probability[rows, label],
        "margin": logits[rows, label] - others.max(1),
        "distance": np.sqrt(np.square(error).sum(1)),
        "entropy": -(probability * log_probability).sum(1),
    }
