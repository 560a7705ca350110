"""Cross-fitting: which proxies may see a sample, and whose scores may be extrapolated to it.

With P parts of the seed set (`proxy.parts`), a hash of the id gives every sample a part, whether it
is in the seed set or not. Proxy p was trained on the seed samples of part p. A sample of part b

- gets its proxy statistics, and its scores at checkpoints, as means over all proxies but b;
- is embedded by two *viewers*: proxies 0 and 1, or 2 in place of b. Scores from embeddings are
  means over both; extrapolators see the embedding by the first;
- gets its extrapolated score from the seed samples of all parts but b and that of the first viewer,
  which was trained on these as little as on the sample.

So a sample is treated alike inside and outside the seed set: nothing that its score depends on was
fitted to it (Chernozhukov et al. 2018, "Double/debiased machine learning", section 3).

All samples, those of part 0 too, have an embedding by proxy 0, for near-duplicates, maps and drift:
embeddings can only be compared within the space of one proxy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raypipe.config import Config
from raypipe.sources.id_sampling import part_rule

VIEWERS = (0, 1, 2)
"""Proxies that embed samples."""


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

    def viewers(self, part: int) -> tuple[int, int]:
        """Return the numbers of the proxies that embed the samples of a part."""
        first, second = [proxy for proxy in VIEWERS if proxy != part][:2]
        return first, second

    def viewer(self, part: int) -> int:
        """Return the proxy whose embeddings extrapolators to the samples of a part see."""
        return self.viewers(part)[0]

    def fit_parts(self, part: int) -> list[int]:
        """Return the parts whose seed samples an extrapolator to samples of `part` is fitted on."""
        return [other for other in range(self.parts) if other not in (part, self.viewer(part))]

    def is_viewed(self, part: np.ndarray, proxy: int) -> np.ndarray:
        """Return whether a proxy embeds samples for their scores, bool [n].

        Parameters
        ----------
        part
            Part of each sample, int64 [n].
        proxy
            Number of the proxy.
        """
        viewed = np.array([proxy in self.viewers(number) for number in range(self.parts)], bool)
        return viewed[part]
