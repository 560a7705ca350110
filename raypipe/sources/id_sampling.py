"""Hash rules that draw samples by their ids."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from raypipe.config import SeedSettings


def part_rule(parts: int, seed: int) -> Callable[[str], int]:
    """The rule of the division: a function sample_id -> number of its part, 0..parts-1. It does not depend on the rule that
    draws the seed set, also where both have the same `seed`."""
    key = seed.to_bytes(16, "little")

    def rule(sample_id: str) -> int:
        text = sample_id.encode("utf-8", "surrogateescape")
        digest = hashlib.blake2b(text, digest_size=8, key=key, person=b"raypipe-part").digest()
        return int.from_bytes(digest, "little") * parts >> 64

    return rule


Rule = Callable[[str], bool]


def audit_fraction(settings: SeedSettings, samples: int) -> float:
    """The share of the samples outside the seed set that makes an audit set of the wanted size, of that many samples in all."""
    outside = samples * (1 - settings.fraction)
    return min(1.0, settings.audit_samples(samples) / outside) if outside >= 1 else 0.0


def audit_rule(settings: SeedSettings, fraction: float) -> Rule:
    """The rule of the audit draw, which leaves the seed set out; see `audit_fraction`."""
    seeds, audits = (
        in_sample(settings.fraction, settings.seed),
        in_sample(fraction, settings.seed, b"audit"),
    )
    return lambda sample_id: audits(sample_id) and not seeds(sample_id)


def in_sample(fraction: float, seed: int, purpose: bytes = b"") -> Rule:
    """The rule of the draw: a function sample_id -> bool. Draws for other purposes are independent of one another."""
    key, limit = seed.to_bytes(16, "little") + purpose, int(fraction * 2**64)

    def rule(sample_id: str) -> bool:
        digest = hashlib.blake2b(
            sample_id.encode("utf-8", "surrogateescape"), digest_size=8, key=key
        ).digest()
        return int.from_bytes(digest, "little") < limit

    return rule
