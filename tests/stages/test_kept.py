from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from scored import opened, scored_run

import raypipe
from raypipe import storage
from raypipe.errors import ConfigError, RunError
from raypipe.keeplists.file import KeepFile, ids_in_order


def test_rows_of_a_list_are_read_by_group(tmp_path: Path) -> None:
    run = scored_run(f"{tmp_path}/run", "digits://", limit=120)
    uri, table = f"{tmp_path}/list.parquet", storage.read_table(raypipe.KeepList(run.uri).uri)
    storage.write_table(uri, table, row_group_size=7)
    with KeepFile(uri) as file:
        for start, stop in ((0, 60), (0, 7), (7, 14), (6, 8), (13, 50), (59, 60)):
            assert file.rows(start, stop).equals(table.slice(start, stop - start))
    storage.write_table(uri, table.drop_columns("score"))
    with pytest.raises(RunError, match="not a keep-list; columns: sample_id, label"):
        KeepFile(uri)


def test_an_empty_list_and_removed_scores_are_explained(tmp_path: Path) -> None:
    run = scored_run(f"{tmp_path}/run", "digits://", limit=120)
    with pytest.raises(ConfigError, match=r"select\.keep: 0\.001 of 120 samples is less than one"):
        raypipe.select(run.uri, keep=0.001)
    storage.delete(run.scores_folder)
    with pytest.raises(RunError, match="although 120 samples were scored: its files were removed"):
        raypipe.select(run.uri, keep=0.5)


def test_ids_of_a_tar_in_order_even_where_keys_repeat(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("1.png", "1.cls", "2.png", "2.png", "3.png", "1.png"):
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(b"4"))
    storage.write_bytes(f"{tmp_path}/a.tar", buffer.getvalue())
    source = opened(f"{tmp_path}/a.tar")
    (fragment,) = source.scan(next(source.files())).fragments
    assert ids_in_order(source, fragment) == [f"a.tar#{key}" for key in (1, 2, 2, 3, 1)]
