"""Ids that occur twice: in a fragment, in two, in two files, in a growing source. Without Ray."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import digit_pngs, small_config, stamps
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serial import index, run_tasks, seed

from raypipe import storage
from raypipe.config import Config
from raypipe.errors import RejectError
from raypipe.runs.duplicates import reject_duplicates
from raypipe.runs.manifests import SeedManifest
from raypipe.runs.run import Run
from raypipe.runs.seed_shards import read_shard
from raypipe.sources import open_source
from raypipe.stages.index import duplicate_ids
from raypipe.vision.decode import decode

pytestmark = pytest.mark.usefixtures("no_ray")


def put(folder: Path, name: str, keys: list[str | None], images: list[bytes] | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    buffer, images = io.BytesIO(), images or [b"x"] * len(keys)
    table = pa.table(
        {
            "image": images,
            "label": [row % 2 for row in range(len(keys))],
            "key": pa.array(keys, pa.string()),
        }
    )
    pq.write_table(table, buffer)
    (folder / f"{name}.parquet").write_bytes(buffer.getvalue())


def config(tmp_path: Path, *more: str) -> Config:
    where = [
        f"source.uri={tmp_path}/data",
        "source.format=parquet",
        "source.limit=null",
        "source.id_column=key",
    ]
    return small_config(
        f"{tmp_path}/run",
        *where,
        "source.fragment_samples=4",
        "source.max_reject_fraction=1",
        *more,
    )


def read(settings: Config) -> dict[str, tuple[list[str], list[tuple[str, str]]]]:
    """Return by file the ids that are kept, and the others with the reason."""
    run, source = Run(settings.run), open_source(settings.source)
    result: dict[str, tuple[list[str], list[tuple[str, str]]]] = {}
    for fragment in run.fragments():
        kept, rejected = result.setdefault(fragment.path.removesuffix(".parquet"), ([], []))
        for sample in reject_duplicates(
            run, fragment, source.read(run.with_members(fragment)), source.ids_can_repeat
        ):
            if sample.reason:
                rejected.append((sample.sample_id, sample.reason))
            else:
                kept.append(sample.sample_id)
    return result


def test_the_first_counts_and_the_others_name_its_file(tmp_path: Path) -> None:
    put(tmp_path / "data", "a", [*"abcdefgh", "a"])
    put(tmp_path / "data", "b", ["x", "c", "c", "y"])
    put(tmp_path / "data", "c", ["x", "z", None, "h"])
    record = index(config(tmp_path))
    assert record.detail["duplicates"] == 4, (
        "of each fragment one; the second c in one fragment is seen when it is read"
    )
    found = read(config(tmp_path))
    assert found["a"] == (list("abcdefgh"), [("a", "duplicate id: also in a.parquet")])
    assert found["b"] == (["x", "y"], [("c", "duplicate id: also in a.parquet")] * 2)
    assert found["c"][0] == ["z"]
    assert found["c"][1][::2] == [
        ("x", "duplicate id: also in b.parquet"),
        ("h", "duplicate id: also in a.parquet"),
    ]
    assert found["c"][1][1][0] == "c.parquet#2" and "null" in found["c"][1][1][1]
    before = stamps(f"{tmp_path}/run", "duplicates")
    index(config(tmp_path))
    assert stamps(f"{tmp_path}/run", "duplicates") == before, "nothing is looked for twice"


def test_a_repeated_id_is_drawn_once(tmp_path: Path) -> None:
    images, _ = digit_pngs(60)
    names: list[str | None] = [f"digit-{row}" for row in range(40)]
    put(tmp_path / "data", "a", names, images[:40])
    put(tmp_path / "data", "b", names[20:], images[40:])
    settings = config(tmp_path, "seed.fraction=1")
    index(settings)
    record = seed(settings)
    run = Run(settings.run)
    drawn = {
        sample_id: image
        for shard in SeedManifest.read(run).shards
        for sample_id, image in zip(*read_shard(run, shard)[:2])
    }
    assert (record.samples, record.detail["rejects"]) == (40, 20) and sorted(drawn) == sorted(names)
    np.testing.assert_array_equal(drawn["digit-30"], decode(images[30], 8, 1000))


def test_what_had_a_score_stays_the_first_when_the_source_grows(tmp_path: Path) -> None:
    put(tmp_path / "data", "m", ["1", "2", "3"])
    put(tmp_path / "data", "z", ["9"])
    index(config(tmp_path))
    run = Run(f"{tmp_path}/run")
    for fragment in run.fragments():
        for folder in ("embeddings", "scores"):
            storage.write_bytes(run.path(folder, f"{fragment.fragment_id}.parquet"), b"done")
    put(tmp_path / "data", "a", ["0", "2"])  # sorts before them, but is younger
    index(config(tmp_path))
    put(tmp_path / "data", "b", ["0", "3"])
    put(tmp_path / "data", "0", ["3", "0", "4"])
    index(config(tmp_path))
    kept = {file: ids for file, (ids, _) in read(config(tmp_path)).items()}
    assert kept == {"m": ["1", "2", "3"], "z": ["9"], "a": ["0"], "b": [], "0": ["4"]}
    assert len(run.done("scores")) == 2, "nothing finished was removed"
    # the file with the first occurrence disappears: the next one counts, and is read again
    for fragment in run.fragments():
        storage.write_bytes(run.path("embeddings", f"{fragment.fragment_id}.parquet"), b"done")
    (tmp_path / "data" / "m.parquet").unlink()
    index(config(tmp_path))
    kept = {file: ids for file, (ids, _) in read(config(tmp_path)).items()}
    assert kept == {"z": ["9"], "a": ["0", "2"], "b": [], "0": ["3", "4"]}
    again = {fragment.path for fragment in run.fragments()} - {
        fragment.path
        for fragment in run.fragments()
        if fragment.fragment_id in run.done("embeddings")
    }
    assert again == {"a.parquet", "0.parquet"}


def test_interrupted_it_finds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicate_ids, "GROUP_IDS", 4)
    for place in ("whole", "cut"):
        for name in "abcd":
            put(tmp_path / place / "data", name, ["k", name, "j"])
    index(config(tmp_path / "whole"))
    calls = 0

    def dies(units: object, function: object, on_result: object, **_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:  # the first is the scan
            run_tasks(list(units)[1:], function, on_result)  # type: ignore[call-overload, arg-type]
            raise KeyboardInterrupt
        run_tasks(units, function, on_result)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("raypipe.distributed.tasks.run_tasks", dies)
        index(config(tmp_path / "cut"))
    assert len(Run(f"{tmp_path}/cut/run").done("duplicates/ids")) == 1
    index(config(tmp_path / "cut"))
    assert read(config(tmp_path / "cut")) == read(config(tmp_path / "whole"))


def test_too_many_stop_the_run_and_are_kept_when_more_are_allowed(tmp_path: Path) -> None:
    put(tmp_path / "data", "a", [str(number) for number in range(50)])
    put(tmp_path / "data", "b", [str(number) for number in range(40, 90)])
    words = (
        r"at least 10 of 100 samples repeat the id .* allows 1 %\. "
        r"Some ids of b.parquet are also in a.parquet"
    )
    with pytest.raises(RejectError, match=words):
        index(config(tmp_path, "source.max_reject_fraction=0.01"))
    hashed = stamps(f"{tmp_path}/run", "duplicates/ids")
    index(config(tmp_path, "source.max_reject_fraction=0.1"))
    assert stamps(f"{tmp_path}/run", "duplicates/ids") == hashed
    put(tmp_path / "data", "b", [str(number) for number in range(41, 90)])
    index(config(tmp_path, "source.max_reject_fraction=0.01"))  # nine rejects never stop a run


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    files=st.lists(st.lists(st.integers(0, 30), max_size=12), min_size=1, max_size=5),
    parts=st.integers(1, 6),
)
def test_every_id_counts_once(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[int]], parts: int
) -> None:
    """Against a walk through all ids in order, with hashes in several ranges and row groups."""
    if not any(files):
        return
    folder = tmp_path_factory.mktemp("once")
    for number, keys in enumerate(files):
        put(folder / "data", f"{number}", [str(key) for key in keys])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicate_ids, "GROUP_IDS", 10)
        patch.setattr(duplicate_ids, "PART_IDS", max(1, sum(map(len, files)) // parts))
        patch.setattr(duplicate_ids, "ROW_GROUP", 3)
        index(config(folder))
    kept = [key for ids, _ in read(config(folder)).values() for key in ids]
    assert kept == list(dict.fromkeys(str(key) for keys in files for key in keys))


def test_ranges_of_unsigned_hashes(tmp_path: Path) -> None:
    """Row groups are chosen by their statistics, which must be those of unsigned numbers."""
    values = np.sort(np.random.default_rng(0).integers(0, 2**64, 1000, np.uint64, endpoint=False))
    table = pa.table([values, values, np.zeros(1000, np.int32)], schema=duplicate_ids.SCHEMA)
    storage.write_table(f"{tmp_path}/a.parquet", table, row_group_size=10)
    for low, high in (
        (0, 2**62),
        (2**63 - 2**60, 2**63 + 2**60),
        (2**63 + 2**62, 2**64 - 1),
        (5, 6),
    ):
        found = duplicate_ids._range(f"{tmp_path}/a.parquet", low, high)["high"].to_numpy()
        np.testing.assert_array_equal(
            found, values[(values >= np.uint64(low)) & (values <= np.uint64(high))]
        )


def test_ids_made_of_paths_cost_nothing(tmp_path: Path) -> None:
    put(tmp_path / "data", "a", ["a", "a"])
    settings = config(tmp_path, "source.id_column=null")
    assert index(settings).detail["duplicates"] == 0
    assert not storage.exists(f"{tmp_path}/run/duplicates")
    assert read(settings)["a"][0] == ["a.parquet#0", "a.parquet#1"]
