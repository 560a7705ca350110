"""The marginal likelihood of scores under the kernel of `raypipe.extrapolators.gp.regression`, and its gradient in closed form.

With K the covariance of n scores z, alpha = K^-1 z and theta the logarithm of a constant (Rasmussen & Williams 2006, eqs. 5.8 and 5.9),

    L = z^T alpha / 2 + log |K| / 2 ,    dL / dtheta = tr((K^-1 - alpha alpha^T) dK / dtheta) / 2

which takes one inverse, and sums over pairs of samples: each pair once, since K is symmetric, and a few thousand at a time, since what is
computed for them then stays in the cache. Automatic differentiation gives the same numbers in more time and memory.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEAST_NOISE = 1e-3
NAMES = ("a1", "l1", "a2", "l2", "a3", "l3", "l4", "a4", "l5", "w", "noise")
"""The constants, whose logarithms are the arguments."""
CHUNK_PAIRS = 1 << 13
"""Pairs at a time (64 KiB an array)."""
SMALL = 1e-12
"""Added to squared distances."""


class MarginalLikelihood:
    """Of the scores of n samples, given what the kernel takes of every pair of them, all float64 [n, n] and in their units:

    embedding, signals, between  distances of embeddings, of signals, and of the mean embeddings of their classes
    same, known                  1 where the classes are the same, and where both are known, else 0
    errors                       products of the proxy's errors
    """

    def __init__(
        self,
        embedding: Tensor,
        signals: Tensor,
        between: Tensor,
        same: Tensor,
        known: Tensor,
        errors: Tensor,
        z: Tensor,
    ) -> None:
        self._z, self._rows = z, torch.tril_indices(len(z), len(z))
        given = (embedding.square(), signals.square(), between, same, known, errors)
        self._pairs = [part[tuple(self._rows)] for part in given]
        self._twice = 1.0 + (self._rows[0] != self._rows[1]).double()
        self._covariance = torch.zeros(len(z), len(z), dtype=torch.float64)

    def covariance(self, constants: Tensor) -> Tensor:
        """The kernel without noise, float64 [n, n]; above the diagonal 0."""
        values, _, _ = self._kernel(constants)
        self._covariance[tuple(self._rows)] = values
        return self._covariance

    def __call__(self, constants: Tensor) -> tuple[float, Tensor] | None:
        """L but for a constant, and its gradient, float64 [11], at the logarithms of the constants, float64 [11].

        None where K is not positive definite, or L not finite.
        """
        a1, l1, a2, l2, a3, l3, l4, a4, l5, w, noise = constants.exp().tolist()
        values, decays, alike = self._kernel(constants)
        self._covariance[tuple(self._rows)] = values
        self._covariance.diagonal().add_(noise + LEAST_NOISE)
        root, failed = torch.linalg.cholesky_ex(self._covariance)
        if failed:
            return None
        alpha = torch.cholesky_solve(self._z[:, None], root)[:, 0]
        loss = float(0.5 * self._z @ alpha + root.diagonal().log().sum())
        if not math.isfinite(loss):
            return None
        rest = torch.cholesky_inverse(root).addr_(alpha, alpha, alpha=-1).mul_(0.5)
        share = rest[tuple(self._rows)] * self._twice
        sums = torch.zeros(4, 6, dtype=torch.float64)
        for part in self._parts():
            embedding, signals, between, same, _, errors = (one[part] for one in self._pairs)
            r2 = (embedding + w**2 * signals).add_(SMALL).mul_(3)
            r, by = r2.sqrt(), share[part]
            weighed = decays[:, part] * torch.stack([by, by * same, by * alike[part], by * errors])
            sums += (
                weighed @ torch.stack([torch.ones_like(r), r, r2, signals, between, r * between]).T
            )
        gradient = torch.zeros(len(NAMES), dtype=torch.float64)
        spread = 0.0
        for row, (name, amplitude, length) in enumerate(
            (("1", a1, l1), ("2", a2, l2), ("3", a3, l3), ("4", a4, l5))
        ):
            one, r, square, signals, between, both = (amplitude * sums[row]).tolist()
            gradient[NAMES.index(f"a{name}")] = one + r / length
            gradient[NAMES.index("l5" if name == "4" else f"l{name}")] = square / length**2
            spread += signals / length**2
            if name == "3":
                gradient[NAMES.index("l4")] = (between + both / length) / l4
        gradient[NAMES.index("w")] = -3 * w**2 * spread
        gradient[NAMES.index("noise")] = noise * float(rest.diagonal().sum())
        return loss, gradient

    def _kernel(self, constants: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For every pair the kernel, exp(-r / l) of the four terms, [4, pairs], and how much alike the classes are."""
        a1, l1, a2, l2, a3, l3, l4, a4, l5, w, _ = constants.exp().tolist()
        count = len(self._twice)
        values, alike, decays = (
            torch.empty(*shape, count, dtype=torch.float64) for shape in ((), (), (4,))
        )
        for part in self._parts():
            embedding, signals, between, same, known, errors = (one[part] for one in self._pairs)
            r = (embedding + w**2 * signals).add_(SMALL).mul_(3).sqrt_()
            torch.mul(known, torch.exp(between / -l4), out=alike[part])
            total = values[part].zero_()
            terms = ((a1, l1, None), (a2, l2, same), (a3, l3, alike[part]), (a4, l5, errors))
            for decay, (amplitude, length, factor) in zip(decays, terms, strict=True):
                torch.exp(torch.div(r, -length, out=decay[part]), out=decay[part])
                term = (r * (amplitude / length)).add_(amplitude).mul_(decay[part])
                total += term if factor is None else term.mul_(factor)
        return values, decays, alike

    def _parts(self) -> list[slice]:
        return [
            slice(start, start + CHUNK_PAIRS) for start in range(0, len(self._twice), CHUNK_PAIRS)
        ]
