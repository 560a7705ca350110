"""The draws of the seed set and the audit set, and their shards, without a cluster."""

from __future__ import annotations

import numpy as np
import pytest

from raypipe import storage
from raypipe.config import SeedSettings
from raypipe.runs.run import Run
from raypipe.runs.seed_shards import audit_name, read_shard, shard_table
from raypipe.sources.id_sampling import audit_fraction, audit_rule, in_sample

IDS = [f"folder/{number}.jpg" for number in range(20_000)]


def test_the_audit_set_has_about_the_wanted_size_and_no_seed_sample() -> None:
    settings = SeedSettings(fraction=0.2, audit=700)
    rule, seeds = audit_rule(settings, audit_fraction(settings, len(IDS))), in_sample(0.2, 0)
    audit = {sample_id for sample_id in IDS if rule(sample_id)}
    assert 600 < len(audit) < 800
    assert not any(map(seeds, audit))
    # independent of the seed draw: a larger seed set takes its share of the audit set, no more
    assert 0.2 < sum(map(in_sample(0.4, 0), audit)) / len(audit) < 0.3
    other = audit_rule(
        SeedSettings(fraction=0.2, audit=700, seed=1), audit_fraction(settings, len(IDS))
    )
    assert {sample_id for sample_id in IDS if other(sample_id)} != audit


@pytest.mark.parametrize(
    ("settings", "samples", "expected"),
    [
        (SeedSettings(fraction=0.1), 100_000, 500 / 90_000),
        (SeedSettings(fraction=0.1), 20_000, 200 / 18_000),
        (SeedSettings(fraction=0.1), 1000, 50 / 900),
        (SeedSettings(fraction=0.5), 60, 1.0),
        (SeedSettings(fraction=1.0), 1000, 0.0),
        (SeedSettings(fraction=0.1, audit=0), 1000, 0.0),
        (SeedSettings(fraction=0.1, audit=90), 1000, 0.1),
    ],
)
def test_the_share_of_the_other_samples(
    settings: SeedSettings, samples: int, expected: float
) -> None:
    assert audit_fraction(settings, samples) == pytest.approx(expected)


@pytest.mark.parametrize("count", [0, 3])
def test_a_shard_reads_back(tmp_path, count: int) -> None:
    run, images = (
        Run(str(tmp_path)),
        np.random.default_rng(0).integers(0, 256, (count, 3, 4, 4), np.uint8),
    )
    table = shard_table(IDS[:count], [1] * count, images, 2, 4)
    storage.write_table(run.path("seed", f"{audit_name('seed-7')}.parquet"), table)
    ids, pixels, labels = read_shard(run, "audit-7")
    assert (ids, labels.tolist()) == (IDS[:count], [1] * count)
    np.testing.assert_array_equal(pixels, images)
