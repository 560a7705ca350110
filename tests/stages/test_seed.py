"""The draws of the seed set and the audit set, and their shards, without a cluster."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from helpers import small_config
from serial import index, no_ray, seed  # noqa: F401

from raypipe import storage
from raypipe.config import SeedSettings
from raypipe.errors import StageError
from raypipe.runs.drawn_samples import DrawnSamples, read_drawn, write_drawn
from raypipe.runs.manifests import SeedManifest
from raypipe.runs.run import Run
from raypipe.runs.seed_shards import audit_name, read_shard, shard_table
from raypipe.selection.hashing import canonical_hashes, canonical_order, hash_range
from raypipe.sources.id_sampling import audit_fraction, audit_rule, in_sample
from raypipe.stages.seed import plan, stage

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


@pytest.mark.parametrize("ranges", [1, 4, 9])
def test_a_range_of_shards_is_read_from_all_drawn_files(tmp_path, ranges: int) -> None:
    run, rng = Run(str(tmp_path)), np.random.default_rng(0)
    count = 200
    images = rng.integers(0, 256, (count, 3, 4, 4), np.uint8)
    samples = DrawnSamples(
        IDS[:count], np.arange(count, dtype=np.int32), images, rng.random(count) < 0.3
    )
    rows = np.split(rng.permutation(count), [7, 7, 150])  # one file is empty
    names = [f"drawn-{number}" for number in range(len(rows))]
    for name, part in zip(names, rows, strict=True):
        write_drawn(run, name, samples.take(part), ranges, {"drawn": len(part)})
    order = canonical_order(samples.ids)
    shard = hash_range(canonical_hashes(samples.ids), 12)[order]
    for first, stop in ((0, 12), (3, 7), (11, 12)):
        read, shards = read_drawn(run, names, 4, 12, first, stop)
        expected = order[(shard >= first) & (shard < stop)]
        assert read.ids == [IDS[row] for row in expected] and len(read.ids) > 5
        np.testing.assert_array_equal(read.images, images[expected])
        np.testing.assert_array_equal(read.labels, expected)
        np.testing.assert_array_equal(read.audit, samples.audit[expected])
        np.testing.assert_array_equal(shards, shard[(shard >= first) & (shard < stop)])


def test_an_interrupted_stage_draws_and_gathers_only_what_is_missing(
    tmp_path,
    no_ray,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan, "SEED_SHARD_SAMPLES", 16)
    monkeypatch.setattr(plan, "gather_bytes", lambda pixels: 3 * 8 * 8 * 24)
    calls: list[str] = []

    def stopping(function, after: int):
        def call(*arguments):
            if calls.count(function.__name__) == after:
                raise KeyboardInterrupt
            calls.append(function.__name__)
            return function(*arguments)

        return call

    settings = ("source.limit=300", "source.fragment_samples=32")
    whole, config = (small_config(f"{tmp_path}/{name}", *settings) for name in ("whole", "run"))
    draw, gather = stage.draw_samples, stage.gather_shards
    index(whole)
    seed(whole)
    index(config)
    for drawn, gathered in ((2, 0), (4, 0), (99, 3), (99, 5), (99, 99)):
        monkeypatch.setattr(stage, "draw_samples", stopping(draw, drawn))
        monkeypatch.setattr(stage, "gather_shards", stopping(gather, gathered))
        if gathered == 99:
            seed(config)
        else:
            with pytest.raises(KeyboardInterrupt):
                seed(config)
    run, expected = Run(config.run), SeedManifest.read(Run(whole.run))
    manifest = SeedManifest.read(run)
    assert manifest == expected and len(manifest.shards) > 5
    assert calls.count("gather_shards") == len(manifest.shards)
    assert calls.count("draw_samples") < len(run.fragments())
    for shard in manifest.all_shards:
        ours, theirs = run.seed_shard(shard), Run(whole.run).seed_shard(shard)
        assert storage.read_bytes(ours) == storage.read_bytes(theirs)
    assert not storage.exists(run.drawn_folder)


def test_shards_that_a_proxy_was_trained_on_are_not_replaced_by_others(
    tmp_path,
    no_ray,
) -> None:
    config = small_config(f"{tmp_path}/run")
    run = Run(config.run)
    index(config)
    seed(config)
    (shard,) = SeedManifest.read(run).shards
    content = storage.read_bytes(run.seed_shard(shard))
    storage.write_bytes(run.path("proxy", "proxy.json"), b"{}")
    storage.delete(run.seed_shard(shard))
    seed(config)
    assert storage.read_bytes(run.seed_shard(shard)) == content  # the same as before
    manifest = SeedManifest.read(run)
    dataclasses.replace(manifest, shards=("seed-00000-older",)).write(run)
    with pytest.raises(
        StageError,
        match=r"1 of 2 seed and audit shards are lost, such as seed/seed-00000-older\.parq",
    ):
        seed(config)
    storage.delete(run.path("proxy"))
    seed(config)
    assert SeedManifest.read(run) == manifest
