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
    number = _hash_of(seed.to_bytes(16, "little"), b"raypipe-part")
    return lambda sample_id: number(sample_id) * parts >> 64


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
    number, limit = _hash_of(seed.to_bytes(16, "little") + purpose), int(fraction * 2**64)
    return lambda sample_id: number(sample_id) < limit


def _hash_of(key: bytes, person: bytes = b"") -> Callable[[str], int]:
    """Return a function `sample_id -> number`, uniform in 0..2**64-1."""
    start = hashlib.blake2b(digest_size=8, key=key, person=person)

    def number(sample_id: str) -> int:
        state = start.copy()  # takes two thirds of the time of a new one with the key
        state.update(sample_id.encode("utf-8", "surrogateescape"))
        return int.from_bytes(state.digest(), "little")

    return number
