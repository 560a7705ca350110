"""The same samples give the same scores, bit for bit, in whatever order and format they are stored.

Everything is drawn by id, so formats are compared under the same ids. A Parquet table takes the ids
of any other layout from `source.id_column`. An image folder has the paths of its images, and a tar
has its own path and the key (`webdataset` knows no other ids). So there are two groups:

- an image folder, the same samples as Parquet in its order, and shuffled as Parquet of other files
  and other row groups;
- a tar, the same tar with its members in another order, and the shuffled Parquet with its ids.
"""

from __future__ import annotations

import functools
import io
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import QUIET, digit_pngs, small_config
from serial import index, no_ray, seed  # noqa: F401

import raypipe
from raypipe import storage
from raypipe.config import Config
from raypipe.runs.manifests import SeedManifest
from raypipe.runs.run import Run
from raypipe.runs.seed_shards import read_shard
from raypipe.stages.seed import plan

COUNT = 300


class Sample(NamedTuple):
    """Key, class and image file of a sample."""

    key: str
    label: int
    image: bytes


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    """Digits sorted by class, as an image folder lists them."""
    images, labels = digit_pngs(COUNT)
    return [
        Sample(f"class-{labels[row]}/{row:04d}", labels[row], images[row])
        for row in np.argsort(labels, kind="stable").tolist()
    ]


def _shuffled(samples: Sequence[Sample]) -> list[Sample]:
    return [samples[row] for row in np.random.default_rng(5).permutation(len(samples)).tolist()]


def imagefolder(folder: Path, samples: Sequence[Sample]) -> None:
    for sample in samples:
        path = folder / f"{sample.key}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sample.image)


def tar(folder: Path, samples: Sequence[Sample]) -> None:
    with tarfile.open(folder / "all.tar", "w") as file:
        for sample in samples:
            for kind, content in (("cls", str(sample.label).encode()), ("png", sample.image)):
                member = tarfile.TarInfo(f"{sample.key}.{kind}")
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))


def parquet(
    folder: Path, samples: Sequence[Sample], ids: str, files: Sequence[int], group: int
) -> None:
    """Write files of the given numbers of rows; `ids` is a format string of ids by key."""
    rows = iter(samples)
    for number, count in enumerate(files):
        part = [next(rows) for _ in range(count)]
        columns = {
            "image": [{"bytes": sample.image, "path": None} for sample in part],
            "label": [sample.label for sample in part],
            "id": [ids.format(sample.key) for sample in part],
        }
        pq.write_table(pa.table(columns), folder / f"{number}.parquet", row_group_size=group)
    assert next(rows, None) is None


OF_FOLDER, OF_TAR = "{}.png", "all.tar#{}"
"""Ids of an image folder and of a tar, by key."""
PARQUET = ("source.format=parquet", "source.id_column=id")
UNEVEN = (1, 100, 37, 142, 20)
LAYOUTS: dict[str, tuple[Callable[[Path, list[Sample]], None], tuple[str, ...]]] = {
    "folder": (imagefolder, ("source.format=imagefolder", "source.fragment_samples=64")),
    "parquet": (
        lambda folder, samples: parquet(folder, samples, OF_FOLDER, (COUNT,), 64),
        (*PARQUET, "source.fragment_samples=128"),
    ),
    "shuffled": (
        lambda folder, samples: parquet(folder, _shuffled(samples), OF_FOLDER, UNEVEN, 23),
        (*PARQUET, "source.fragment_samples=50"),
    ),
    "tar": (tar, ("source.format=webdataset", "source.fragment_samples=128")),
    "tar-shuffled": (
        lambda folder, samples: tar(folder, _shuffled(samples)),
        ("source.format=webdataset", "source.fragment_samples=37"),
    ),
    "parquet-of-tar": (
        lambda folder, samples: parquet(folder, _shuffled(samples), OF_TAR, UNEVEN, 23),
        (*PARQUET, "source.fragment_samples=50"),
    ),
}
PAIRS = [
    ("folder", "parquet"),
    ("folder", "shuffled"),
    ("tar", "tar-shuffled"),
    ("tar", "parquet-of-tar"),
]


ONE_PROXY = (
    "measure.scores=[moso, el2n]",
    "measure.moso.self_term=true",
    "extrapolate.judge_published=true",
)
CROSS_FIT = ("proxy.parts=3", "measure.scores=[moso, loss]", "measure.loss.at=auto")
FROM_EMBEDDINGS = (*CROSS_FIT, "extrapolate.score=loss")


def _config(
    folder: Path, layout: str, samples: list[Sample], scores: tuple[str, ...] = ONE_PROXY
) -> Config:
    write, settings = LAYOUTS[layout]
    (folder / "data").mkdir()
    write(folder / "data", samples)
    return small_config(
        str(folder / "run"),
        f"source.uri={folder}/data",
        "source.limit=null",
        *settings,
        "seed.fraction=0.4",
        "seed.audit=60",
        "proxy.epochs=2",
        *scores,
    )


def _small_shards(patch: pytest.MonkeyPatch) -> None:
    """Make 8 seed shards of 120 samples, gathered by several tasks."""
    patch.setattr(plan, "SEED_SHARD_SAMPLES", 16)
    patch.setattr(plan, "gather_bytes", lambda pixels: 3 * 3 * 8 * 8 * 24)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_seed_shards_depend_on_the_ids_alone(
    pair: tuple[str, str],
    samples: list[Sample],
    no_ray: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _small_shards(monkeypatch)
    drawn = []
    for layout in pair:
        (tmp_path / layout).mkdir()
        config = _config(tmp_path / layout, layout, samples)
        index(config)
        seed(config)
        run = Run(config.run)
        assert not storage.exists(run.drawn_folder)
        drawn.append((SeedManifest.read(run), _drawn(run, "shards"), _drawn(run, "audit_shards")))
    (first, of_first, audit), (other, of_other, other_audit) = drawn
    assert len(first.shards) == 8 and first.audit_samples > 30
    assert (first.mean, first.std, first.shard_samples) == (
        other.mean,
        other.std,
        other.shard_samples,
    )
    for one, same in ((of_first, of_other), (audit, other_audit)):
        assert [ids for ids, _ in one] == [ids for ids, _ in same]
        assert [content for _, content in one] == [content for _, content in same]


def _drawn(run: Run, shards: str) -> list[tuple[list[str], bytes]]:
    """Ids, and labels and pixels of each shard."""
    read = (read_shard(run, shard) for shard in getattr(SeedManifest.read(run), shards))
    return [(ids, labels.tobytes() + images.tobytes()) for ids, images, labels in read]


@pytest.fixture(scope="module")
def run_of(
    cluster: str, samples: list[Sample], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Run]:
    """The finished run of a layout, computed at first use."""

    @functools.cache
    def finished(layout: str, scores: tuple[str, ...] = ONE_PROXY) -> Run:
        config = _config(tmp_path_factory.mktemp(layout), layout, samples, scores)
        with pytest.MonkeyPatch.context() as patch:
            _small_shards(patch)
            return Run(raypipe.run(config, progress=QUIET).uri)

    return finished


@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.long
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_scores_depend_on_the_ids_alone(pair: tuple[str, str], run_of: Callable[..., Run]) -> None:
    _assert_same_run(*map(run_of, pair))


@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.long
@pytest.mark.parametrize("scores", [CROSS_FIT, FROM_EMBEDDINGS], ids=["moso", "loss"])
@pytest.mark.parametrize("other", ["shuffled", "parquet"])
def test_so_do_scores_of_several_proxies(
    other: str, scores: tuple[str, ...], run_of: Callable[..., Run]
) -> None:
    _assert_same_run(run_of("folder", scores), run_of(other, scores))


def _assert_same_run(first: Run, other: Run) -> None:
    assert len(SeedManifest.read(first).shards) == 8
    assert len(first.fragments()) != len(other.fragments())
    assert _drawn(first, "shards") == _drawn(other, "shards")
    assert _drawn(first, "audit_shards") == _drawn(other, "audit_shards")
    expected, found = dict(_files(first)), dict(_files(other))
    assert expected.keys() == found.keys() and len(expected) > 5
    for name, content in found.items():
        assert content == expected[name], name
    folders = ["measured", "measured/audit", "embeddings", "scores", "keep"]
    folders += ["views"] if first.done("views") else []
    folders += ["extrapolator"] if first.done("extrapolator") else []
    for folder in folders:
        _assert_same_rows(first, other, folder)


def _files(run: Run) -> Iterator[tuple[str, bytes]]:
    """Files that do not depend on fragments: checkpoints, mean gradients, the fitted model."""
    for folder in ("proxy", "measured", "extrapolator"):
        for file in storage.listing(run.path(folder)):
            if file.path.endswith(".safetensors"):
                path = re.sub(r"-[0-9a-f]{16}/", "/", file.path)  # a hash of the settings
                yield f"{folder}/{path}", storage.read_bytes(run.path(folder, file.path))


def _assert_same_rows(first: Run, other: Run, folder: str) -> None:
    """Compare the tables of a folder bit for bit, sorted by id."""
    tables = [_sorted_rows(run, folder) for run in (first, other)]
    assert tables[0].keys() == tables[1].keys() and tables[0]
    for name, table in tables[0].items():
        for column in table.column_names:
            same = tables[1][name][column].combine_chunks()
            difference = _different(table[column].combine_chunks(), same)
            assert not difference, f"{folder}/{name}: {column} of {difference} samples differs"


def _different(one: pa.Array, other: pa.Array) -> int:
    # as text, in which NaN equals NaN and no other difference is lost
    return sum(repr(a) != repr(b) for a, b in zip(one.to_pylist(), other.to_pylist(), strict=True))


def _sorted_rows(run: Run, folder: str) -> dict[str, Any]:
    """The tables of a folder sorted by id: by name, or all in one where names are of fragments."""
    tables = {
        name: table.replace_schema_metadata(None)
        for name, table in storage.iter_tables(run.path(folder))
    }
    if folder not in ("extrapolator", "keep"):
        tables = {"all": pa.concat_tables(tables.values())}
    keys = [("sample_id", "ascending"), *([("proxy", "ascending")] if folder == "views" else [])]
    return {name: table.sort_by(keys) for name, table in tables.items()}
