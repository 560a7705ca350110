"""Whole runs with several proxies for each part of the seed set (`proxy.repeats`)."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from helpers import QUIET, cross_fit_config, score_files, small_config, table_of

import raypipe
from raypipe import storage
from raypipe.config import Config
from raypipe.runs.embeddings import as_seen_by, nodes_of, read_views
from raypipe.runs.partition import proxy_parts
from raypipe.runs.proxy_roles import ProxyRoles
from raypipe.runs.run import Run
from raypipe.scores.linear_probe import LinearProbe

REPEATS = ("proxy.repeats=2", "proxy.epochs=2")


def config_of(uri: str, score: str) -> Config:
    scores = "measure.scores=[moso, loss, aum]"
    return cross_fit_config(uri, score, *REPEATS, scores, "extrapolate.method=knn")


def one_part_config(uri: str) -> Config:
    return small_config(
        uri,
        *REPEATS,
        "measure.scores=[aum, moso]",
        "extrapolate.score=aum",
        "extrapolate.method=gnn",
        "extrapolate.folds=1",
        "embed.dtype=float32",
    )


@pytest.fixture(scope="module")
def cross_fit(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two proxies for each of three parts; the loss of linear probes is the score."""
    uri = str(tmp_path_factory.mktemp("repeats") / "run")
    raypipe.run(config_of(uri, "loss"), progress=QUIET)
    return Run(uri)


@pytest.fixture(scope="module")
def one_part(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two proxies on the whole seed set; a trajectory score is extrapolated, after a rehearsal."""
    uri = str(tmp_path_factory.mktemp("one-part") / "run")
    raypipe.run(one_part_config(uri), progress=QUIET)
    return Run(uri)


def by_proxy(table: pa.Table, score: str) -> np.ndarray:
    return np.array(table[f"{score}_by_proxy"].to_pylist(), np.float64)


def test_every_proxy_has_weights_of_its_own(cross_fit: Run) -> None:
    proxies = proxy_parts(cross_fit)
    assert len(proxies) == 6
    weights = {
        storage.read_bytes(cross_fit.path(part.checkpoints, part.trained.final)) for part in proxies
    }
    assert len(weights) == 6


def test_all_proxies_of_other_parts_measure_a_sample(cross_fit: Run) -> None:
    for folder in ("measured", "measured/audit"):
        table = table_of(cross_fit, folder)
        part = ProxyRoles.of(cross_fit.config()).part_of(table["sample_id"].to_pylist())
        values = by_proxy(table, "moso")
        own = np.arange(6)[None] % 3 == part[:, None]
        assert (np.isnan(values) == own).all()
        mean = values[~own].reshape(len(table), 4).mean(1)
        assert table["moso"].to_numpy() == pytest.approx(mean, rel=1e-4, abs=1e-8)
    spread = np.nanstd(by_proxy(table_of(cross_fit, "measured"), "moso"), axis=0)
    assert spread == pytest.approx(np.full(6, spread.mean()), rel=1e-3)


def test_both_proxies_of_its_part_follow_a_sample(cross_fit: Run) -> None:
    table = table_of(cross_fit, "measured")
    part = ProxyRoles.of(cross_fit.config()).part_of(table["sample_id"].to_pylist())
    values = by_proxy(table, "aum")
    own = np.arange(6)[None] % 3 == part[:, None]
    assert (np.isfinite(values) == own).all()
    mean = values[own].reshape(len(table), 2).mean(1)
    assert table["aum"].to_numpy() == pytest.approx(mean, rel=1e-4, abs=1e-6)
    assert (values[own].reshape(-1, 2)[:, 0] != values[own].reshape(-1, 2)[:, 1]).any()


def test_scores_from_embeddings_are_means_over_the_viewers_of_all_repeats(cross_fit: Run) -> None:
    roles = ProxyRoles.of(cross_fit.config())
    classes, losses = len(cross_fit.classes().names), dict[str, list[float]]()
    for proxy in roles.embedders:
        seen = []
        for name in sorted(cross_fit.done("embeddings")):
            table = storage.read_table(cross_fit.embedding_shard(name))
            part = roles.part_of(table["sample_id"].to_pylist())
            table = table.filter(pa.array(roles.is_viewed(part, proxy)))
            views = read_views(cross_fit, name, roles.in_views([proxy]))
            seen.append(as_seen_by(table.replace_schema_metadata(None), views, [proxy]))
        table = pa.concat_tables(seen)
        nodes = nodes_of(table)
        probe = LinearProbe.fit(nodes.embedding, nodes.label, classes)
        loss = probe.statistics(nodes.embedding, nodes.label)["loss"]
        for sample_id, value in zip(table["sample_id"].to_pylist(), loss.tolist(), strict=True):
            losses.setdefault(sample_id, []).append(value)
    for row in table_of(cross_fit, "scores").to_pylist():
        assert len(losses[row["sample_id"]]) == 4
        expected = np.mean(losses[row["sample_id"]])
        assert row["score"] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_stability_counts_every_proxy_and_is_stored_for_both_ways_of_cutting(
    cross_fit: Run,
) -> None:
    found = cross_fit.ledger()["extrapolate"].detail["stability"]
    assert found["proxies"] == 4 and not found["same_samples"]
    assert found["over_all"]["value"] is not None and found["within"]["value"] is not None


def test_a_proxy_that_is_lost_is_trained_again_alike_and_alone(cross_fit: Run) -> None:
    lost = proxy_parts(cross_fit)[4]
    assert lost.folder == "proxy/part-1-repeat-1"
    final = [
        cross_fit.path(part.checkpoints, part.trained.final) for part in proxy_parts(cross_fit)
    ]
    before = [storage.read_bytes(file) for file in final]
    kept = [storage.info(file) for number, file in enumerate(final) if number != 4]
    scores = score_files(cross_fit.uri)
    storage.delete(cross_fit.path(lost.folder))
    raypipe.run(config_of(cross_fit.uri, "loss"), progress=QUIET)
    assert [storage.read_bytes(file) for file in final] == before
    assert [storage.info(file) for number, file in enumerate(final) if number != 4] == kept
    assert score_files(cross_fit.uri) == scores


def test_an_extrapolator_sees_the_embeddings_of_all_repeats(cross_fit: Run) -> None:
    raypipe.run(config_of(cross_fit.uri, "moso"), progress=QUIET)
    scores = table_of(cross_fit, "scores")
    assert np.isfinite(scores["score"].to_numpy()).all()
    detail = cross_fit.ledger()["extrapolate"].detail
    assert detail["fidelity"]["judged_on"] == "cross-fit"
    assert detail["stability"]["proxies"] == 4


def test_one_part_has_a_stability_from_its_repeats(one_part: Run) -> None:
    assert [part.folder for part in proxy_parts(one_part)] == ["proxy/repeat-0", "proxy/repeat-1"]
    table = table_of(one_part, "measured")
    for score in ("aum", "moso"):
        values = by_proxy(table, score)
        assert values.shape == (len(table), 2) and np.isfinite(values).all()
        assert table[score].to_numpy() == pytest.approx(values.mean(1), rel=1e-4, abs=1e-6)
        assert values.std(0)[0] == pytest.approx(values.std(0)[1], rel=1e-3)
    found = one_part.ledger()["extrapolate"].detail["stability"]
    assert found["proxies"] == 2 and found["same_samples"] and found["value"] is not None
    summary = storage.read_json(one_part.report_summary)
    assert "another training on the same seed set" in summary["fidelity"]["sentence"]


def test_one_part_is_seen_by_all_its_proxies_and_rehearsed_with_one(one_part: Run) -> None:
    embeddings, views = table_of(one_part, "embeddings"), table_of(one_part, "views")
    assert set(views["proxy"].to_pylist()) == {1} and len(views) == len(embeddings)
    scores = table_of(one_part, "scores")
    assert len(scores) == len(embeddings) and np.isfinite(scores["score"].to_numpy()).all()
    ledger = one_part.ledger()
    assert len(ledger["proxy"].detail["parts"]) == 2
    assert "trained" in ledger["rehearse"].detail and "parts" not in ledger["rehearse"].detail
