"""Kernel regression over the scored samples: a Gaussian process whose kernel knows embedding, signals, class and error.

    k(x, x') = a1 M(r / l1) + a2 M(r / l2) [y = y'] + a3 M(r / l3) exp(-|m_y - m_y'| / l4) + a4 M(r / l5) <e, e'>
    M(t) = (1 + sqrt(3) t) exp(-sqrt(3) t)

r^2 = |u - u'|^2 + w^2 |v - v'|^2, u the standardised embedding, v the signals, m_y the mean embedding of class y: what does not
depend on the class, what does, and what similar classes share. e is the proxy's error, its probabilities minus the one-hot label, in
units of its mean square. Scores that are linear in the sample's gradient, as MoSo is, change sign with it: the gradient of the last
layer is e h^T, h the embedding, and two of these have the product <e, e'> <h, h'> (the tangent kernel of Jacot et al. 2018, of one
layer). An unlabelled sample has the first term only; without the last layer there is no fourth. The constants and the noise maximise
the marginal likelihood (Rasmussen & Williams 2006, eq. 5.8) of up to 600 samples.

With more than 2,000 scored samples the regression is on 2,000 of them (subset of regressors, ibid. section 8.3.1); cost grows
linearly with the scored samples, and memory does not grow beyond theirs. Leave-one-out predictions follow in closed form from the
diagonal of the hat matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from raypipe.extrapolators.gp.marginal_likelihood import LEAST_NOISE, NAMES, MarginalLikelihood

LIKELIHOOD_ROWS = 600
INDUCING_ROWS = 2000
STEPS = 40
RATE = 0.1
START = {
    "a1": 1.5,
    "l1": 1.4,
    "a2": 0.5,
    "l2": 3.0,
    "a3": 0.3,
    "l3": 2.0,
    "l4": 1.0,
    "a4": 0.5,
    "l5": 2.0,
    "w": 0.2,
    "noise": 0.04,
}
"""Where the search for the constants begins; lengths in units of the median distance, amplitudes of the score's variance."""
FITTED = (
    "class_mean",
    "class_seen",
    "units",
    "constants",
    "rows",
    "weight",
    "head_weight",
    "head_bias",
)
CHUNK_VALUES = 1 << 22
"""Most float64 values in one block of kernel values (32 MiB)."""
CACHED_VALUES = 1 << 15
"""Kernel values computed at once (256 KiB): some twenty operations go over each, from the cache."""


class KernelRegression:
    """Fitted on standardised arrays; see `raypipe.extrapolators.features`."""

    def fit(
        self,
        u: np.ndarray,
        v: np.ndarray,
        label: np.ndarray,
        z: np.ndarray,
        rng: np.random.Generator,
        head: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> np.ndarray:
        """Learn from float [n, d], [n, s], int [n], float [n]. Gives the leave-one-out predictions, float64 [n].

        head  weight float [c, d] and bias float [c] of the layer that makes logits of u
        """
        count = len(z)
        weight, bias = head if head is not None else (np.zeros((0, u.shape[1])), np.zeros(0))
        self._head_weight, self._head_bias = (
            torch.from_numpy(np.array(part, np.float64)) for part in (weight, bias)
        )
        classes = int(label.max(initial=-1)) + 1
        size = np.bincount(label[label >= 0], minlength=classes)
        means = np.zeros((classes, u.shape[1]))
        np.add.at(means, label[label >= 0], u[label >= 0].astype(np.float64))
        self._class_mean = torch.from_numpy(means / np.maximum(size, 1)[:, None])
        self._class_seen = torch.from_numpy(size > 0)
        self._units = torch.ones(4, dtype=torch.float64)
        rows = torch.from_numpy(rng.permutation(count))
        everything, target = self._points(u, v, label), torch.from_numpy(np.asarray(z, np.float64))
        few = rows[:LIKELIHOOD_ROWS]
        self._learn_constants(self._with_error([part[few] for part in everything]), target[few])
        self._rows = rows[:INDUCING_ROWS].sort().values
        self._inducing = self._with_error([part[self._rows] for part in everything])
        return self._solve(everything, target).numpy()

    @torch.no_grad()
    def predict(self, u: np.ndarray, v: np.ndarray, label: np.ndarray) -> np.ndarray:
        """float64 [n]"""
        points, result = self._points(u, v, label), torch.empty(len(label), dtype=torch.float64)
        done = 0
        for block in self._blocks(points):
            for rows, values in self._values(block, self._inducing):
                result[done : done + len(block[2])][rows] = values @ self._weight
            done += len(block[2])
        return result.numpy()

    def tensors(self) -> dict[str, np.ndarray]:
        """Everything fitted but the samples themselves."""
        return {name: getattr(self, f"_{name}").numpy() for name in FITTED}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, np.ndarray], u: np.ndarray, v: np.ndarray, label: np.ndarray
    ) -> KernelRegression:
        """Restore what `tensors` gave, with the samples that were given to `fit`. Raises KeyError for a missing tensor."""
        result = cls()
        for name in FITTED:
            setattr(result, f"_{name}", torch.from_numpy(np.array(tensors[name])))
        rows = result._rows.numpy()
        result._inducing = result._with_error(result._points(u[rows], v[rows], label[rows]))
        return result

    def _points(self, u: np.ndarray, v: np.ndarray, label: np.ndarray) -> list[Tensor]:
        """Embedding, signals, class (-1 where it is unknown or has no scored sample): one row for each sample."""
        y = torch.from_numpy(np.array(label, np.int64))
        y[y >= len(self._class_mean)] = -1
        if len(self._class_mean):
            y[~self._class_seen[y]] = -1
        y[y < 0] = -1
        return [
            torch.from_numpy(np.ascontiguousarray(u)),
            torch.from_numpy(np.ascontiguousarray(v)),
            y,
        ]

    def _with_error(self, points: list[Tensor]) -> list[Tensor]:
        """With the proxy's error as a fourth part, [n, c], 0 for an unlabelled sample; c is 0 where there is no last layer."""
        u, v, y = points
        if not len(self._head_bias):
            return [u, v, y, torch.zeros(len(y), 0, dtype=torch.float64)]
        error = (u.double() @ self._head_weight.T + self._head_bias).softmax(1)
        known = y >= 0
        error[known, y[known]] -= 1
        return [u, v, y, error * known[:, None]]

    def _class_means(self, y: Tensor) -> Tensor:
        """Mean embedding of each class, [n, d]; 0 for -1."""
        if not len(self._class_mean):
            return torch.zeros(len(y), self._class_mean.shape[1], dtype=torch.float64)
        return self._class_mean[y] * (y >= 0)[:, None]

    def _likelihood(self, points: list[Tensor], z: Tensor) -> MarginalLikelihood:
        """Of some samples: what their kernel and its derivatives are made of."""
        u, v, y = points[0].double(), points[1].double(), points[2]
        embedding, mean = torch.cdist(u, u) / self._units[0], self._class_means(y)
        signals = torch.cdist(v, v) / self._units[1] if v.shape[1] else torch.zeros_like(embedding)
        known = ((y >= 0)[:, None] & (y >= 0)[None]).double()
        same, errors = (
            (y[:, None] == y[None]).double() * known,
            points[3] @ points[3].T / self._units[3],
        )
        return MarginalLikelihood(
            embedding, signals, torch.cdist(mean, mean) / self._units[2], same, known, errors, z
        )

    def _values(self, a: list[Tensor], b: list[Tensor]) -> Iterator[tuple[slice, Tensor]]:
        """The kernel between n and m samples, a few rows at a time: which, and their values float64 [rows, m].

        What depends on classes alone is computed once for each class in `a`. The tensor of values is used again for the next rows.
        """
        a1, l1, a2, l2, a3, l3, l4, a4, l5, w, _ = self._constants.exp().tolist()
        x, other = (
            math.sqrt(3)
            * torch.cat(
                [part[0].double() / self._units[0], part[1].double() * (w / self._units[1])], 1
            )
            for part in (a, b)
        )
        (mine, place), (theirs, column) = (
            torch.unique(part[2], return_inverse=True) for part in (a, b)
        )
        known = (mine >= 0)[:, None] & (theirs >= 0)[None]
        between = torch.cdist(self._class_means(mine), self._class_means(theirs)) / self._units[2]
        alike = (a3 * torch.exp(-between / l4) * known)[:, column]
        same = (a2 * (mine[:, None] == theirs[None]) * known.double())[:, column]
        mine_wrong, other_wrong = a[3], b[3].T * (a4 / self._units[3])
        step = max(1, CACHED_VALUES // max(1, len(other)))
        spaces = [torch.empty(step, len(other), dtype=torch.float64) for _ in range(4)]
        length_x, length_other = x.square().sum(1, keepdim=True), other.square().sum(1)
        for start in range(0, len(x), step):
            rows = slice(start, min(start + step, len(x)))
            r, k, m, e = (space[: rows.stop - start] for space in spaces)
            torch.addmm(length_other, x[rows], other.T, alpha=-2, out=r).add_(
                length_x[rows]
            ).clamp_(min=0).sqrt_()
            for length, factor in ((l1, None), (l2, same), (l3, alike)):
                torch.div(r, length, out=m)
                torch.neg(m, out=e).exp_()
                m.add_(1).mul_(e)  # M of this length
                if factor is None:
                    torch.mul(m, a1, out=k)
                else:
                    k.addcmul_(m, factor.index_select(0, place[rows]))
            if other_wrong.shape[0]:
                torch.div(r, l5, out=m)
                torch.neg(m, out=e).exp_()
                k.addcmul_(m.add_(1).mul_(e), torch.mm(mine_wrong[rows], other_wrong, out=r))
            yield rows, k

    @torch.no_grad()
    def _kernel(self, a: list[Tensor], b: list[Tensor]) -> Tensor:
        """Between n and m samples, [n, m]."""
        result = torch.empty(len(a[2]), len(b[2]), dtype=torch.float64)
        for rows, values in self._values(a, b):
            result[rows] = values
        return result

    def _learn_constants(self, points: list[Tensor], z: Tensor) -> None:
        for unit, part in enumerate(
            (points[0].double(), points[1].double(), self._class_means(points[2]))
        ):
            away = torch.pdist(part)
            away = away[away > 0]
            self._units[unit] = away.median() if len(away) else 1.0
        self._units[3] = float(points[3].square().sum(1).mean()) or 1.0
        likelihood = self._likelihood(points, z)
        constants = torch.tensor([math.log(START[name]) for name in NAMES], dtype=torch.float64)
        optimizer = torch.optim.Adam([constants], RATE)
        best, self._constants = math.inf, constants.clone()
        for _ in range(STEPS):
            found = likelihood(constants)
            if found is None:
                break  # the constants have run to a corner; the best so far are kept
            loss, constants.grad = found
            if loss < best:
                best, self._constants = loss, constants.clone()
            optimizer.step()

    @torch.no_grad()
    def _solve(self, points: list[Tensor], z: Tensor) -> Tensor:
        """Weights of the inducing samples; gives leave-one-out predictions."""
        noise = self._constants[-1].exp() + LEAST_NOISE
        among = self._kernel(self._inducing, self._inducing)
        for power in range(-10, 0):  # equal samples make the matrix singular but for rounding
            root, failed = torch.linalg.cholesky_ex(
                among + 10.0**power * among.diagonal().mean() * torch.eye(len(among)).double()
            )
            if not failed:
                break
        gram, moment = (
            noise * torch.eye(len(among), dtype=torch.float64),
            torch.zeros(len(among), dtype=torch.float64),
        )
        done = 0
        for block in self._blocks(points):
            v = torch.linalg.solve_triangular(
                root, self._kernel(block, self._inducing).T, upper=False
            )
            gram += v @ v.T
            moment += v @ z[done : done + v.shape[1]]
            done += v.shape[1]
        gram_root = torch.linalg.cholesky(gram)
        inner = torch.cholesky_solve(moment[:, None], gram_root)
        self._weight = torch.linalg.solve_triangular(root.T, inner, upper=True)[:, 0].contiguous()
        left_out, done = torch.empty_like(z), 0
        for block in self._blocks(points):
            v = torch.linalg.solve_triangular(
                root, self._kernel(block, self._inducing).T, upper=False
            )
            own = (
                torch.linalg.solve_triangular(gram_root, v, upper=False)
                .square()
                .sum(0)
                .clamp(max=1 - 1e-6)
            )
            part = slice(done, done + v.shape[1])
            left_out[part] = z[part] - (z[part] - v.T @ inner[:, 0]) / (1 - own)
            done += v.shape[1]
        return left_out

    def _blocks(self, points: list[Tensor]) -> Iterator[list[Tensor]]:
        """A few samples at a time, with their errors, which need not be held for all."""
        count, step = (
            len(points[2]),
            max(1, CHUNK_VALUES // max(1, len(self._inducing[2]), len(self._head_bias))),
        )
        for start in range(0, count, step):
            yield self._with_error([part[start : start + step] for part in points])
