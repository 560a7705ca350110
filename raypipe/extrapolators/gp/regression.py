"""Gaussian process regression whose kernel uses embedding, proxy statistics, class and error.

    k(x, x') = a1 M(r / l1)
             + a2 M(r / l2) [y = y']
             + a3 M(r / l3) exp(-|m_y - m_y'| / l4)
             + a4 M(r / l5) <f, f'>

    M(t) = (1 + sqrt(3) t) exp(-sqrt(3) t) ,    r^2 = |u - u'|^2 + w^2 |v - v'|^2

u is the standardised embedding, v the proxy statistics ("signals"), m_y the mean embedding of class
y. The first term ignores the class, the second is specific to it, the third is shared by similar
classes. f has the direction of e, the proxy's error: its probabilities minus the one-hot label. A
score that is linear in the sample's gradient, as MoSo is, changes sign with e: the gradient of the
last layer is e h^T, h the embedding, and two such gradients have the inner product <e, e'> <h, h'>
(the tangent kernel of Jacot et al. 2018, for one layer).

The length of f is log(1 + |e| / m), in units of its root mean square; m is the median |e| of the
scored samples, and |e| is limited to their largest. A proxy that has memorised the scored samples
has errors a hundred times larger on all others. A length that follows |e| would then carry the
prediction far beyond anything the scored samples support. Where errors are of one size, the
logarithm is close to linear.

An unlabelled sample has the first term only. Without the proxy's last layer there is no fourth
term. The constants and the noise maximise the marginal likelihood (Rasmussen & Williams 2006,
eq. 5.8) of up to 600 samples.

With more than 2,000 scored samples the regression uses 2,000 of them as inducing samples (subset of
regressors, ibid. section 8.3.1). Cost grows linearly with the scored samples; memory does not grow
beyond what they need themselves. Leave-one-out predictions follow in closed form from the diagonal
of the hat matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from raypipe.extrapolators.gp.marginal_likelihood import (
    MIN_NOISE,
    KernelConstants,
    MarginalLikelihood,
)
from raypipe.vision.devices import padded
from raypipe.vision.optimizers import plain

LIKELIHOOD_ROWS = 600
"""Scored samples whose marginal likelihood the constants maximise."""
INDUCING_ROWS = 2000
"""Maximum number of inducing samples."""
STEPS, LEARNING_RATE = 40, 0.1
"""Of Adam, which maximises the marginal likelihood."""
INITIAL_CONSTANTS = KernelConstants(
    a1=1.5, l1=1.4, a2=0.5, l2=3.0, a3=0.3, l3=2.0, l4=1.0, a4=0.5, l5=2.0, w=0.2, noise=0.04
)
"""Start of the optimisation: lengths in units of the median distance, amplitudes in units of the
variance of the scores."""
CHUNK_VALUES = 1 << 22
"""Maximum number of float64 kernel values in one block of samples (32 MiB)."""
CACHED_VALUES = 1 << 15
"""Kernel values computed at once (256 KiB): about twenty operations run over them in the cache."""
ROWS = 16
"""Samples are predicted in multiples of this number, and padded to one: a prediction then does not
depend on the other samples, bit for bit. See `raypipe.vision.devices.padded`."""
DIRECT_CLASSES = 24
"""With more classes, distances between class means are computed through a matrix product."""


@dataclass(frozen=True)
class LearnedConstants:
    """What maximising the marginal likelihood learns; a second regression can reuse it.

    Attributes
    ----------
    units
        Units of the distance of embeddings, of proxy statistics and of class means, and of the
        product of errors, float64 [4].
    logarithms
        Logarithms of the `KernelConstants`, float64 [11].
    """

    units: Tensor
    logarithms: Tensor


class _Points(NamedTuple):
    """Samples as the kernel sees them, one row each.

    Attributes
    ----------
    embedding, signals
        Standardised embedding [n, d] and proxy statistics [n, s].
    label
        Class, int64 [n]; -1 where it is unknown or has no scored sample.
    error
        f, the proxy's error with its length compressed, float64 [n, c]; 0 for an unlabelled
        sample. c is 0 without the proxy's last layer, and before `_with_error` computed it.
    """

    embedding: Tensor
    signals: Tensor
    label: Tensor
    error: Tensor

    def take(self, rows: Tensor | slice) -> _Points:
        """Return the samples at `rows`."""
        return _Points(*(values[rows] for values in self))


class KernelRegression:
    """Kernel regression on standardised arrays; see `raypipe.extrapolators.features`.

    Parameters
    ----------
    constants
        Constants to use as they are. By default `fit` learns them.
    likelihood_rows
        Number of scored samples whose marginal likelihood the constants maximise.
    """

    def __init__(
        self, constants: LearnedConstants | None = None, likelihood_rows: int = LIKELIHOOD_ROWS
    ) -> None:
        self._fixed_constants = constants
        self._likelihood_rows = likelihood_rows

    def fit(
        self,
        u: np.ndarray,
        v: np.ndarray,
        label: np.ndarray,
        z: np.ndarray,
        rng: np.random.Generator,
        head: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> np.ndarray:
        """Learn from scored samples and return their leave-one-out predictions.

        Parameters
        ----------
        u
            Standardised embeddings, float [n, d].
        v
            Normal scores of the proxy statistics, float [n, s].
        label
            Class indices, int [n]; -1 where unlabelled.
        z
            Standardised scores, float [n].
        rng
            Chooses the samples for the constants and the inducing samples.
        head
            Weight float [c, d] and bias float [c] of the layer that maps u to logits.

        Returns
        -------
        np.ndarray
            Leave-one-out predictions, float64 [n].
        """
        count = len(z)
        weight, bias = head if head is not None else (np.zeros((0, u.shape[1])), np.zeros(0))
        self._head_weight = torch.from_numpy(np.array(weight, np.float64))
        self._head_bias = torch.from_numpy(np.array(bias, np.float64))
        self._learn_class_means(u, label)
        rows = torch.from_numpy(rng.permutation(count))
        points = self._points(u, v, label)
        self._learn_error_scale(points)
        target = torch.from_numpy(np.asarray(z, np.float64))
        if self._fixed_constants is None:
            sample = rows[: self._likelihood_rows]
            self._learn_constants(self._with_error(points.take(sample)), target[sample])
        else:
            self._units = self._fixed_constants.units
            self._constants = self._fixed_constants.logarithms
        self._rows = rows[:INDUCING_ROWS].sort().values
        self._inducing = self._with_error(points.take(self._rows))
        return self._solve(points, target).numpy()

    @torch.no_grad()
    def predict(self, u: np.ndarray, v: np.ndarray, label: np.ndarray) -> np.ndarray:
        """Return predictions, float64 [n], for arrays as `fit` takes them."""
        points = self._padded(u, v, label)
        result = torch.empty(len(points.label), dtype=torch.float64)
        for block_rows, block in self._blocks(points):
            block_result = result[block_rows]
            for rows, values in self._kernel_chunks(block, self._inducing):
                block_result[rows] = values @ self._weight
        return result[: len(label)].numpy()

    @property
    def learned_constants(self) -> LearnedConstants:
        """The constants in use after `fit`."""
        return LearnedConstants(self._units, self._constants)

    def tensors(self) -> dict[str, np.ndarray]:
        """Return everything fitted except the samples themselves."""
        return {
            "class_mean": self._class_mean.numpy(),
            "class_seen": self._class_seen.numpy(),
            "units": self._units.numpy(),
            "constants": self._constants.numpy(),
            "rows": self._rows.numpy(),
            "weight": self._weight.numpy(),
            "head_weight": self._head_weight.numpy(),
            "head_bias": self._head_bias.numpy(),
            "error_scale": self._error_scale.numpy(),
        }

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, np.ndarray], u: np.ndarray, v: np.ndarray, label: np.ndarray
    ) -> KernelRegression:
        """Restore a regression from `tensors` and from the samples that were passed to `fit`.

        Raises
        ------
        KeyError
            A tensor is missing.
        """
        result = cls()
        result._class_mean = _tensor(tensors["class_mean"])
        result._class_seen = _tensor(tensors["class_seen"])
        result._units = _tensor(tensors["units"])
        result._constants = _tensor(tensors["constants"])
        result._rows = _tensor(tensors["rows"])
        result._weight = _tensor(tensors["weight"])
        result._head_weight = _tensor(tensors["head_weight"])
        result._head_bias = _tensor(tensors["head_bias"])
        result._error_scale = _tensor(tensors["error_scale"])
        rows = result._rows.numpy()
        result._inducing = result._with_error(result._points(u[rows], v[rows], label[rows]))
        return result

    # -- samples --------------------------------------------------------------------------------

    def _learn_class_means(self, u: np.ndarray, label: np.ndarray) -> None:
        classes = int(label.max(initial=-1)) + 1
        labelled = label >= 0
        size = np.bincount(label[labelled], minlength=classes)
        totals = np.zeros((classes, u.shape[1]))
        np.add.at(totals, label[labelled], u[labelled].astype(np.float64))
        self._class_mean = torch.from_numpy(totals / np.maximum(size, 1)[:, None])
        self._class_seen = torch.from_numpy(size > 0)

    def _points(self, u: np.ndarray, v: np.ndarray, label: np.ndarray) -> _Points:
        """Return the samples as tensors, still without their errors."""
        y = torch.from_numpy(np.array(label, np.int64))
        y[y >= len(self._class_mean)] = -1
        if len(self._class_mean):
            y[~self._class_seen[y]] = -1
        y[y < 0] = -1
        return _Points(
            torch.from_numpy(np.ascontiguousarray(u)),
            torch.from_numpy(np.ascontiguousarray(v)),
            y,
            torch.zeros(len(y), 0, dtype=torch.float64),
        )

    def _padded(self, u: np.ndarray, v: np.ndarray, label: np.ndarray) -> _Points:
        """Return the samples as tensors, padded to a multiple of `ROWS`."""
        whole = -(-len(label) // ROWS) * ROWS
        return _Points(*(padded(values, whole) for values in self._points(u, v, label)))

    def error_length(self, u: np.ndarray, label: np.ndarray) -> np.ndarray:
        """Return log(1 + |e| / m) of samples, float64 [n], not limited as f is in the kernel.

        It is 0 for an unlabelled sample, without the proxy's last layer, and without a scale.
        """
        middle = float(self._error_scale[0])
        if not len(self._head_bias) or middle <= 0:
            return np.zeros(len(label))
        points = self._padded(u, np.zeros((len(u), 0), np.float32), label)
        step = _whole_rows(CHUNK_VALUES // len(self._head_bias))
        lengths = [
            self._errors(points.take(slice(start, start + step))).norm(dim=1)
            for start in range(0, len(label), step)
        ]
        if not lengths:
            return np.zeros(0)
        return torch.log1p(torch.cat(lengths)[: len(label)] / middle).numpy()

    def _learn_error_scale(self, points: _Points) -> None:
        """Learn median and largest length of the proxy's errors on the scored samples."""
        self._error_scale = torch.zeros(2, dtype=torch.float64)
        if not len(self._head_bias) or not (points.label >= 0).any():
            return
        step = max(1, CHUNK_VALUES // len(self._head_bias))
        lengths = [
            self._errors(points.take(slice(start, start + step))).norm(dim=1)
            for start in range(0, len(points.label), step)
        ]
        length = torch.cat(lengths)[points.label >= 0]
        middle, largest = float(length.median()), float(length.max())
        self._error_scale[0] = middle if middle > 0 else largest
        self._error_scale[1] = largest

    def _errors(self, points: _Points) -> Tensor:
        """Return the proxy's errors e, float64 [n, c]; 0 for an unlabelled sample."""
        error = (points.embedding.double() @ self._head_weight.T + self._head_bias).softmax(1)
        labelled = points.label >= 0
        error[labelled, points.label[labelled]] -= 1
        return error * labelled[:, None]

    def _with_error(self, points: _Points) -> _Points:
        """Return the samples with f, if the last layer is known."""
        if not len(self._head_bias):
            return points
        error = self._errors(points)
        middle, largest = self._error_scale.tolist()
        if middle > 0:
            length = error.norm(dim=1, keepdim=True)
            compressed = torch.log1p(length.clamp(max=largest) / middle)
            error = error * (compressed / length.clamp(min=1e-300))
        return points._replace(error=error)

    def _class_means(self, y: Tensor) -> Tensor:
        """Return the mean embedding of each class, [n, d]; 0 for -1."""
        if not len(self._class_mean):
            return torch.zeros(len(y), self._class_mean.shape[1], dtype=torch.float64)
        return self._class_mean[y] * (y >= 0)[:, None]

    def _blocks(self, points: _Points) -> Iterator[tuple[slice, _Points]]:
        """Yield a few samples at a time with their errors, which need not be held for all."""
        width = max(1, len(self._inducing.label), len(self._head_bias))
        step = _whole_rows(CHUNK_VALUES // width)
        for start in range(0, len(points.label), step):
            rows = slice(start, start + step)
            yield rows, self._with_error(points.take(rows))

    # -- kernel ---------------------------------------------------------------------------------

    @torch.no_grad()
    def _kernel(self, a: _Points, b: _Points) -> Tensor:
        """Return the kernel between n and m samples, float64 [n, m]."""
        result = torch.empty(len(a.label), len(b.label), dtype=torch.float64)
        for rows, values in self._kernel_chunks(a, b):
            result[rows] = values
        return result

    def _kernel_chunks(self, a: _Points, b: _Points) -> Iterator[tuple[slice, Tensor]]:
        """Yield the kernel between n samples `a` and m samples `b`, a few rows at a time.

        Yields
        ------
        slice
            Rows of `a`.
        Tensor
            Their kernel values, float64 [rows, m]. The next rows overwrite this tensor.
        """
        constants = KernelConstants.from_logarithms(self._constants)
        a_features = self._scaled_features(a, constants)
        b_features = self._scaled_features(b, constants)
        a_squared = a_features.square().sum(1, keepdim=True)
        b_squared = b_features.square().sum(1)
        class_of_row, same_class, similar_classes = self._class_factors(a, b, constants)
        b_errors = b.error.T * (constants.a4 / self._units[3])

        step = _whole_rows(CACHED_VALUES // max(1, len(b_features)))
        buffers = [torch.empty(step, len(b_features), dtype=torch.float64) for _ in range(4)]
        for start in range(0, len(a_features), step):
            rows = slice(start, min(start + step, len(a_features)))
            distance, total, term, decay = (buffer[: rows.stop - start] for buffer in buffers)
            torch.addmm(b_squared, a_features[rows], b_features.T, alpha=-2, out=distance)
            distance.add_(a_squared[rows]).clamp_(min=0).sqrt_()

            _matern(distance, constants.l1, out=term, decay=decay)
            torch.mul(term, constants.a1, out=total)
            for length, factor in ((constants.l2, same_class), (constants.l3, similar_classes)):
                _matern(distance, length, out=term, decay=decay)
                total.addcmul_(term, factor.index_select(0, class_of_row[rows]))
            if b_errors.shape[0]:
                _matern(distance, constants.l5, out=term, decay=decay)
                # the distances of these rows are not needed any more
                error_product = torch.mm(a.error[rows], b_errors, out=distance)
                total.addcmul_(term, error_product)
            yield rows, total

    def _scaled_features(self, points: _Points, constants: KernelConstants) -> Tensor:
        """Return vectors whose Euclidean distance is sqrt(3) r, float64 [n, d + s]."""
        embedding = points.embedding.double() / self._units[0]
        signals = points.signals.double() * (constants.w / self._units[1])
        return math.sqrt(3) * torch.cat([embedding, signals], 1)

    def _class_factors(
        self, a: _Points, b: _Points, constants: KernelConstants
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute what depends on classes alone, once for each class in `a`.

        Returns
        -------
        class_of_row
            Position of each sample of `a` among its classes, int64 [n].
        same_class
            a2 [y = y'], float64 [classes of a, m].
        similar_classes
            a3 exp(-|m_y - m_y'| / l4), float64 [classes of a, m]; 0 unless both are labelled.
        """
        a_classes, class_of_row = torch.unique(a.label, return_inverse=True)
        a_classes = F.pad(a_classes, (0, -len(a_classes) % ROWS), value=-1)
        b_classes, class_of_column = torch.unique(b.label, return_inverse=True)
        labelled = (a_classes >= 0)[:, None] & (b_classes >= 0)[None]
        # by the classes of the fit: the same whichever samples are predicted together
        mode = "donot_use_mm" if len(self._class_mean) <= DIRECT_CLASSES else "use_mm"
        distance = torch.cdist(
            self._class_means(a_classes),
            self._class_means(b_classes),
            compute_mode=f"{mode}_for_euclid_dist",
        )
        distance = distance / self._units[2]
        similar_classes = constants.a3 * torch.exp(-distance / constants.l4) * labelled
        same_class = constants.a2 * (a_classes[:, None] == b_classes[None]) * labelled.double()
        return class_of_row, same_class[:, class_of_column], similar_classes[:, class_of_column]

    # -- fit ------------------------------------------------------------------------------------

    def _learn_constants(self, points: _Points, z: Tensor) -> None:
        """Set the units from the samples, then maximise the marginal likelihood with Adam."""
        self._units = self._learn_units(points)
        likelihood = self._marginal_likelihood(points, z)
        constants = INITIAL_CONSTANTS.logarithms()
        optimizer = plain(torch.optim.Adam)([constants], LEARNING_RATE)
        best_loss, self._constants = math.inf, constants.clone()
        for _ in range(STEPS):
            evaluated = likelihood(constants)
            if evaluated is None:
                break  # the constants diverged: use the best so far
            loss, constants.grad = evaluated
            if loss < best_loss:
                best_loss, self._constants = loss, constants.clone()
            optimizer.step()

    def _learn_units(self, points: _Points) -> Tensor:
        """Return median distances and the mean square of f: `LearnedConstants.units`."""
        units = torch.ones(4, dtype=torch.float64)
        spaces = (
            points.embedding.double(),
            points.signals.double(),
            self._class_means(points.label),
        )
        for position, vectors in enumerate(spaces):
            distance = torch.pdist(vectors)
            distance = distance[distance > 0]
            if len(distance):
                units[position] = distance.median()
        units[3] = float(points.error.square().sum(1).mean()) or 1.0
        return units

    def _marginal_likelihood(self, points: _Points, z: Tensor) -> MarginalLikelihood:
        u, v, y = points.embedding.double(), points.signals.double(), points.label
        class_mean = self._class_means(y)
        embedding = torch.cdist(u, u) / self._units[0]
        signals = torch.cdist(v, v) / self._units[1] if v.shape[1] else torch.zeros_like(embedding)
        both_labelled = ((y >= 0)[:, None] & (y >= 0)[None]).double()
        return MarginalLikelihood(
            embedding=embedding,
            signals=signals,
            class_distance=torch.cdist(class_mean, class_mean) / self._units[2],
            same_class=(y[:, None] == y[None]).double() * both_labelled,
            both_labelled=both_labelled,
            error_product=points.error @ points.error.T / self._units[3],
            z=z,
        )

    @torch.no_grad()
    def _solve(self, points: _Points, z: Tensor) -> Tensor:
        """Compute the weights of the inducing samples; return leave-one-out predictions.

        With R R^T the kernel among inducing samples and V = R^-1 K(inducing, scored), both passes
        over the scored samples see a few columns of V at a time.
        """
        noise = self._constants[-1].exp() + MIN_NOISE
        root = _jittered_cholesky(self._kernel(self._inducing, self._inducing))
        gram = noise * torch.eye(len(root), dtype=torch.float64)  # becomes V V^T + noise I
        moment = torch.zeros(len(root), dtype=torch.float64)  # becomes V z
        for rows, block in self._blocks(points):
            columns = self._whitened(root, block)
            gram += columns @ columns.T
            moment += columns @ z[rows]
        gram_root = torch.linalg.cholesky(gram)
        coefficients = torch.cholesky_solve(moment[:, None], gram_root)
        weight = torch.linalg.solve_triangular(root.T, coefficients, upper=True)
        self._weight = weight[:, 0].contiguous()

        left_out = torch.empty_like(z)
        for rows, block in self._blocks(points):
            columns = self._whitened(root, block)
            leverage = torch.linalg.solve_triangular(gram_root, columns, upper=False)
            leverage = leverage.square().sum(0).clamp(max=1 - 1e-6)
            residual = z[rows] - columns.T @ coefficients[:, 0]
            left_out[rows] = z[rows] - residual / (1 - leverage)
        return left_out

    def _whitened(self, root: Tensor, block: _Points) -> Tensor:
        """Return R^-1 K(inducing, block), float64 [inducing, n]."""
        kernel = self._kernel(block, self._inducing)
        return torch.linalg.solve_triangular(root, kernel.T, upper=False)


def _whole_rows(rows: int) -> int:
    """Return a number of rows rounded down to a multiple of `ROWS`, at least that."""
    return max(ROWS, rows // ROWS * ROWS)


def _matern(distance: Tensor, length: float, out: Tensor, decay: Tensor) -> None:
    """Write (1 + t) exp(-t), t = distance / length, into `out`; `decay` is scratch space."""
    torch.div(distance, length, out=out)
    torch.neg(out, out=decay).exp_()
    out.add_(1).mul_(decay)


def _jittered_cholesky(matrix: Tensor) -> Tensor:
    """Return the lower Cholesky factor of a covariance that duplicate samples make singular.

    The least of 1e-10, 1e-9, ..., 0.1 times the mean variance that suffices is added to the
    diagonal.
    """
    for power in range(-10, 0):
        jitter = 10.0**power * matrix.diagonal().mean() * torch.eye(len(matrix)).double()
        root, failed = torch.linalg.cholesky_ex(matrix + jitter)
        if not failed:
            break
    return root


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(values))
