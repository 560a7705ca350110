"""InfoBatch: drop samples of low loss during a training, without a bias of the gradient."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from raypipe.errors import ConfigError
from raypipe.selection import hash64
from raypipe.selection.hashing import mix_hashes
from raypipe.selection.redraw import epoch_seed


class InfoBatch:
    """Chooses the samples of each epoch of a training by their latest losses.

    Qin et al., ICLR 2024, arXiv 2303.04947. Of the samples whose latest loss is below the mean, a
    share `drop` is left out of the epoch, drawn at random. Those that stay get the weight 1 / (1 -
    drop), so that the expected gradient is that of all samples. The last epochs use all samples
    with weight 1. So does the first, in which no loss is known.

    Parameters
    ----------
    samples : int
        Number of samples of the dataset, n.
    drop : float
        Share r of the samples below the mean to leave out, from 0 to below 1.
    until : float
        Progress of the training, 0 to 1, from which all samples are used.
    seed : int
        Another seed draws other samples.
    ids : sequence of str or numpy.ndarray, optional
        Ids of the samples in their order, or hashes of them, uint64 [n], so that the draws do not
        depend on the order. Default: the row numbers.

    Attributes
    ----------
    loss : numpy.ndarray
        Latest loss of each sample, float32 [n]; NaN before it is recorded. It is all that a
        training must save to resume.

    Examples
    --------
    >>> infobatch = InfoBatch(len(dataset))  # doctest: +SKIP
    >>> for epoch in range(epochs):  # doctest: +SKIP
    ...     rows, weights = infobatch.choose(epoch, epoch / epochs)
    ...     for part in batches(len(rows)):
    ...         images, labels = load(rows[part])
    ...         losses = cross_entropy(model(images), labels, reduction="none")
    ...         (losses * torch.from_numpy(weights[part])).mean().backward()
    ...         infobatch.record(rows[part], losses.detach().numpy())

    Raises
    ------
    ConfigError
        For values out of range.
    """

    def __init__(
        self,
        samples: int,
        *,
        drop: float = 0.5,
        until: float = 0.875,
        seed: int = 0,
        ids: Sequence[str] | np.ndarray | None = None,
    ) -> None:
        if samples < 1 or not 0 <= drop < 1 or not 0 <= until <= 1:
            raise ConfigError(
                f"InfoBatch: {samples} samples, drop {drop!r}, until {until!r}; there must be a "
                "sample, drop must be at least 0 and below 1, and until from 0 to 1"
            )
        if ids is not None and len(ids) != samples:
            raise ConfigError(f"InfoBatch: {len(ids):,} ids for {samples:,} samples")
        self._drop, self._until, self._seed = drop, until, seed
        if ids is None:
            ids = [str(row) for row in range(samples)]
        self._hashes = ids if isinstance(ids, np.ndarray) else hash64(ids)
        self.loss = np.full(samples, np.nan, np.float32)

    def choose(self, epoch: int, progress: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows to train on in an epoch, int64 [k] rising, and their weights, float32.

        Parameters
        ----------
        epoch : int
            Number of the epoch.
        progress : float
            Share of the training that is done at its start: epoch / epochs.
        """
        weight = np.ones(len(self.loss), np.float32)
        known = np.isfinite(self.loss)
        if progress < self._until and known.any():
            mean = self.loss[known].mean(dtype=np.float64)
            low = np.flatnonzero(known & (self.loss < mean))
            stay = len(low) - int(self._drop * len(low))
            if stay < len(low):
                hashes = mix_hashes(self._hashes[low], epoch_seed(self._seed, epoch))
                order = low[np.argsort(hashes, kind="stable")]
                weight[order[:stay]] = len(low) / stay
                weight[order[stay:]] = 0
        rows = np.flatnonzero(weight)
        return rows, weight[rows]

    def record(self, rows: np.ndarray, losses: np.ndarray) -> None:
        """Record the unweighted losses of samples, [k] each."""
        self.loss[rows] = losses
