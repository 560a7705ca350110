"""Wrong labels put in on purpose, for rehearsals: does a run find them?

Which samples get another class, and which class, is a function of the sample's id and the seed, and of nothing else: neither order nor
block size nor worker matter, and the true label follows from the wrong one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from raypipe.config import SourceSettings


@dataclass(frozen=True)
class LabelNoise:
    """Symmetric label noise.

    share  of the samples, each on its own, whose label is replaced by another class, all other classes alike
    seed   another number replaces others
    """

    share: float
    seed: int = 0

    def replaced(self, sample_id: str) -> bool:
        """Whether the sample's label is replaced, where it has one."""
        return self._drawn(sample_id)[0]

    def wrong(self, sample_id: str, label: int, classes: int) -> int:
        """The label in place of the true one, 0..classes-1; -1, no label, stays."""
        return self._moved(sample_id, label, classes, 1)

    def true(self, sample_id: str, label: int, classes: int) -> int:
        """The inverse of `wrong`."""
        return self._moved(sample_id, label, classes, -1)

    @property
    def warning(self) -> str:
        """What is said wherever such a run is shown."""
        return f"{100 * self.share:g} % of the labels were replaced for a rehearsal: do not train on this run's lists"

    def _moved(self, sample_id: str, label: int, classes: int, direction: int) -> int:
        replaced, number = self._drawn(sample_id)
        return (
            (label + direction * (1 + number % (classes - 1))) % classes
            if replaced and label >= 0
            else label
        )

    def _drawn(self, sample_id: str) -> tuple[bool, int]:
        """Whether the label is replaced, and a number that decides by which."""
        key = self.seed.to_bytes(16, "little") + b"noise"
        digest = hashlib.blake2b(
            sample_id.encode("utf-8", "surrogateescape"), digest_size=16, key=key
        ).digest()
        chosen, number = (int.from_bytes(part, "little") for part in (digest[:8], digest[8:]))
        return chosen < int(self.share * 2**64), number


def requested_noise(settings: SourceSettings) -> LabelNoise | None:
    """What `source.inject_noise` asks for; None: nothing."""
    return LabelNoise(settings.inject_noise, settings.noise_seed) if settings.inject_noise else None
