"""Marginal likelihood of scores under the kernel of `gp.regression`, with closed-form gradient.

With K the covariance of n scores z, alpha = K^-1 z and theta the logarithm of a constant,

    L = z^T alpha / 2 + log |K| / 2 ,    dL / dtheta = tr((K^-1 - alpha alpha^T) dK / dtheta) / 2

This takes one matrix inverse and sums over pairs of samples. K is symmetric, so each pair is
visited once. Pairs are processed a few thousand at a time, so that intermediate arrays stay in the
cache. Automatic differentiation gives the same numbers but needs more time and memory.

References
----------
Rasmussen & Williams 2006, *Gaussian Processes for Machine Learning*, eqs. 5.8 and 5.9.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

MIN_NOISE = 1e-3
"""Added to the learned noise variance."""
CHUNK_PAIRS = 1 << 13
"""Pairs processed at once (64 KiB per array)."""
DISTANCE_EPSILON = 1e-12
"""Added to squared distances."""


class KernelTerm(NamedTuple):
    """Amplitude and length of one term of the kernel."""

    amplitude: float
    length: float


class KernelConstants(NamedTuple):
    """Constants of the kernel, named as in its formula (see `gp.regression`), and the noise.

    The optimiser works on their logarithms, float64 [11], in this order.

    Attributes
    ----------
    a1, l1
        Amplitude and length of the term that ignores classes.
    a2, l2
        Amplitude and length of the term for samples of the same class.
    a3, l3, l4
        Amplitude and length of the term for similar classes; `l4` is the length over which the
        similarity of two classes falls with the distance of their mean embeddings.
    a4, l5
        Amplitude and length of the term for the proxy's errors.
    w
        Weight of the proxy statistics in the distance of two samples.
    noise
        Noise variance, to which `MIN_NOISE` is added.
    """

    a1: float
    l1: float
    a2: float
    l2: float
    a3: float
    l3: float
    l4: float
    a4: float
    l5: float
    w: float
    noise: float

    @classmethod
    def from_logarithms(cls, logarithms: Tensor) -> KernelConstants:
        """Return the constants whose logarithms are given, float64 [11]."""
        return cls(*logarithms.exp().tolist())

    def logarithms(self) -> Tensor:
        """Return the logarithms, float64 [11]."""
        return torch.tensor([math.log(value) for value in self], dtype=torch.float64)

    @property
    def terms(self) -> tuple[KernelTerm, KernelTerm, KernelTerm, KernelTerm]:
        """The four terms of the kernel: any class, same class, similar classes, errors."""
        return (
            KernelTerm(self.a1, self.l1),
            KernelTerm(self.a2, self.l2),
            KernelTerm(self.a3, self.l3),
            KernelTerm(self.a4, self.l5),
        )


class _Pairs(NamedTuple):
    """What the kernel needs of each pair of samples, all float64 [pairs]; distances squared."""

    embedding_squared: Tensor
    signals_squared: Tensor
    class_distance: Tensor
    same_class: Tensor
    both_labelled: Tensor
    error_product: Tensor

    def chunk(self, part: slice) -> _Pairs:
        """Return the pairs at `part`."""
        return _Pairs(*(values[part] for values in self))


class _KernelValues(NamedTuple):
    """The kernel of every pair, and what its gradient reuses.

    Attributes
    ----------
    total
        Sum of the four terms, float64 [pairs].
    decay
        exp(-r / length) of each term, float64 [4, pairs].
    class_similarity
        exp(-class distance / l4), 0 unless both samples are labelled, float64 [pairs].
    """

    total: Tensor
    decay: Tensor
    class_similarity: Tensor


class _TermSums(NamedTuple):
    """Weighted sums over all pairs for one term of the kernel, times its amplitude a.

    The weight of a pair is its entry of dL / dK times f exp(-r / l), f the class or error factor of
    the term. Each field is the sum of weight times the quantity it names.
    """

    one: float
    r: float
    r_squared: float
    signals_squared: float
    class_distance: float
    r_class_distance: float


class MarginalLikelihood:
    """Negative log marginal likelihood of the scores of n samples.

    Parameters
    ----------
    embedding, signals, class_distance
        Distances between the samples' embeddings, between their proxy statistics and between the
        mean embeddings of their classes, each float64 [n, n] in its own unit.
    same_class
        1 where both samples have the same class, else 0, float64 [n, n].
    both_labelled
        1 where both samples are labelled, else 0, float64 [n, n].
    error_product
        Inner products of the proxy's errors in their unit, float64 [n, n].
    z
        Standardised scores, float64 [n].
    """

    def __init__(
        self,
        embedding: Tensor,
        signals: Tensor,
        class_distance: Tensor,
        same_class: Tensor,
        both_labelled: Tensor,
        error_product: Tensor,
        z: Tensor,
    ) -> None:
        self._z = z
        # the lower triangle holds each pair once
        row, column = torch.tril_indices(len(z), len(z))
        self._lower = (row, column)
        matrices = (
            embedding.square(),
            signals.square(),
            class_distance,
            same_class,
            both_labelled,
            error_product,
        )
        self._pairs = _Pairs(*(matrix[self._lower] for matrix in matrices))
        # a pair off the diagonal stands for two entries of K
        self._multiplicity = 1.0 + (row != column).double()
        self._covariance = torch.zeros(len(z), len(z), dtype=torch.float64)

    def covariance(self, logarithms: Tensor) -> Tensor:
        """Return the kernel without noise, float64 [n, n]; entries above the diagonal are 0."""
        constants = KernelConstants.from_logarithms(logarithms)
        self._covariance[self._lower] = self._kernel(constants).total
        return self._covariance

    def __call__(self, logarithms: Tensor) -> tuple[float, Tensor] | None:
        """Return L up to an additive constant, and its gradient.

        Parameters
        ----------
        logarithms
            Logarithms of the `KernelConstants`, float64 [11].

        Returns
        -------
        tuple[float, Tensor] or None
            L and its gradient with respect to the logarithms, float64 [11]. None where K is not
            positive definite or L is not finite.
        """
        constants = KernelConstants.from_logarithms(logarithms)
        kernel = self._kernel(constants)
        self._covariance[self._lower] = kernel.total
        self._covariance.diagonal().add_(constants.noise + MIN_NOISE)
        root, failed = torch.linalg.cholesky_ex(self._covariance)
        if failed:
            return None
        alpha = torch.cholesky_solve(self._z[:, None], root)[:, 0]
        loss = float(0.5 * self._z @ alpha + root.diagonal().log().sum())
        if not math.isfinite(loss):
            return None
        loss_by_covariance = (
            torch.cholesky_inverse(root).addr_(alpha, alpha, alpha=-1).mul_(0.5)
        )  # dL / dK = (K^-1 - alpha alpha^T) / 2
        sums = self._term_sums(constants, kernel, loss_by_covariance)
        noise_slope = constants.noise * float(loss_by_covariance.diagonal().sum())
        gradient = _gradient(constants, sums, noise_slope)
        return loss, torch.tensor(gradient, dtype=torch.float64)

    def _kernel(self, constants: KernelConstants) -> _KernelValues:
        """Evaluate the kernel of every pair."""
        count = len(self._multiplicity)
        total = torch.empty(count, dtype=torch.float64)
        class_similarity = torch.empty(count, dtype=torch.float64)
        decay = torch.empty(4, count, dtype=torch.float64)
        for part in self._chunks():
            pairs = self._pairs.chunk(part)
            r = self._squared_distance(pairs, constants).sqrt_()
            similarity = torch.exp(pairs.class_distance / -constants.l4)
            torch.mul(pairs.both_labelled, similarity, out=class_similarity[part])
            factors = (None, pairs.same_class, class_similarity[part], pairs.error_product)
            chunk_total = total[part].zero_()
            for row, (amplitude, length), factor in zip(
                decay, constants.terms, factors, strict=True
            ):
                chunk_decay = row[part]
                torch.exp(torch.div(r, -length, out=chunk_decay), out=chunk_decay)
                term = (r * (amplitude / length)).add_(amplitude).mul_(chunk_decay)
                chunk_total += term if factor is None else term.mul_(factor)
        return _KernelValues(total, decay, class_similarity)

    def _term_sums(
        self, constants: KernelConstants, kernel: _KernelValues, loss_by_covariance: Tensor
    ) -> list[_TermSums]:
        """Sum over all pairs what the gradient needs, for each term of the kernel."""
        share = loss_by_covariance[self._lower] * self._multiplicity
        # Rows: the terms of the kernel (any class, same class, similar classes, errors).
        # Columns: the fields of _TermSums.
        sums = torch.zeros(4, 6, dtype=torch.float64)
        for part in self._chunks():
            pairs, pair_share = self._pairs.chunk(part), share[part]
            r_squared = self._squared_distance(pairs, constants)
            r = r_squared.sqrt()
            weight = kernel.decay[:, part] * torch.stack(
                [
                    pair_share,
                    pair_share * pairs.same_class,
                    pair_share * kernel.class_similarity[part],
                    pair_share * pairs.error_product,
                ]
            )  # [4, pairs]
            quantity = torch.stack(
                [
                    torch.ones_like(r),
                    r,
                    r_squared,
                    pairs.signals_squared,
                    pairs.class_distance,
                    r * pairs.class_distance,
                ]
            )  # [6, pairs]
            sums += weight @ quantity.T
        return [
            _TermSums(*(term.amplitude * row).tolist()) for term, row in zip(constants.terms, sums)
        ]

    @staticmethod
    def _squared_distance(pairs: _Pairs, constants: KernelConstants) -> Tensor:
        """Return r^2 = 3 (|u - u'|^2 + w^2 |v - v'|^2): the sqrt(3) of the kernel is part of r."""
        distance = pairs.embedding_squared + constants.w**2 * pairs.signals_squared
        return distance.add_(DISTANCE_EPSILON).mul_(3)

    def _chunks(self) -> list[slice]:
        count = len(self._multiplicity)
        return [slice(start, start + CHUNK_PAIRS) for start in range(0, count, CHUNK_PAIRS)]


def _gradient(
    constants: KernelConstants, sums: list[_TermSums], noise_slope: float
) -> KernelConstants:
    """Return the derivative of L by the logarithm of each constant.

    A term is k = a f (1 + t) exp(-t), t = r / l, and with D = a f exp(-t)

        dk / dlog a = D (1 + t)                dk / dlog l = D t^2
        dk / dlog w = -3 w^2 |v - v'|^2 D / l^2

    For the third term, whose f is exp(-m / l4), also dk / dlog l4 = D (1 + t) m / l4.
    """
    terms = constants.terms
    by_amplitude = [total.one + total.r / term.length for term, total in zip(terms, sums)]
    by_length = [total.r_squared / term.length**2 for term, total in zip(terms, sums)]
    by_signals = 0.0
    for term, total in zip(terms, sums):
        by_signals += total.signals_squared / term.length**2
    similar = sums[2]
    by_class_length = similar.class_distance + similar.r_class_distance / constants.l3
    return KernelConstants(
        a1=by_amplitude[0],
        l1=by_length[0],
        a2=by_amplitude[1],
        l2=by_length[1],
        a3=by_amplitude[2],
        l3=by_length[2],
        l4=by_class_length / constants.l4,
        a4=by_amplitude[3],
        l5=by_length[3],
        w=-3 * constants.w**2 * by_signals,
        noise=noise_slope,
    )
