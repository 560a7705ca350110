"""Label noise injected on purpose, to test whether a run finds wrong labels.

Which samples get another class, and which class, is a function of the sample's id and the seed and
of nothing else. Order, block size and worker do not matter, and the true label can be computed from
the wrong one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from raypipe.config import SourceSettings


@dataclass(frozen=True)
class LabelNoise:
    """Symmetric label noise.

    Attributes
    ----------
    share : float
        Probability with which the label of a sample is replaced, independently of other samples.
        All other classes are equally likely.
    seed : int
        Another seed replaces other labels.
    """

    share: float
    seed: int = 0

    def replaced(self, sample_id: str) -> bool:
        """Whether the label of a sample is replaced, if it has one."""
        return self._draw(sample_id)[0]

    def wrong(self, sample_id: str, label: int, classes: int) -> int:
        """Return the label, 0..classes-1, in place of the true one. -1 (no label) stays."""
        return self._shifted(sample_id, label, classes, 1)

    def true(self, sample_id: str, label: int, classes: int) -> int:
        """Return the true label for one that `wrong` returned."""
        return self._shifted(sample_id, label, classes, -1)

    @property
    def warning(self) -> str:
        """The warning that accompanies such a run wherever it is shown."""
        return (
            f"{100 * self.share:g} % of the labels were replaced to test the detection of label "
            "noise: do not train on this run's lists"
        )

    def _shifted(self, sample_id: str, label: int, classes: int, direction: int) -> int:
        replaced, number = self._draw(sample_id)
        if not replaced or label < 0:
            return label
        return (label + direction * (1 + number % (classes - 1))) % classes

    def _draw(self, sample_id: str) -> tuple[bool, int]:
        """Whether the label is replaced, and a random number that selects the other class."""
        key = self.seed.to_bytes(16, "little") + b"noise"
        digest = hashlib.blake2b(
            sample_id.encode("utf-8", "surrogateescape"), digest_size=16, key=key
        ).digest()
        uniform, number = (int.from_bytes(part, "little") for part in (digest[:8], digest[8:]))
        return uniform < int(self.share * 2**64), number


def requested_noise(settings: SourceSettings) -> LabelNoise | None:
    """Return the noise that `source.inject_noise` requests; None if it requests none."""
    if not settings.inject_noise:
        return None
    return LabelNoise(settings.inject_noise, settings.noise_seed)
