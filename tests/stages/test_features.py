"""Features of another network and of a table, next to the proxy and instead of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import QUIET, cross_fit_config, small_config

from raypipe import storage
from raypipe.errors import ConfigError
from raypipe.pipeline import execute
from raypipe.runs.embedding_table import (
    NO_EMBEDDING,
    EmbeddingTable,
    check_table,
    identity_of_table,
    index_file,
)
from raypipe.runs.embeddings import as_seen_by
from raypipe.runs.features import read_scale, spread, write_scale
from raypipe.runs.proxy_roles import ProxyRoles
from raypipe.runs.run import Run
from raypipe.stages.embed.features import FeatureEmbedder
from raypipe.stages.extrapolate.measured import PartData, read_samples

IDS = [f"digits/{number:04d}" for number in range(600)]


def _column(values: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def _write(file: Path, ids: list[str | None], values: np.ndarray, rows: int = 64) -> None:
    table = pa.table({"sample_id": ids, "embedding": _column(values)})
    pq.write_table(table, file, row_group_size=rows)


def _opened(run: Run, folder: Path) -> EmbeddingTable:
    for number, file in enumerate(sorted(folder.glob("*.parquet"))):
        storage.write_table(run.feature_index(number), index_file(str(file), number))
    return EmbeddingTable.of(run, str(folder))


def test_a_table_is_joined_by_id_and_what_is_missing_is_known(tmp_path: Path) -> None:
    folder, random = tmp_path / "table", np.random.default_rng(0)
    folder.mkdir()
    values = random.normal(size=(200, 3)).astype(np.float32)
    order = random.permutation(200)
    values[5, 1] = np.nan
    names: list[str | None] = [IDS[row] for row in order]
    _write(folder / "a.parquet", names[:120], values[order[:120]], 16)
    _write(folder / "b.parquet", [*names[120:], None], values[[*order[120:], 0]], 16)
    table = _opened(Run(f"{tmp_path}/run"), folder)
    found, usable = table.read([*IDS[:10], "unknown", IDS[150]])
    assert usable.tolist() == [row != 5 for row in range(10)] + [False, True]
    expected = values[[*range(10), 0, 150]]
    expected[[5, 10]] = 0
    np.testing.assert_array_equal(found, expected)


def test_an_empty_embedding_is_not_usable(tmp_path: Path) -> None:
    folder = tmp_path / "table"
    folder.mkdir()
    rows = {"sample_id": IDS[:3], "embedding": [[], [1.0, 2.0], []]}
    pq.write_table(pa.table(rows), folder / "a.parquet")
    found, usable = _opened(Run(f"{tmp_path}/run"), folder).read(IDS[:3])
    assert usable.tolist() == [False, True, False]
    assert found.tolist() == [[0, 0], [1, 2], [0, 0]]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": ["a"], "embedding": [[1.0]]}, "has no column 'sample_id'; the columns are id, emb"),
        ({"sample_id": ["a"], "embedding": ["b"]}, "column 'embedding' of .* is .*expected lists"),
        (
            {"sample_id": ["a", "a"], "embedding": [[1.0], [2.0]]},
            "1 ids occur more than once, .* a",
        ),
        ({"sample_id": ["a", "b"], "embedding": [[1.0], [2.0, 1.0]]}, "of length 2 and 1; all"),
        ({"sample_id": ["a"], "embedding": pa.array([None], pa.list_(pa.float32()))}, "no row has"),
        ({"sample_id": ["a"], "embedding": pa.array([[]], pa.list_(pa.float32()))}, "no row has"),
    ],
)
def test_what_is_wrong_with_a_table_is_one_line(
    tmp_path: Path, columns: dict[str, object], message: str
) -> None:
    folder = tmp_path / "table"
    folder.mkdir()
    pq.write_table(pa.table(columns), folder / "a.parquet")
    with pytest.raises(ConfigError, match=rf"^embed.from: .*{message}") as caught:
        check_table(str(folder))
        _opened(Run(f"{tmp_path}/run"), folder).read(["a", "b"])
    assert "\n" not in str(caught.value)


def test_a_table_that_is_missing_or_has_large_row_groups_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"^embed.from: .*no such"):
        check_table(f"{tmp_path}/missing.parquet")
    _write(tmp_path / "a.parquet", ["a"], np.zeros((1, 2), np.float32))
    monkeypatch.setattr("raypipe.runs.embedding_table.MAX_GROUP_BYTES", 10)
    with pytest.raises(ConfigError, match="row groups of about 4,096 rows"):
        check_table(f"{tmp_path}/a.parquet")


def test_a_table_is_identified_by_its_files(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    _write(file, ["a"], np.zeros((1, 2), np.float32))
    before = identity_of_table(str(file))
    assert before == identity_of_table(str(file))
    _write(file, ["a", "b"], np.zeros((2, 2), np.float32))
    assert identity_of_table(str(file)) != before


def test_embeddings_side_by_side_have_the_same_spread(tmp_path: Path) -> None:
    run, random = Run(f"{tmp_path}/run"), np.random.default_rng(0)
    first = random.normal(3, 2, (500, 5))
    table = random.normal(-1, 50, (500, 3))
    assert read_scale(run) == 1
    write_scale(run, first, table)
    assert spread(table * read_scale(run)) == pytest.approx(spread(first))
    config = small_config(run.uri, "embed.from=table")
    together = FeatureEmbedder(config, run, False)(
        first.astype(np.float32), np.zeros(0), table.astype(np.float32)
    )
    np.testing.assert_array_equal(together[:, :5], first.astype(np.float32))
    assert spread(together[:, 5:]) == pytest.approx(spread(first), rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["embed.model=none"], "none leaves no embeddings; set embed.from"),
        (
            ["embed.model=dino"],
            "'dino' is not allowed: choose one of proxy, none, torchvision:NAME, timm:N",
        ),
        (["embed.model=timm:x", "embed.decode=gpu"], "decoded on CPUs; set it to cpu"),
        (
            ["embed.weights=w.safetensors"],
            "weights: has an effect only with a network in embed.model, now proxy",
        ),
        (
            ["embed.model=none", "embed.from=x", "embed.image_size=32"],
            "image_size: has an effect only with a network in embed.model, now none",
        ),
        (
            [
                "embed.from=x",
                "measure.scores=[el2n]",
                "measure.el2n.at=trajectory",
                "extrapolate.method=gnn",
            ],
            "a rehearsal works with the embeddings of the proxy alone",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_config("run", *overrides)


def test_features_follow_the_embeddings_by_the_proxies_of_a_part() -> None:
    base = np.arange(8, dtype=np.float32).reshape(4, 2)
    table = pa.table({"sample_id": IDS[:4], "embedding": _column(np.concatenate([base, -base], 1))})
    views = {
        proxy: pa.table({"sample_id": IDS[:4], "embedding": _column(base + 100 * proxy)})
        for proxy in (0, 1)
    }
    for proxy in (0, 1):
        seen = as_seen_by(table, views, [proxy], with_features=True)
        expected = np.concatenate([base + 100 * proxy, -base], 1)
        np.testing.assert_array_equal(storage.matrix_of(seen["embedding"]), expected)
        alone = as_seen_by(table, views, [proxy])
        np.testing.assert_array_equal(storage.matrix_of(alone["embedding"]), base + 100 * proxy)
    assert as_seen_by(table, views, []) is table


def test_roles_with_features() -> None:
    added = ProxyRoles.of(cross_fit_config("run", "el2n", "embed.from=x"))
    instead = ProxyRoles.of(cross_fit_config("run", "el2n", "embed.from=x", "embed.model=none"))
    plain = ProxyRoles.of(cross_fit_config("run", "el2n"))
    assert added.space(0) == plain.space(0) == (1,) and instead.space(0) == ()
    assert added.in_views([0, 1]) == instead.in_views([0, 1]) == [0, 1]
    assert plain.in_views([0, 1]) == [1]


@pytest.mark.ray
def test_a_run_with_a_network_and_a_table(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    values = random.normal(size=(599, 3)).astype(np.float32)
    file = tmp_path / "mine.parquet"
    _write(file, list(IDS[1:]), values, 100)
    name, width = "torchvision:shufflenet_v2_x0_5", 1024
    config = cross_fit_config(
        f"{tmp_path}/run",
        "moso",
        f"embed.model={name}",
        "embed.weights=none",
        "embed.image_size=32",
        f"embed.from={file}",
        "measure.moso.gradient=head",
        "select.strategy=d2",
    )
    run = execute(config, progress=QUIET)
    (reject,) = [
        row
        for fragment in run.done("rejects")
        for row in storage.read_table(run.reject_shard(fragment)).to_pylist()
    ]
    assert (reject["sample_id"], reject["reason"]) == (IDS[0], NO_EMBEDDING)
    scale, roles = read_scale(run), ProxyRoles.of(config)
    seen = 0
    for fragment in run.done("embeddings"):
        table = storage.read_table(run.embedding_shard(fragment))
        embedding = storage.matrix_of(table["embedding"])
        rows = [int(name[-4:]) - 1 for name in table["sample_id"].to_pylist()]
        assert embedding.shape[1] == width + 3 and embedding[:, :width].std(0).max() > 0
        np.testing.assert_allclose(embedding[:, width:], values[rows] * scale, rtol=1e-6)
        batch = read_samples(config, run.uri, fragment)
        np.testing.assert_array_equal(batch["embedding"], embedding)
        seen += len(rows)
    assert seen == 599 and set(roles.embedders) == {0, 1, 2}
    assert PartData(config, run, 0).seed.nodes.embedding.shape[1] == width + 3
    assert run.record("embed").detail["features"] == f"{name} and {file}"
    assert "keep-0.25.parquet" in storage.names(run.keep_folder)
