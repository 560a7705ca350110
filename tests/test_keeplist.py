from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import serial
from helpers import QUIET, digit_pngs
from scored import add_weights, scored_run
from torch.utils.data import DataLoader

import raypipe
from raypipe import storage
from raypipe.cli import main
from raypipe.errors import ConfigError, RunError, SourceError
from raypipe.keeplists.weighted_subset import WeightedSubset
from raypipe.runs.run import Run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Digits; 60 of 120 are kept, with weights."""
    run = scored_run(
        str(tmp_path_factory.mktemp("list") / "run"), "digits://", limit=120, fragment_samples=16
    )
    add_weights(run, 0.5)
    return run


class Rows:
    """A map-style dataset that knows nothing of ids."""

    def __init__(self, count: int, **known: Any) -> None:
        self._count = count
        self.__dict__ |= known

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int | str) -> Any:
        return self.columns[index] if isinstance(index, str) else index

    @property
    def column_names(self) -> list[str]:
        return list(self.columns)


def numbers(keep: raypipe.KeepList) -> list[int]:
    return sorted(int(sample_id.removeprefix("digits/")) for sample_id in keep)


def test_what_a_list_holds(run: Run) -> None:
    keep = raypipe.KeepList(run.uri, keep=0.5)
    rows = storage.read_table(run.path("keep", "keep-0.50.parquet")).to_pylist()
    assert len(keep) == 60 and list(keep) == keep.ids == [row["sample_id"] for row in rows]
    assert keep.ids[0] in keep and "digits/9999" not in keep and 3 not in keep
    assert keep.labels.tolist() == [row["label"] for row in rows]
    assert (
        keep.scores.tolist() == [row["score"] for row in rows] and keep.scores.dtype == np.float32
    )
    assert keep.weights is not None and keep.weights.tolist() == [row["weight"] for row in rows]
    assert {key: keep.metadata[key] for key in ("fraction", "count", "samples", "strategy", "forced", "spearman")} == {
        "fraction": 0.5, "count": 60, "samples": 120, "strategy": "top", "forced": False, "spearman": None,
    }  # fmt: skip
    for same in (
        raypipe.KeepList(Path(run.path("keep", "keep-0.50.parquet"))),
        pickle.loads(pickle.dumps(keep)),
    ):
        assert same.ids == keep.ids and same.subset(Rows(120, columns={})).indices == numbers(keep)


def test_lists_that_are_not_there(run: Run, tmp_path: Path) -> None:
    with pytest.raises(
        RunError,
        match=r"fraction 0\.3; available: keep-0\.50\.parquet\. Write it with `raypipe select .* --keep 0\.3`",
    ):
        raypipe.KeepList(run.uri, 0.3)
    with pytest.raises(RunError, match="no such keep-list"):
        raypipe.KeepList(f"{tmp_path}/keep-0.50.parquet")
    storage.write_bytes(f"{tmp_path}/other.parquet", b"words")
    with pytest.raises(RunError, match="not a readable Parquet file"):
        raypipe.KeepList(f"{tmp_path}/other.parquet")


def test_a_list_on_s3_without_labels_or_weights(s3: str) -> None:
    table = pa.table(
        {
            "sample_id": ["b", "a"],
            "label": pa.array([None, 2], pa.int32()),
            "score": pa.array([1, 2], pa.float32()),
        }
    )
    storage.write_table(f"{s3}/lists/mine.parquet", table)
    keep = raypipe.KeepList(f"{s3}/lists/mine.parquet")
    assert (
        keep.ids == ["b", "a"]
        and keep.labels.tolist() == [-1, 2]
        and keep.weights is None
        and keep.metadata == {}
    )
    with pytest.raises(ConfigError, match="the list has no weights"):
        keep.sampler(Rows(3), ids=["a", "b", "c"])
    with pytest.raises(SourceError, match="do not identify samples"):
        keep.subset(Rows(3, columns={}))


def test_indices_are_ascending_and_missing_ids_are_counted(run: Run) -> None:
    keep = raypipe.KeepList(run.uri)
    ids = [f"digits/{number:04d}" for number in reversed(range(200))]
    assert keep.indices(ids) == sorted(199 - number for number in numbers(keep))
    assert keep.indices(np.array(ids)) == keep.indices(iter(ids))
    with pytest.raises(
        SourceError,
        match=r"of the 60 samples of the keep-list are not among the 100 of the dataset, such as 'digits",
    ):
        keep.indices(ids[:100])
    assert len(keep.indices(ids[:100], strict=False)) == sum(
        number >= 100 for number in numbers(keep)
    )
    with pytest.raises(SourceError, match="1 kept ids occur more than once in the dataset"):
        keep.indices([*ids, keep.ids[7]])
    assert keep.indices([], strict=False) == []


def test_subset_and_sampler_agree(run: Run) -> None:
    import torch
    from torch.utils.data import DataLoader, Subset, TensorDataset

    keep = raypipe.KeepList(run.uri)
    dataset = TensorDataset(torch.arange(120))
    subset = keep.subset(dataset)
    assert isinstance(subset, Subset) and [int(item[0]) for item in subset] == numbers(keep)
    backwards = [f"digits/{number:04d}" for number in reversed(range(120))]
    for ids in (backwards, lambda index: backwards[index]):
        assert sorted(119 - int(item[0]) for item in keep.subset(dataset, ids)) == numbers(keep)
    assert (
        keep.subset(Subset(dataset, range(119, -1, -1))).indices
        == keep.subset(dataset, backwards).indices
    )
    with pytest.raises(SourceError, match="3 ids are given, but the dataset has 120"):
        keep.subset(dataset, ["a", "b", "c"])
    with pytest.raises(
        SourceError,
        match=r"of the 60 samples of the keep-list are beyond the 50 samples of the dataset",
    ):
        keep.subset(TensorDataset(torch.arange(50)))
    assert keep.subset(TensorDataset(torch.arange(50)), strict=False).indices == [
        number for number in numbers(keep) if number < 50
    ]
    assert keep.weights is not None
    weight = dict(zip(keep.ids, keep.weights.tolist(), strict=True))
    sampler = keep.sampler(dataset, num_samples=4000, generator=torch.Generator().manual_seed(0))
    assert sampler.weights.tolist() == [weight[f"digits/{number:04d}"] for number in subset.indices]
    drawn = torch.cat([batch for (batch,) in DataLoader(subset, batch_size=500, sampler=sampler)])
    assert len(drawn) == 4000 and set(drawn.tolist()) == set(subset.indices)
    assert len(keep.sampler(dataset)) == 60
    labels = digit_pngs(120)[1]
    with pytest.raises(SourceError, match="have another label"):
        keep.subset(Rows(120, targets=labels[::-1], columns={}))


def test_a_list_is_redrawn_in_every_epoch_with_weights(run: Run, tmp_path: Path) -> None:
    keep, ids = raypipe.KeepList(run.uri), [f"digits/{number:04d}" for number in range(120)]
    assert keep.weights is not None
    weight = dict(zip(keep.ids, keep.weights.tolist(), strict=True))
    drawn = [keep.redraw(epoch, 0.4, ratio=2.0) for epoch in range(3)]
    assert [len(one) for one in drawn] == [24, 24, 24]
    assert len({frozenset(one.ids) for one in drawn}) == 3
    assert keep.redraw(1, 0.4, ratio=2.0).ids == drawn[1].ids
    assert set(keep.redraw(1, 0.4, seed=1).ids) != set(keep.redraw(1, 0.4).ids)
    uniform = keep.redraw(0, 0.4)
    assert uniform.weights is not None
    assert uniform.weights.tolist() == pytest.approx([weight[name] for name in uniform.ids])
    # weighted sums of any figure are unbiased
    figure = dict(zip(keep.ids, np.random.default_rng(0).normal(size=60).tolist(), strict=True))
    truth = np.mean([weight[name] * figure[name] for name in keep.ids])
    means = []
    for epoch in range(1500):
        one = keep.redraw(epoch, 0.4, ratio=2.0)
        assert one.weights is not None
        means.append(np.mean(one.weights * [figure[name] for name in one.ids]))
    assert abs(np.mean(means) - truth) < 4 * np.std(means) / 1500**0.5

    one = drawn[0]
    assert one.weights is not None
    subset = one.subset(Rows(120, columns={}), ids, weights=True)
    expected = dict(zip(one.ids, one.weights.tolist(), strict=True))
    assert [pair[0] for pair in subset] == sorted(ids.index(name) for name in one.ids)
    assert all(pair[1] == expected[ids[pair[0]]] for pair in subset)
    batch = next(iter(DataLoader(subset, batch_size=24)))
    assert batch[0].tolist() == subset.indices and batch[1].tolist() == subset.weights
    for sample, whole in (((1, 2), (1, 2, 0.5)), ({"a": 1}, {"a": 1, "weight": 0.5})):
        assert WeightedSubset([sample], [0], [0.5])[0] == whole  # type: ignore[arg-type]
    for wrong in ({"share": 0.0}, {"share": 1.1}, {"ratio": 0.5}):
        with pytest.raises(ConfigError, match="is not possible"):
            keep.redraw(0, **wrong)


def test_folders_of_torchvision(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    images, labels = digit_pngs(30)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        storage.write_bytes(
            f"{tmp_path}/images/{label}/{'deep/' * (number % 2)}{number}.png", image
        )
    run = scored_run(f"{tmp_path}/run", f"{tmp_path}/images")
    keep, dataset = raypipe.KeepList(run.uri), ImageFolder(f"{tmp_path}/images")
    subset = keep.subset(dataset)
    assert len(subset) == 15
    assert {
        str(Path(dataset.samples[index][0]).relative_to(dataset.root)) for index in subset.indices
    } == set(keep)
    assert [dataset.targets[index] for index in subset.indices] == [
        int(
            keep.labels[
                keep.ids.index(str(Path(dataset.samples[index][0]).relative_to(dataset.root)))
            ]
        )
        for index in subset.indices
    ]


@pytest.fixture(scope="module")
def of_parquet(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("parquet")
    images, labels = digit_pngs(40)
    for part, (start, stop) in enumerate(((0, 25), (25, 40))):
        table = pa.table(
            {
                "image": images[start:stop],
                "digit": labels[start:stop],
                "key": [f"k{row}" for row in range(start, stop)],
            }
        )
        storage.write_table(f"{folder}/data/train-{part}.parquet", table)
    return scored_run(f"{folder}/run", f"{folder}/data", fragment_samples=8, label_column="digit")


def test_rows_of_parquet_files(of_parquet: Run, tmp_path: Path) -> None:
    keep, labels = raypipe.KeepList(of_parquet.uri), digit_pngs(40)[1]
    expected = sorted(
        int(row) + 25 * path.endswith("1.parquet")
        for path, _, row in (item.rpartition("#") for item in keep)
    )
    assert keep.subset(Rows(40, columns={"digit": labels})).indices == expected
    assert keep.subset(Rows(40, targets=labels, columns={})).indices == expected
    with pytest.raises(
        SourceError, match=r"of 20 samples have another label in the dataset than in the keep-list"
    ):
        keep.subset(Rows(40, columns={"digit": labels[::-1]}))
    alone = f"{tmp_path}/alone.parquet"
    storage.write_bytes(alone, storage.read_bytes(keep.uri))
    with pytest.raises(SourceError, match=r"in 2 files, and .* is outside its run"):
        raypipe.KeepList(alone).subset(Rows(40, columns={}))
    first = storage.read_table(alone).filter(
        pa.array(["train-0" in sample_id for sample_id in keep])
    )
    storage.write_table(alone, first)
    assert raypipe.KeepList(alone).subset(Rows(25, columns={})).indices == [
        row for row in expected if row < 25
    ]


def test_a_column_of_ids(of_parquet: Run, tmp_path: Path) -> None:
    source = of_parquet.config().source
    run = scored_run(f"{tmp_path}/run", source.uri, label_column="digit", id_column="key")
    keep, names = raypipe.KeepList(run.uri), [f"k{row}" for row in reversed(range(40))]
    assert keep.subset(Rows(40, columns={"key": names})).indices == keep.indices(names)
    assert keep.subset(Rows(40, columns={"sample_id": names})).indices == keep.indices(names)
    with pytest.raises(
        SourceError, match="do not identify samples of the dataset: they are like 'k"
    ):
        keep.subset(Rows(40, columns={}))


@pytest.fixture(scope="module")
def of_tars(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[raypipe.KeepList, list[tuple[str, str]]]:
    """A list over tars (the export of another run), and path and key of every sample."""
    folder = tmp_path_factory.mktemp("tars")
    first = scored_run(f"{folder}/first", "digits://", 1.0, limit=24)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("raypipe.distributed.tasks.run_tasks", serial.run_tasks)
        patch.setattr("raypipe.distributed.context.Context.cluster", None)
        raypipe.export(
            first.uri, None, "webdataset", f"{folder}/tars/deep", shard_samples=8, progress=QUIET
        )
    run = scored_run(f"{folder}/run", f"{folder}/tars")
    return raypipe.KeepList(run.uri), [
        (f"deep/train-{row // 8:05d}.tar", f"{row:09d}") for row in range(24)
    ]


@pytest.mark.parametrize(
    "place",
    ["{root}/{path}", "file:{root}/{path}", "pipe:cat /copies/{path} -", "/cache/{path}", "{path}"],
)
def test_samples_of_webdataset(
    of_tars: tuple[raypipe.KeepList, list[tuple[str, str]]], place: str
) -> None:
    keep, everything = of_tars
    root = Run(keep.uri.rsplit("/", 2)[0]).config().source.uri
    stream = [
        {"__key__": key, "__url__": place.format(root=root, path=path), "png": b""}
        for path, key in everything
    ]
    found = list(keep.filter_webdataset(stream))
    assert [sample["__key__"] for sample in found] == [
        key for path, key in everything if f"{path}#{key}" in keep
    ]
    assert len(found) == len(keep) == 12


def test_samples_of_webdataset_that_do_not_fit(
    of_tars: tuple[raypipe.KeepList, list[tuple[str, str]]],
) -> None:
    keep, everything = of_tars
    stream = [{"__key__": key, "__url__": f"s3://bucket/x/{path}"} for path, key in everything]
    assert len(list(keep.filter_webdataset(stream, root="s3://bucket/x"))) == 12
    with pytest.warns(
        UserWarning,
        match=r"contains no sample of the 24 read: the last was in 'x/deep/train-00002\.tar'"
        r".*check `root`",
    ):
        assert not list(keep.filter_webdataset(stream, root="s3://bucket"))
    assert not list(keep.filter_webdataset([]))


@pytest.mark.ray
def test_the_list_of_a_whole_run(finished: str, tmp_path: Path) -> None:
    keep = raypipe.KeepList(finished, keep=0.25)
    assert (len(keep), keep.metadata["fraction"], keep.metadata["samples"]) == (150, 0.25, 600)
    assert -1 <= keep.metadata["spearman_low"] <= keep.metadata["spearman"] <= 1
    raypipe.export(finished, 0.25, "indices", f"{tmp_path}/kept.npy", progress=QUIET)
    assert (
        np.load(f"{tmp_path}/kept.npy").tolist()
        == numbers(keep)
        == keep.subset(Rows(600, columns={})).indices
    )


@pytest.mark.ray
def test_a_ray_dataset_and_shards_through_ray(
    cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    run = scored_run(f"{tmp_path}/run", "digits://", limit=600, fragment_samples=128).uri
    keep = raypipe.KeepList(run, keep=0.5)
    ids = [f"digits/{number:04d}" for number in range(600)]
    table = pa.table(
        {"key": pa.array([None, *ids], pa.string()), "row": range(601), "score": [0.0] * 601}
    )
    dataset = keep.filter(
        ray.data.from_arrow([table.slice(start, 40) for start in range(0, 601, 40)]),
        "key",
        columns=["score"],
    )
    assert dataset.context.execution_options.preserve_order
    rows = dataset.take_all()
    assert [row["row"] - 1 for row in rows] == numbers(keep) and len(keep) == 300
    score = dict(zip(keep.ids, keep.scores.tolist(), strict=True))
    assert all(row["score"] == score[row["key"]] for row in rows) and dataset.columns() == [
        "key",
        "row",
        "score",
    ]
    redrawn = keep.redraw(3, 0.5)
    rows = redrawn.filter(ray.data.from_arrow(table), "key", columns=["weight"]).take_all()
    assert {row["key"] for row in rows} == set(redrawn.ids) and len(rows) == 150
    assert all(row["weight"] == pytest.approx(1) for row in rows)
    with pytest.raises(
        ConfigError, match="has no column 'weight'; columns: sample_id, label, score"
    ):
        keep.filter(dataset, "key", columns=["weight"])
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "export",
                run,
                "--keep",
                "0.5",
                "--format",
                "webdataset",
                "--to",
                f"{tmp_path}/out",
                "--shard-samples",
                "200",
            ]
        )
    assert stop.value.code == 0 and "300 samples in 2 files" in capsys.readouterr().out
    assert sorted(storage.names(f"{tmp_path}/out")) == ["train-00000.tar", "train-00001.tar"]


def test_a_batch_is_joined_by_id_and_not_by_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    from raypipe.distributed.ray_data import join

    kept = pa.table({"sample_id": ["b", "d"]})
    monkeypatch.setattr(join.ray, "get", lambda shared: shared)
    monkeypatch.setattr(
        join,
        "hash_ids",
        lambda ids: np.array(
            [{"b": 1, "d": 5, "x": 5}.get(name, 9) for name in ids.to_pylist()], np.uint64
        ),
    )
    batch = pa.table({"sample_id": ["x", "d", None, "b", "z"], "row": range(5)})
    shared = (np.array([1, 5], np.uint64), kept)
    assert join._join(shared, "sample_id", (), batch)["row"].to_pylist() == [1, 3]
    assert len(join._join((np.array([], np.uint64), kept.slice(0, 0)), "sample_id", (), batch)) == 0
    with pytest.raises(SourceError, match="no column 'key'; it has sample_id, row"):
        join._join(shared, "key", (), batch)
    # "3.0" and the name of a bytes object would match nothing, without a word
    for wrong in ([1.0, 2.0, 3.0], [b"a", b"b", b"c"]):
        with pytest.raises(
            SourceError, match=r"column 'key' is .*; expected text or whole numbers"
        ):
            join._join(shared, "key", (), pa.table({"key": wrong}))
    paths = pa.table({"path": ["s3://a/x/b", "a/x/d", "a/xb", "b"]})
    assert join._join(shared, "path", join._prefixes("s3://a/x/"), paths)["path"].to_pylist() == [
        "s3://a/x/b",
        "a/x/d",
        "b",
    ]


def test_torch_and_ray_wait_until_they_are_needed(run: Run) -> None:
    code = (
        f"import sys, raypipe; keep = raypipe.KeepList({run.uri!r}); keep.indices(keep.ids); list(keep.filter_webdataset([]));"
        "import raypipe.exports.run, raypipe.exports.index_files; sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
