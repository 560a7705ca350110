"""The whole job on real digits: its files, a second run, and what a changed setting recomputes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import QUIET, by_id, measured_with, score_files, small_config, stamps

import raypipe
from raypipe import storage
from raypipe.cli import main
from raypipe.config import dump_config
from raypipe.errors import ConfigError, RunError
from raypipe.runs.embeddings import read_special_rows
from raypipe.runs.layout import STAGE_FOLDERS
from raypipe.runs.lease import Lease
from raypipe.runs.manifests import ProxyManifest, SeedManifest
from raypipe.runs.run import Run
from raypipe.runs.seed_shards import read_shard
from raypipe.sources.id_sampling import audit_rule, in_sample
from raypipe.stages.extrapolate.predictions import read_extremes
from raypipe.stages.measure.trajectories import probabilities_of

pytestmark = pytest.mark.ray


def test_every_sample_has_one_score(finished: str) -> None:
    rows = by_id(finished)
    assert len(rows) == 600
    schema = pq.read_schema(
        storage.join(finished, "scores", sorted(storage.names(finished + "/scores"))[0])
    )
    assert [(field.name, field.type) for field in schema] == [
        ("sample_id", pa.string()),
        ("label", pa.int32()),
        ("score", pa.float32()),
        ("lower", pa.float32()),
        ("upper", pa.float32()),
        ("measured", pa.bool_()),
    ]
    for row in rows.values():
        assert np.isfinite(row["score"])
        assert row["lower"] <= row["score"] <= row["upper"]
        assert row["measured"] == (row["lower"] == row["upper"])


def test_seed_set_follows_the_rule_and_keeps_its_measured_scores(finished: str) -> None:
    rule, rows = in_sample(0.35, 0), by_id(finished)
    seed = {sample_id for sample_id in rows if rule(sample_id)}
    audit = {row["sample_id"] for row in audit_table(finished).to_pylist()}
    assert {sample_id for sample_id, row in rows.items() if row["measured"]} == seed | audit
    assert 150 < len(seed) < 270 and 30 < len(audit) < 75 and not seed & audit
    scores = pa.concat_tables(
        [table for _, table in storage.iter_tables(Run(finished).path("measured"))]
    )
    assert {row["sample_id"]: row["moso"] for row in scores.to_pylist()} == {
        key: rows[key]["score"] for key in seed
    }


def audit_table(run: str) -> pa.Table:
    """Measured scores of the audit set."""
    return pa.concat_tables(
        [table for _, table in storage.iter_tables(Run(run).path("measured", "audit"))]
    )


def losses_at(run: Run, images: Any, labels: Any) -> np.ndarray:
    """Return the mean loss of images over the checkpoints."""
    import torch

    from raypipe.runs.manifests import ProxyManifest

    with torch.no_grad():
        (part,) = ProxyManifest.read(run).parts
        models = [measured_with(run, file) for file in part.trained.files]
        found = [
            torch.nn.functional.cross_entropy(model(images), labels, reduction="none").numpy()
            for model in models
        ]
    return np.mean(found, 0)


def test_the_audit_set_is_drawn_by_its_own_rule_and_never_trained_on(finished: str) -> None:
    run, rows = Run(finished), by_id(finished)
    manifest = SeedManifest.read(run)
    assert manifest.audit_fraction == pytest.approx(50 / (600 * 0.65))
    rule = audit_rule(small_config(finished).seed, manifest.audit_fraction)
    drawn = [
        sample_id for shard in manifest.audit_shards for sample_id in read_shard(run, shard)[0]
    ]
    assert sorted(drawn) == sorted(sample_id for sample_id in rows if rule(sample_id))
    assert len(drawn) == manifest.audit_samples == sum(manifest.audit_shard_samples)
    assert (
        sum(manifest.shard_samples)
        == manifest.samples
        == len({key for key in rows if in_sample(0.35, 0)(key)})
    )
    # both sets can be read from the embeddings without the rest
    for which, expected in (("seed", manifest.samples), ("audit", len(drawn))):
        parts = [
            read_special_rows(run, fragment, which) for fragment in sorted(run.done("embeddings"))
        ]
        found = pa.concat_tables([part for part in parts if part is not None])
        assert len(found) == expected
        assert which == "seed" or set(found["sample_id"].to_pylist()) == set(drawn)


def test_audit_scores_are_alignments_with_the_seed_set(finished: str) -> None:
    """Against one process with both sets in memory.

    < G, g > with the seed set's mean gradient, and the length of the gradient.
    """
    import torch

    from raypipe.runs.manifests import ProxyManifest
    from raypipe.scores.moso import combine, gradient_sum
    from raypipe.scores.per_sample import norms_and_alignments

    run = Run(finished)
    proxy, seed = ProxyManifest.read(run).parts[0].trained, SeedManifest.read(run)
    sets = {}
    for which in ("shards", "audit_shards"):
        parts = [read_shard(run, shard) for shard in getattr(seed, which)]
        sets[which] = tuple(
            torch.from_numpy(np.concatenate([part[item] for part in parts])) for item in (1, 2)
        )
    aligned, lengths = [], []
    for item in proxy.checkpoints:
        model = measured_with(run, item.file)
        mean = {
            name: value / seed.samples
            for name, value in gradient_sum(model, *sets["shards"]).items()
        }
        squares, found = norms_and_alignments(model, *sets["audit_shards"], mean)
        aligned.append(found.double().numpy())
        lengths.append(squares.sqrt().numpy())
    rates = np.array([item.lr for item in proxy.checkpoints])
    expected = combine(np.stack(aligned, 1), rates, "lr", steps=proxy.steps, samples=seed.samples)
    table = pa.concat_tables(
        [
            storage.read_table(run.path("measured/audit", f"{shard}.parquet"))
            for shard in seed.audit_shards
        ]
    )
    assert table.column_names == [
        "sample_id",
        "label",
        "moso",
        "grand",
        "loss",
    ]  # EL2N is a trajectory score, so the audit set has none
    np.testing.assert_allclose(
        table["moso"].to_numpy(), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max()
    )
    np.testing.assert_allclose(table["grand"].to_numpy(), np.mean(lengths, 0), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(
        table["loss"].to_numpy(), losses_at(run, *sets["audit_shards"]), rtol=1e-3, atol=1e-5
    )


def test_fidelity_is_that_of_the_audit_set(finished: str) -> None:
    run, rows = Run(finished), by_id(finished)
    about = storage.read_json(run.path("extrapolator", "extrapolator.json"))
    audit = storage.read_table(run.path("extrapolator", "audit.parquet"))
    measured = dict(
        zip(
            *(audit_table(finished)[name].to_pylist() for name in ("sample_id", "moso")),
            strict=True,
        )
    )
    assert (
        dict(zip(audit["sample_id"].to_pylist(), audit["measured"].to_pylist(), strict=True))
        == measured
    )
    fidelity, held_out = about["fidelity"], about["fidelity_seed"]
    assert (fidelity["judged_on"], fidelity["n_held"], fidelity["n_fit"]) == (
        "audit",
        len(measured),
        SeedManifest.read(run).samples,
    )
    extremes = read_extremes(run)
    assert extremes is not None
    more = extremes.predictions
    assert 0 < fidelity["n_extremes"] == len(more)
    weight = extremes.zone.weights(audit["predicted"].to_numpy(), len(more))
    ranks = [
        np.array(
            [weight[values < value].sum() + weight[values == value].sum() / 2 for value in values]
        )
        for values in (
            np.r_[audit["predicted"].to_numpy(), more.predicted],
            np.r_[audit["measured"].to_numpy(), more.measured],
        )
    ]
    covariance = np.cov(*ranks, aweights=weight)
    assert fidelity["spearman"] == pytest.approx(
        covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1])
    )
    assert (
        set(fidelity["overlap"])
        == {"0.25", "0.5"}
        == set(fidelity["baselines"]["class_mean"]["overlap_interval"])
    )
    # after the comparison with their predictions, the samples have their measured scores
    assert all(
        rows[key]["score"] == value and rows[key]["measured"] for key, value in measured.items()
    )
    folds = [
        storage.read_table(run.path("extrapolator", f"fold-{number}.parquet"))
        for number in range(2)
    ]
    held = [set(fold["sample_id"].to_pylist()) for fold in folds]
    assert not held[0] & held[1] and not (held[0] | held[1]) & set(measured)
    assert (held_out["judged_on"], held_out["n_held"]) == ("seed", sum(map(len, held)))
    assert about["measured"] == sum(row["measured"] for row in rows.values())
    assert about["learning_curve"]["judged_on"] == "audit" and about["learning_curve"][
        "n_held"
    ] == len(measured)
    assert about["search"]["kind"] == "exact" and about["search"]["vectors"] == fidelity["n_fit"]


def test_a_strategy_may_look_at_the_embeddings(finished: str) -> None:
    options = {"near_duplicates": 0.999, "weights": "inclusion", "min_per_class": 0}
    assert raypipe.select(finished, 0.125, "beta", **options) == {"keep-0.125.parquet": 75}
    table = storage.read_table(storage.join(finished, "keep", "keep-0.125.parquet"))
    assert (
        set(table["sample_id"].to_pylist()) <= set(by_id(finished))
        and min(table["weight"].to_pylist()) > 0
    )
    storage.delete(storage.join(finished, "keep", "keep-0.125.parquet"))


def test_another_keep_fraction_is_judged_without_another_fit(finished: str) -> None:
    before, scored = stamps(finished, "extrapolator"), stamps(finished, "scores")
    raypipe.run(small_config(finished, "select.keep=[0.125]"), until="extrapolate", progress=QUIET)
    after = stamps(finished, "extrapolator")
    assert {name for name in after if after[name] != before[name]} == {
        "fidelity.json",
        "extrapolator.json",
    }
    about = storage.read_json(f"{finished}/extrapolator/extrapolator.json")
    assert set(about["fidelity"]["overlap"]) == {"0.125"}
    assert stamps(finished, "scores") == scored
    raypipe.run(small_config(finished), progress=QUIET)


def test_seed_shards_hold_the_pixels(finished: str) -> None:
    from sklearn.datasets import load_digits

    manifest, run = SeedManifest.read(Run(finished)), Run(finished)
    assert manifest.samples == sum(manifest.per_class) == sum(manifest.shard_samples)
    ids, images, labels = read_shard(run, manifest.shards[0])
    digits = load_digits()
    for sample_id, image, label in zip(ids[:20], images, labels, strict=False):
        number = int(sample_id.rsplit("/", 1)[-1])
        assert digits.target[number] == label
        np.testing.assert_allclose(image[0] / 255, digits.images[number] / 16, atol=1 / 255)


def test_proxy_writes_checkpoints_with_their_learning_rate_and_a_trajectory(finished: str) -> None:
    run = Run(finished)
    proxy = ProxyManifest.read(run).parts[0].trained
    assert [item.epoch for item in proxy.checkpoints] == [1, 3]
    assert proxy.checkpoints[0].lr > proxy.checkpoints[1].lr > 0
    samples = SeedManifest.read(run).samples
    assert len(proxy.trajectory) == 4
    for files in proxy.trajectory:
        table = pa.concat_tables(
            [storage.read_table(run.path("proxy", "trajectory", file)) for file in files]
        )
        assert sorted(table["row"].to_pylist()) == list(range(samples))
        np.testing.assert_allclose(probabilities_of(table).astype(np.float32).sum(1), 1, atol=0.01)


def test_measured_scores_are_moso(finished: str) -> None:
    """The distributed scores against one process with the whole seed set in memory."""
    import torch

    from raypipe.runs.checkpoints import load_checkpoint
    from raypipe.runs.manifests import ProxyManifest
    from raypipe.scores.calibration import recalibrate
    from raypipe.scores.moso import combine, gradient_sum, leave_one_out
    from raypipe.scores.per_sample import norms_and_alignments

    run = Run(finished)
    proxy, seed = ProxyManifest.read(run).parts[0].trained, SeedManifest.read(run)
    shards = [read_shard(run, shard) for shard in seed.shards]
    ids = [sample_id for shard in shards for sample_id in shard[0]]
    images = torch.from_numpy(np.concatenate([shard[1] for shard in shards]))
    labels = torch.from_numpy(np.concatenate([shard[2] for shard in shards]))
    columns = []
    for item in proxy.checkpoints:
        model = measured_with(run, item.file)
        again = recalibrate(
            load_checkpoint(run, item.file), [images]
        )  # fewer than one batch of 256
        for name, value in again.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-5)
        direction = {
            name: value / len(ids) for name, value in gradient_sum(model, images, labels).items()
        }
        squares, aligned = norms_and_alignments(model, images, labels, direction)
        columns.append(leave_one_out(aligned.double().numpy(), squares.double().numpy(), len(ids)))
    rates = np.array([item.lr for item in proxy.checkpoints])
    expected = combine(np.stack(columns, 1), rates, "lr", steps=proxy.steps, samples=len(ids))
    rows = by_id(finished)
    np.testing.assert_allclose(
        [rows[sample_id]["score"] for sample_id in ids],
        expected,
        rtol=2e-3,
        atol=1e-4 * np.abs(expected).max(),
    )


def test_other_scores_stand_beside_it(finished: str) -> None:
    """EL2N from the trajectory, GraNd and loss from the checkpoints, by their definitions."""
    import torch

    from raypipe.runs.manifests import ProxyManifest
    from raypipe.scores.per_sample import norms_and_alignments

    run = Run(finished)
    proxy, seed = ProxyManifest.read(run).parts[0].trained, SeedManifest.read(run)
    shards = [read_shard(run, shard) for shard in seed.shards]
    labels = np.concatenate([shard[2] for shard in shards])
    distances = []
    for files in proxy.trajectory:
        table = pa.concat_tables(
            [storage.read_table(run.path("proxy", "trajectory", file)) for file in files]
        ).sort_by("row")
        distances.append(
            np.linalg.norm(probabilities_of(table).astype(np.float64) - np.eye(10)[labels], axis=1)
        )
    lengths = []
    images = torch.from_numpy(np.concatenate([shard[1] for shard in shards]))
    for item in proxy.checkpoints:
        squares, _ = norms_and_alignments(
            measured_with(run, item.file), images, torch.from_numpy(labels)
        )
        lengths.append(squares.sqrt().numpy())
    measured = pa.concat_tables(
        [storage.read_table(run.path("measured", f"{shard}.parquet")) for shard in seed.shards]
    )
    assert measured.column_names == ["sample_id", "label", "moso", "el2n", "grand", "loss"]
    np.testing.assert_allclose(
        measured["loss"].to_numpy(),
        losses_at(run, images, torch.from_numpy(labels)),
        rtol=1e-3,
        atol=1e-5,
    )
    np.testing.assert_allclose(
        measured["el2n"].to_numpy(), np.mean(distances, 0), rtol=1e-3, atol=1e-3
    )  # float16
    np.testing.assert_allclose(
        measured["grand"].to_numpy(), np.mean(lengths, 0), rtol=1e-3, atol=1e-5
    )


def test_keep_lists_and_summary(finished: str) -> None:
    rows = sorted(by_id(finished).values(), key=lambda row: -row["score"])
    for fraction, count in (("0.25", 150), ("0.50", 300)):
        kept = pq.read_table(f"{finished}/keep/keep-{fraction}.parquet")
        assert set(kept["sample_id"].to_pylist()) == {row["sample_id"] for row in rows[:count]}
    summary = storage.read_json(f"{finished}/report/summary.json")
    assert summary["counts"]["samples"] == 600
    assert -1 <= summary["fidelity"]["spearman"] <= 1
    assert storage.exists(f"{finished}/report/index.html")


def test_nothing_of_a_run_executes_code_when_it_is_opened(finished: str) -> None:
    allowed = {".parquet", ".json", ".yaml", ".safetensors", ".html", ".log"}
    assert {file.path[file.path.rindex(".") :] for file in storage.listing(finished)} <= allowed


def test_a_second_run_does_nothing(finished: str) -> None:
    folders = [folder for group in STAGE_FOLDERS.values() for folder in group]
    before = {folder: stamps(finished, folder) for folder in folders}
    raypipe.run(small_config(finished), progress=QUIET)
    assert {folder: stamps(finished, folder) for folder in folders} == before


def test_a_deleted_score_shard_is_made_again_and_nothing_else(finished: str) -> None:
    content, before = score_files(finished), stamps(finished, "scores")
    gone = sorted(content)[1]
    storage.delete(f"{finished}/scores/{gone}")
    others = {
        folder: stamps(finished, folder)
        for folder in ("measured", "embeddings", "extrapolator", "proxy", "keep")
    }
    raypipe.run(small_config(finished), progress=QUIET)
    after = stamps(finished, "scores")
    assert {name for name in after if after[name] != before[name]} == {gone}
    assert score_files(finished) == content
    assert {folder: stamps(finished, folder) for folder in others} == others


def test_blocks_batches_and_actors_change_no_more_than_rounding_does(
    finished: str, tmp_path: Path
) -> None:
    """In units of the spread, measured scores agree to 1e-3 and predicted ones, after fits, to 0.02."""
    sizes = (
        "source.fragment_samples=77",
        "measure.batch_size=7",
        "measure.max_actors=2",
        "embed.batch_size=5",
        "embed.max_actors=2",
    )
    raypipe.run(small_config(f"{tmp_path}/run", *sizes), until="extrapolate", progress=QUIET)
    assert len(score_files(f"{tmp_path}/run")) == 8 and len(score_files(finished)) == 5
    before, after = by_id(finished), by_id(f"{tmp_path}/run")
    assert before.keys() == after.keys()
    for measured, tolerance in ((True, 1e-3), (False, 0.02)):
        ids = [sample_id for sample_id, row in before.items() if row["measured"] == measured]
        one, other = (
            np.array([rows[sample_id]["score"] for sample_id in ids]) for rows in (before, after)
        )
        assert len(ids) > 200 and np.abs(one - other).max() < tolerance * one.std()
    for name in ("el2n", "grand", "loss"):
        columns = [
            {
                row["sample_id"]: row[name]
                for _, table in storage.iter_tables(Run(run).path("measured"))
                for row in table.to_pylist()
            }
            for run in (finished, f"{tmp_path}/run")
        ]
        one, other = (np.array([column[key] for key in sorted(columns[0])]) for column in columns)
        assert np.abs(one - other).max() < 1e-3 * one.std(), name


def test_a_changed_setting_redoes_what_depends_on_it(
    finished: str, finished_scores: dict[str, bytes]
) -> None:
    kept, scored = stamps(finished, "keep"), stamps(finished, "scores")
    raypipe.run(small_config(finished, "select.keep=[0.5]"), progress=QUIET)
    assert stamps(finished, "scores") == scored
    assert set(stamps(finished, "keep")) == {"keep-0.50.parquet"}
    gradients = [
        file.path
        for file in storage.listing(finished + "/measured")
        if file.path.startswith("gradients-")
    ]
    old = {name: stamp for name, stamp in stamps(finished, "measured").items() if name in gradients}
    lr = {sample_id: row["score"] for sample_id, row in by_id(finished).items() if row["measured"]}
    raypipe.run(
        small_config(finished, "measure.moso.weights=none"), until="measure", progress=QUIET
    )
    assert {
        name: stamp for name, stamp in stamps(finished, "measured").items() if name in gradients
    } == old, "no new gradients"
    raypipe.run(small_config(finished, "select.keep=[0.5]"), until="measure", progress=QUIET)
    again = [
        pa.concat_tables([table for _, table in storage.iter_tables(finished + "/measured")]),
        audit_table(finished),
    ]
    assert {row["sample_id"]: row["moso"] for table in again for row in table.to_pylist()} == lr
    embedded, measured = stamps(finished, "embeddings"), stamps(finished, "measured")
    published = ("extrapolate.method=gnn-published", "extrapolate.epochs=2")
    raypipe.run(small_config(finished, *published), progress=QUIET)
    assert stamps(finished, "embeddings") == embedded
    assert stamps(finished, "measured") == measured
    assert set(stamps(finished, "scores")) == set(scored)
    assert all(stamps(finished, "scores")[name] != scored[name] for name in scored)
    other = {sample_id: row["score"] for sample_id, row in by_id(finished).items()}
    # the extrapolator over the whole source rewrites a missing shard, too
    content = score_files(finished)
    storage.delete(f"{finished}/scores/{sorted(content)[0]}")
    raypipe.run(small_config(finished, *published), progress=QUIET)
    assert score_files(finished) == content
    raypipe.run(small_config(finished), progress=QUIET)
    assert set(stamps(finished, "keep")) == set(kept)
    assert score_files(finished) == finished_scores
    changed = [
        sample_id for sample_id, row in by_id(finished).items() if row["score"] != other[sample_id]
    ]
    assert changed and not any(by_id(finished)[sample_id]["measured"] for sample_id in changed)


def test_unfaithful_scores_give_a_report_and_no_keep_lists(
    finished: str, capsys: pytest.CaptureFixture[str], tmp_path
) -> None:
    kept, scored = stamps(finished, "keep"), stamps(finished, "scores")
    config = tmp_path / "config.yaml"
    config.write_text(dump_config(small_config(finished, "trust.min_spearman=1")))
    with pytest.raises(SystemExit) as stop:
        main(["run", str(config)])
    said = capsys.readouterr()
    assert stop.value.code == 3
    assert "raypipe: no keep-lists: predicted and measured scores have a Spearman" in said.err
    assert "fidelity    Spearman" in said.out and "keep-list" not in said.out
    assert (
        "audit samples outside the seed set" in said.out
        and "seed samples held out of the fit" in said.out
    )
    assert "twice the seed set: predicted to add" in said.out
    assert stamps(finished, "scores") == scored and not stamps(finished, "keep")
    summary = storage.read_json(f"{finished}/report/summary.json")
    assert summary["refused"].startswith("no keep-lists") and summary["keep"] == []
    forced = raypipe.run(
        small_config(finished, "trust.min_spearman=1", "select.force=true"), progress=QUIET
    ).summary
    assert forced["refused"] is None and [item["forced"] for item in forced["keep"]] == [True, True]
    raypipe.run(small_config(finished), progress=QUIET)
    assert set(stamps(finished, "keep")) == set(kept)


def test_a_second_driver_is_refused(finished: str) -> None:
    with (
        Lease(Run(finished)),
        pytest.raises(RunError, match=r"in use by another driver: process \d+ on"),
    ):
        raypipe.run(small_config(finished), progress=QUIET)


def test_until_stops_after_a_stage(cluster: str, tmp_path: object) -> None:
    raypipe.run(small_config(f"{tmp_path}/run"), until="seed", progress=QUIET)
    ledger = json.loads(storage.read_bytes(f"{tmp_path}/run/run.json"))
    assert list(ledger["stages"]) == ["index", "seed"]
    with pytest.raises(ConfigError, match="'sead' is not one of index, seed"):
        raypipe.run(small_config(f"{tmp_path}/run"), until="sead", progress=QUIET)
