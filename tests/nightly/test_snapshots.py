"""Names, expiry and files of snapshots."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pytest

from raypipe import storage
from raypipe.errors import RunError
from raypipe.runs.run import Run
from raypipe.runs.snapshots import (
    expire_snapshots,
    expired_names,
    file_uri,
    load_snapshot,
    snapshot_name,
    snapshot_names,
    store_folder,
    write_snapshot,
)

NIGHT = datetime(2026, 11, 22, 2, tzinfo=UTC)
NAMES = [snapshot_name(NIGHT + timedelta(days=day)) for day in range(10)]


def test_which_expire() -> None:
    last = NIGHT + timedelta(days=9)
    assert expired_names(NAMES, 30, None, last) == []
    assert expired_names(NAMES[::-1], 4, None, last) == NAMES[:6]
    assert expired_names(NAMES, 30, 3, last) == NAMES[:6]
    assert (
        expired_names(NAMES, 8, 3, last) == NAMES[:6]
        and expired_names(NAMES, 2, 3, last) == NAMES[:8]
    )
    assert expired_names(NAMES, 1, 1, last + timedelta(days=400)) == NAMES[:9], (
        "the newest never does"
    )
    assert expired_names([], 1, 1, last) == []


def _write(run: Run, name: str, before: dict[str, Any]) -> dict[str, Any]:
    manifest = {
        "scores": store_folder(run, "scores", before.get("scores", [])),
        "keep": [],
        "state": [],
    }
    write_snapshot(run, name, manifest)
    return load_snapshot(run, name)


def test_files_are_held_once_and_go_with_the_last_that_names_them(place: str) -> None:
    run = Run(f"{place}/run")
    for name in ("a", "b"):
        storage.write_table(run.path("scores", f"{name}.parquet"), pa.table({"score": [ord(name)]}))
    first = _write(run, NAMES[0], {})
    storage.delete(run.path("scores", "a.parquet"))
    storage.write_table(run.path("scores", "c.parquet"), pa.table({"score": [1.5]}))
    second = _write(run, NAMES[1], first)
    assert [entry["file"] for entry in second["scores"]] == ["b.parquet", "c.parquet"]
    assert first["scores"][1]["hash"] == second["scores"][0]["hash"]
    assert len(storage.names(run.path("snapshots/files"))) == 3
    assert storage.read_table(file_uri(run, first["scores"][0]))["score"].to_pylist() == [ord("a")]
    storage.write_bytes(
        run.path("snapshots/files", "0123.parquet"), b"left by a night that was killed"
    )
    assert (
        expire_snapshots(run, 2, None, NIGHT, clean=False) == []
        and len(storage.names(run.path("snapshots/files"))) == 4
    )
    assert expire_snapshots(run, 1, None, NIGHT) == NAMES[:1]
    assert storage.names(run.path("snapshots/files")) == {
        f"{entry['hash']}.parquet" for entry in second["scores"]
    }
    assert snapshot_names(run) == NAMES[1:2]


def test_a_file_rewritten_under_its_name_is_read_again(place: str) -> None:
    run = Run(f"{place}/run")
    storage.write_table(run.path("scores", "a.parquet"), pa.table({"score": [1.0]}))
    first = _write(run, NAMES[0], {})
    storage.write_table(run.path("scores", "a.parquet"), pa.table({"score": [2.0]}))
    second = _write(run, NAMES[1], first)
    read = [
        storage.read_table(file_uri(run, item["scores"][0]))["score"].to_pylist()
        for item in (first, second)
    ]
    assert read == [[1.0], [2.0]]


def test_a_snapshot_is_never_written_over(place: str) -> None:
    run = Run(f"{place}/run")
    _write(run, NAMES[0], {})
    with pytest.raises(RunError, match="never overwritten"):
        write_snapshot(run, NAMES[0], {"scores": [], "keep": [], "state": [], "other": 1})
    assert "other" not in load_snapshot(run, NAMES[0])
    with pytest.raises(RunError, match=f"no snapshot 'x'; the newest are: {NAMES[0]}"):
        load_snapshot(run, "x")


def test_a_disk_without_hard_links_has_copies(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise PermissionError("no links here")

    run = Run(str(tmp_path))
    storage.write_table(run.path("scores", "a.parquet"), pa.table({"score": [1.0]}))
    with monkeypatch.context() as patch:
        patch.setattr("os.link", refused)
        (entry,) = store_folder(run, "scores")
    storage.write_table(run.path("scores", "a.parquet"), pa.table({"score": [3.0]}))
    assert storage.read_table(file_uri(run, entry))["score"].to_pylist() == [1.0]
