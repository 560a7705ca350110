"""Which tasks draw the samples of the seed set, and which seed shards they are gathered into."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from raypipe.config import Config
from raypipe.runs.ledger import content_hash
from raypipe.runs.seed_shards import audit_name
from raypipe.runs.sizes import MAX_DRAWN_FILES, SEED_SHARD_SAMPLES, gather_bytes
from raypipe.sources import Fragment
from raypipe.sources.id_sampling import audit_fraction


@dataclass(frozen=True)
class DrawUnit:
    """Consecutive fragments whose samples one task draws, and the name of the file it writes."""

    name: str
    fragments: list[Fragment]

    @property
    def samples(self) -> int:
        """Samples of the fragments."""
        return sum(fragment.samples for fragment in self.fragments)


@dataclass(frozen=True)
class ShardGroup:
    """Consecutive seed shards that one task writes.

    Attributes
    ----------
    first : int
        Number of the first shard.
    names : tuple of str
        Names of the shards.
    """

    first: int
    names: tuple[str, ...]

    @property
    def stop(self) -> int:
        """Number after that of the last shard."""
        return self.first + len(self.names)

    @property
    def files(self) -> set[str]:
        """Names of the seed shards and of their audit shards."""
        return {*self.names, *map(audit_name, self.names)}


@dataclass(frozen=True)
class SeedPlan:
    """How the seed set and the audit set come from the fragments of a source.

    Attributes
    ----------
    units : list of DrawUnit
        The groups of fragments that samples are drawn from.
    shards : tuple of str
        Names of the seed shards, in order. Their number depends on that of the samples alone; the
        hash in a name depends on the fragments.
    group_shards : int
        Shards that one task gathers.
    audit : float
        Share of the samples outside the seed set that is in the audit set.
    """

    units: list[DrawUnit]
    shards: tuple[str, ...]
    group_shards: int
    audit: float

    @classmethod
    def of(cls, fragments: Sequence[Fragment], config: Config) -> SeedPlan:
        """Plan the draw from these fragments."""
        samples = sum(fragment.samples for fragment in fragments)
        audit = audit_fraction(config.seed, samples)
        expected = samples * config.seed.fraction
        units = _draw_units(fragments, config.seed.fraction, expected)
        count = max(1, math.ceil(expected / SEED_SHARD_SAMPLES)) if units else 0
        content = content_hash(unit.name for unit in units)
        pixels = 3 * config.proxy.image_size**2 * (expected + audit * (samples - expected))
        group_shards = max(1, math.floor(count * gather_bytes(pixels) / max(1.0, pixels)))
        return cls(
            units,
            tuple(f"seed-{number:05d}-{content}" for number in range(count)),
            min(group_shards, max(1, count)),
            audit,
        )

    @property
    def samples(self) -> int:
        """Samples of all fragments."""
        return sum(unit.samples for unit in self.units)

    @property
    def ranges(self) -> int:
        """Number of equal ranges of hashes, about as long as those of a group of shards."""
        return max(1, math.ceil(len(self.shards) / self.group_shards))

    @property
    def files(self) -> set[str]:
        """Names of all seed and audit shards."""
        return {*self.shards, *map(audit_name, self.shards)}

    def groups(self) -> Iterator[ShardGroup]:
        """Yield the groups of shards that tasks gather."""
        for first in range(0, len(self.shards), self.group_shards):
            yield ShardGroup(first, self.shards[first : first + self.group_shards])


def _draw_units(fragments: Sequence[Fragment], fraction: float, expected: float) -> list[DrawUnit]:
    """Group consecutive fragments that give about SEED_SHARD_SAMPLES seed samples."""
    least = max(SEED_SHARD_SAMPLES, expected / MAX_DRAWN_FILES)
    units: list[DrawUnit] = []
    group: list[Fragment] = []
    samples = 0
    for fragment in fragments:
        group.append(fragment)
        samples += fragment.samples
        if samples * fraction >= least or fragment is fragments[-1]:
            content = content_hash(item.fragment_id for item in group)
            units.append(DrawUnit(f"drawn-{len(units):05d}-{content}", group))
            group, samples = [], 0
    return units
