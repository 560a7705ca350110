"""Cross-fitting: which proxy may see a sample, and whose scores may be extrapolated to it.

With P parts of the seed set (`proxy.parts`), a hash of the id gives every sample a part, whether it
is in the seed set or not. Proxy p was trained on the seed samples of part p. A sample of part b

- gets its proxy statistics, and its scores at checkpoints, as means over all proxies but b;
- is seen by the extrapolator as its *viewer* embeds it: proxy 0, and for part 0 proxy 1;
- gets its extrapolated score from the seed samples of all parts but b and that of its viewer. The
  viewer was trained on these as little as on the sample.

So a sample is treated alike inside and outside the seed set: nothing that its score depends on was
fitted to it (Chernozhukov et al. 2018, "Double/debiased machine learning", section 3).

Only two proxies embed samples, since samples can only be compared within one space. All samples
have an embedding by proxy 0, for near-duplicates, maps and drift. Samples of part 0 have a second
one, by proxy 1, and so have the seed samples that scores are extrapolated to them from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raypipe.config import Config
from raypipe.sources.id_sampling import part_rule


@dataclass(frozen=True)
class CrossFit:
    """The roles of the P proxies.

    Attributes
    ----------
    parts : int
        Number of parts and proxies, P.
    seed : int
        Seed of the division, see `part_rule`.
    """

    parts: int
    seed: int

    @classmethod
    def of(cls, config: Config) -> CrossFit | None:
        """Return the roles; None without cross-fitting."""
        proxy = config.proxy
        return cls(proxy.parts, proxy.seed) if proxy.cross_fits else None

    def part_of(self, ids: Sequence[str]) -> np.ndarray:
        """Return the part of every sample, int64 [n]."""
        rule = part_rule(self.parts, self.seed)
        return np.array([rule(sample_id) for sample_id in ids], np.int64)

    def viewer(self, part: int) -> int:
        """Return the number of the proxy whose embeddings are extrapolated from, for a part."""
        return 1 if part == 0 else 0

    def fit_parts(self, part: int) -> list[int]:
        """Return the parts whose seed samples an extrapolator to samples of `part` is fitted on."""
        return [other for other in range(self.parts) if other not in (part, self.viewer(part))]

    def in_second_view(self, part: np.ndarray, scored: np.ndarray) -> np.ndarray:
        """Return which samples need an embedding by proxy 1, bool [n].

        Parameters
        ----------
        part
            Part of each sample, int64 [n].
        scored
            Whether each is in the seed set or the audit set, bool [n].
        """
        return (part == 0) | (scored & (part > 1))
