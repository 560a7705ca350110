"""Roles, names and seeds of several proxies, and the mean of what they say, without Ray."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from helpers import small_config

from raypipe import storage
from raypipe.runs.embeddings import as_seen_by, read_views
from raypipe.runs.manifests import Checkpoint, ProxyManifest, ProxyOfPart, TrainedProxy
from raypipe.runs.partition import SeedPart, proxy_parts, trajectory_files
from raypipe.runs.proxy_roles import ProxyRoles
from raypipe.runs.run import Run
from raypipe.stages.measure.common_scale import CommonScale, join_proxies
from raypipe.stages.proxy.stage import ProxyStage
from raypipe.vision.forward_by_proxies import forward_by_proxies

IDS = [f"sample-{number}" for number in range(60)]


def test_with_cross_fitting_no_proxy_of_its_own_part_sees_a_sample() -> None:
    roles = ProxyRoles(parts=4, seed=0, repeats=2)
    part = roles.part_of(IDS)
    seen = np.stack([roles.sees(part, proxy) for proxy in range(8)], 1)
    assert (seen.sum(1) == 6).all()
    assert not seen[np.arange(len(IDS)), part].any()
    assert not seen[np.arange(len(IDS)), 4 + part].any()
    assert roles.viewers(1) == (0, 2, 4, 6)
    assert roles.space(0) == (1, 5) and roles.space(3) == (0, 4)
    assert roles.embedders == [0, 1, 2, 4, 5, 6]
    # an extrapolator sees embeddings by proxies that were trained on none of its samples
    for number in range(4):
        trained_on = {proxy % 4 for proxy in roles.space(number)}
        assert not trained_on & {number, *roles.fit_parts(number)}


def test_without_cross_fitting_one_proxy_of_each_repeat_sees_every_sample() -> None:
    roles = ProxyRoles(parts=2, seed=0, repeats=3, cross_fits=False)
    part = roles.part_of(IDS)
    assert (part == 0).all() and not roles.single and roles.groups == 1
    assert roles.seen_by(0) == roles.viewers(0) == roles.space(0) == (0, 2, 4)
    assert roles.sees(part, 2).all() and not roles.sees(part, 1).any()
    assert ProxyRoles(2, 0, 1, cross_fits=False).single


def test_one_repeat_is_as_before_there_were_repeats() -> None:
    roles = ProxyRoles.of(small_config("run", "proxy.parts=3"))
    assert [roles.viewers(part) for part in range(3)] == [(1, 2), (0, 2), (0, 1)]
    assert [roles.space(part) for part in range(3)] == [(1,), (0,), (0,)]
    assert roles.embedders == [0, 1, 2]
    part = SeedPart(1, 3, 7, 0, ())
    assert (part.folder, part.training_seed) == ("proxy/part-1", 7)
    assert "repeats" not in ProxyStage().settings(small_config("run"))
    assert ProxyStage().settings(small_config("run", "proxy.repeats=2"))["repeats"] == 2


def test_every_proxy_has_a_folder_and_draws_of_its_own(tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    parts = [
        ProxyOfPart(
            9,
            (4, 5),
            TrainedProxy(4, 2, (("a",), ("b",)), (Checkpoint(1, 0.1, f"{n}"),), f"{n}"),
        )
        for n in range(6)
    ]
    manifest = ProxyManifest("small", 2, 8, (0.0,) * 3, (1.0,) * 3, 27, 5, tuple(parts), 2)
    manifest.write(run)
    assert ProxyManifest.read(run) == manifest
    proxies = proxy_parts(run)
    assert [(part.number, part.repeat) for part in proxies] == [
        (number, repeat) for repeat in range(2) for number in range(3)
    ]
    assert [part.trained.final for part in proxies] == list("012345")
    folders = [item["folder"] for item in storage.read_json(run.proxy_manifest_file)["parts"]]
    assert [f"proxy/{folder}" for folder in folders] == [part.folder for part in proxies]
    assert len(set(folders)) == 6
    assert len({(part.training_seed, part.number) for part in proxies}) == 6
    assert {part.training_seed for part in proxies[:3]} == {5}
    assert trajectory_files(run, 1)[0] == [
        f"proxy/part-{number}-repeat-1/trajectory/a" for number in range(3)
    ]
    assert SeedPart(0, 1, 0, 9, (), repeat=1, repeats=2).folder == "proxy/repeat-1"


def test_statistics_are_means_over_the_proxies_that_see_an_image() -> None:
    roles = ProxyRoles(parts=3, seed=0, repeats=2)
    part = roles.part_of(IDS)
    rng = np.random.default_rng(0)
    loss = rng.normal(size=(6, len(IDS))).astype(np.float32)
    probabilities = rng.dirichlet(np.ones(4), (6, len(IDS))).astype(np.float32)
    embedding = rng.normal(size=(6, len(IDS), 2)).astype(np.float32)
    passed: dict[int, np.ndarray] = {}

    def forward(proxy: int, rows: np.ndarray) -> dict[str, np.ndarray]:
        passed[proxy] = rows
        statistics = dict.fromkeys(("loss", "margin", "entropy"), loss[proxy, rows])
        return {
            "embedding": embedding[proxy, rows],
            "probabilities": probabilities[proxy, rows],
            **statistics,
        }

    outputs = forward_by_proxies(
        forward,
        {proxy: roles.sees(part, proxy) for proxy in range(6)},
        {proxy: roles.is_viewed(part, proxy) for proxy in roles.embedders[1:]},
        len(roles.seen_by(0)),
    )
    assert len(passed[0]) == len(IDS)
    for row, own in enumerate(part):
        seen = [proxy for proxy in range(6) if proxy % 3 != own]
        assert outputs.columns["loss"][row] == pytest.approx(loss[seen, row].mean(), abs=1e-6)
        mean = probabilities[seen, row].mean(0)
        assert outputs.columns["prediction"][row] == mean.argmax()
        viewers = [proxy for proxy, view in outputs.views.items() if row in view.rows]
        assert viewers == [proxy for proxy in roles.viewers(int(own)) if proxy]
    for proxy, view in outputs.views.items():
        assert (view.embedding == embedding[proxy, view.rows]).all()


def test_embeddings_of_several_proxies_stand_side_by_side(tmp_path: Path) -> None:
    run = Run(str(tmp_path))

    def column(values: np.ndarray) -> pa.Array:
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])

    base = np.arange(8, dtype=np.float32).reshape(4, 2)
    table = pa.table({"sample_id": IDS[:4], "embedding": column(base)})
    views = [
        pa.table(
            {
                "sample_id": [IDS[row] for row in rows],
                "proxy": pa.array([proxy] * len(rows), pa.int8()),
                "embedding": column(base[rows] + 100 * proxy),
            }
        )
        for proxy, rows in ((1, [2, 0]), (4, [0, 1, 2, 3]))
    ]
    storage.write_table_groups(run.view_shard("f"), views)
    assert read_views(run, "none", []) == {}
    read = read_views(run, "f", [1, 4])
    assert sorted(read) == [1, 4]
    seen = as_seen_by(table, read, [0, 4])
    values = np.array(seen["embedding"].to_pylist())
    assert (values == np.concatenate([base, base + 400], 1)).all()
    seen = as_seen_by(table, read, [1])
    assert seen["sample_id"].to_pylist() == [IDS[0], IDS[2]]
    assert (np.array(seen["embedding"].to_pylist()) == base[[0, 2]] + 100).all()
    assert as_seen_by(table, {}, [0]) is table


@pytest.mark.parametrize("score", ["moso", "aum", "loss"])
def test_scores_of_repeats_are_averaged_on_a_common_scale(score: str) -> None:
    """Those of `moso` and `aum` have the same spread by each proxy; those of `loss` stay."""
    rng = np.random.default_rng(0)
    units = np.array([1.0, 50.0, 0.02])
    values = (rng.normal(size=(40, 3)) * units).astype(np.float32)
    values -= values.mean(0)
    labels = pa.table({"sample_id": IDS[:40], "label": pa.array([0] * 40, pa.int32())})
    tables = [labels.append_column(score, pa.array(values[:, proxy])) for proxy in range(3)]
    joined = join_proxies(labels, tables, CommonScale.of_proxies([[table] for table in tables]))
    by_proxy = np.array(joined[f"{score}_by_proxy"].to_pylist())
    spread = values.std(0)
    expected = values * (1 if score == "loss" else spread.mean() / spread)
    np.testing.assert_allclose(by_proxy, expected, rtol=1e-4)
    np.testing.assert_allclose(joined[score], expected.mean(1), rtol=1e-3, atol=1e-5)
