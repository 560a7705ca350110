"""Draw samples by hashes of their ids, so that a draw depends on neither order nor worker."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from raypipe.config import SeedSettings
from raypipe.sources.types import IdFilter


def part_rule(parts: int, seed: int) -> Callable[[str], int]:
    """Return the rule that divides samples into parts.

    It is independent of the rule that draws the seed set, even if both have the same `seed`.

    Returns
    -------
    callable
        A function `sample_id -> part`, 0..parts-1.
    """
    key = seed.to_bytes(16, "little")

    def part_of(sample_id: str) -> int:
        content = sample_id.encode("utf-8", "surrogateescape")
        digest = hashlib.blake2b(content, digest_size=8, key=key, person=b"raypipe-part").digest()
        return int.from_bytes(digest, "little") * parts >> 64

    return part_of


def audit_fraction(settings: SeedSettings, samples: int) -> float:
    """Return the fraction of samples outside the seed set that gives the configured audit set.

    `samples` is the number of samples in all.
    """
    outside = samples * (1 - settings.fraction)
    return min(1.0, settings.audit_samples(samples) / outside) if outside >= 1 else 0.0


def audit_rule(settings: SeedSettings, fraction: float) -> IdFilter:
    """Return the rule that draws the audit set, which excludes the seed set.

    `fraction` is that of `audit_fraction`.
    """
    in_seed = in_sample(settings.fraction, settings.seed)
    in_audit = in_sample(fraction, settings.seed, b"audit")
    return lambda sample_id: in_audit(sample_id) and not in_seed(sample_id)


def in_sample(fraction: float, seed: int, purpose: bytes = b"") -> IdFilter:
    """Return the rule that draws a fraction of all samples.

    Draws for different purposes are independent of one another.
    """
    key, limit = seed.to_bytes(16, "little") + purpose, int(fraction * 2**64)

    def is_drawn(sample_id: str) -> bool:
        content = sample_id.encode("utf-8", "surrogateescape")
        digest = hashlib.blake2b(content, digest_size=8, key=key).digest()
        return int.from_bytes(digest, "little") < limit

    return is_drawn
