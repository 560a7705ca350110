"""Which proxies see a sample, and whose scores can be extrapolated to it.

There are R repeats of P proxies (`proxy.repeats`, `proxy.parts`). Proxy r P + p was trained on the
seed samples of part p. What follows holds in each repeat, and everything is averaged over repeats.

**With cross-fitting**, a hash of the id gives every sample a part, whether it is in the seed set or
not. A sample of part b

- gets its proxy statistics, and its scores at checkpoints, as means over all proxies but b;
- is embedded by two *viewers*: proxies 0 and 1, or 2 in place of b. Scores from embeddings are
  means over both; extrapolators see the embedding by the first;
- gets its extrapolated score from the seed samples of all parts but b and that of the first viewer,
  which was trained on these as little as on the sample.

So a sample is treated alike inside and outside the seed set: nothing that its score depends on was
fitted to it (Chernozhukov et al. 2018, "Double/debiased machine learning", section 3).

**Without cross-fitting**, proxy 0 sees and embeds every sample.

All samples, with cross-fitting those of part 0 too, have an embedding by proxy 0 of repeat 0, for
near-duplicates, maps and drift: embeddings can only be compared within the space of one proxy.

**With features of another network or a table** (`embed.model`, `embed.from`), extrapolators, near-
duplicates, maps and drift see these instead of an embedding by a proxy, or next to one. Scores from
embeddings stay those of the proxies.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from raypipe.config import Config
from raypipe.sources.id_sampling import part_rule

FeatureUse = Literal["none", "added", "instead"]
"""Whether features come next to the embeddings of the proxy, or instead of them."""
VIEWERS = (0, 1, 2)
"""Proxies of each repeat that embed samples, with cross-fitting."""


@dataclass(frozen=True)
class ProxyRoles:
    """The roles of the proxies of a run.

    Attributes
    ----------
    parts : int
        Number of parts of the seed set, P.
    seed : int
        Seed of the division, see `part_rule`.
    repeats : int
        Proxies of each part, R.
    cross_fits : bool
        Whether samples are seen only by proxies that were not trained on them.
    features : str
        Whether features of another network or a table come next to the proxy's embeddings, or
        instead of them.
    """

    parts: int
    seed: int
    repeats: int = 1
    cross_fits: bool = True
    features: FeatureUse = "none"

    @classmethod
    def of(cls, config: Config) -> ProxyRoles:
        """Return the roles that the configuration gives the proxies."""
        proxy = config.proxy
        features: FeatureUse = "none"
        if config.embed.has_features:
            features = "added" if config.embed.uses_proxy else "instead"
        return cls(
            proxy.parts,
            proxy.seed,
            proxy.repeats,
            proxy.cross_fits,
            features,
        )

    @property
    def proxies(self) -> int:
        """Number of proxies in all."""
        return self.parts * self.repeats

    @property
    def single(self) -> bool:
        """Whether one proxy sees all samples."""
        return not self.cross_fits and self.repeats == 1

    @property
    def groups(self) -> int:
        """Number of groups of samples that are treated alike: parts, or 1 without cross-fitting."""
        return self.parts if self.cross_fits else 1

    def part_of(self, ids: Sequence[str]) -> np.ndarray:
        """Return the part of every sample, int64 [n]; 0 without cross-fitting."""
        if not self.cross_fits:
            return np.zeros(len(ids), np.int64)
        rule = part_rule(self.parts, self.seed)
        return np.array([rule(sample_id) for sample_id in ids], np.int64)

    def seen_by(self, part: int) -> tuple[int, ...]:
        """Return the proxies whose statistics the samples of a part get."""
        if not self.cross_fits:
            return self._in_every_repeat((0,))
        return tuple(proxy for proxy in range(self.proxies) if proxy % self.parts != part)

    def viewers(self, part: int) -> tuple[int, ...]:
        """Return the proxies that embed the samples of a part for their scores."""
        if not self.cross_fits:
            return self._in_every_repeat((0,))
        return self._in_every_repeat([proxy for proxy in VIEWERS if proxy != part][:2])

    def space(self, part: int) -> tuple[int, ...]:
        """Return the proxies whose embeddings extrapolators to the samples of a part see.

        One of each repeat; none where they see features instead.
        """
        if self.features == "instead":
            return ()
        return self._in_every_repeat((self._first_viewer(part),))

    @property
    def embedders(self) -> list[int]:
        """Every proxy that embeds samples."""
        return sorted({proxy for part in range(self.groups) for proxy in self.viewers(part)} | {0})

    def in_views(self, proxies: Iterable[int]) -> list[int]:
        """Return those of some proxies whose embeddings are in the files of views.

        Embeddings by proxy 0 are there only where `embeddings/` has features.
        """
        if self.single:
            return []
        return sorted(set(proxies) - (set() if self.features != "none" else {0}))

    def fit_parts(self, part: int) -> list[int]:
        """Return the parts whose seed samples an extrapolator to samples of `part` is fitted on."""
        return [
            other for other in range(self.parts) if other not in (part, self._first_viewer(part))
        ]

    def sees(self, part: np.ndarray, proxy: int) -> np.ndarray:
        """Return which samples get statistics from a proxy, bool [n].

        Parameters
        ----------
        part
            Part of each sample, int64 [n].
        proxy
            Number of the proxy.
        """
        return np.array([proxy in self.seen_by(number) for number in range(self.groups)])[part]

    def is_viewed(self, part: np.ndarray, proxy: int) -> np.ndarray:
        """Return which samples a proxy embeds for their scores, like `sees`."""
        return np.array([proxy in self.viewers(number) for number in range(self.groups)])[part]

    def _first_viewer(self, part: int) -> int:
        """Return the number of the first viewer in repeat 0."""
        return self.viewers(part)[0]

    def _in_every_repeat(self, proxies: Sequence[int]) -> tuple[int, ...]:
        """Return the proxies of all repeats, from their numbers in repeat 0."""
        return tuple(
            repeat * self.parts + proxy for repeat in range(self.repeats) for proxy in proxies
        )
