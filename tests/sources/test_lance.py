"""Lance datasets; the tests that read one need the package pylance."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from source_helpers import ids, make, picture, rejects, samples, scans

from raypipe.errors import SourceError, StorageError
from raypipe.sources import Source, open_source

needs_lance = pytest.mark.skipif(importlib.util.find_spec("lance") is None, reason="needs pylance")


def write(folder: Path, count: int = 30, **options: Any) -> str:
    import lance

    table = pa.table(
        {
            "image": [picture(row) for row in range(count)],
            "label": [row % 3 for row in range(count)],
            "uid": [f"u{row}" for row in range(count)],
        }
    )
    uri = f"{folder}/set.lance"
    lance.write_dataset(table, uri, max_rows_per_file=12, **options)
    return uri


def resolved(uri: str, **options: Any) -> Source:
    """The source as workers open it."""
    return open_source(make(uri, fragment_samples=5, **options).resolved_settings())


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lance", None)
    with pytest.raises(
        SourceError, match=r"need the package pylance.*pip install 'raypipe\[lance\]'"
    ):
        list(make("s3://bucket/set.lance").files())


@needs_lance
@pytest.mark.parametrize("stable", [False, True])
def test_deleted_rows_are_left_out_and_the_others_keep_their_ids(
    tmp_path: Path, stable: bool
) -> None:
    import lance

    uri = write(tmp_path, enable_stable_row_ids=stable)
    name = (
        (lambda row: f"row-{row}") if stable else (lambda row: f"fragment-{row // 12}#{row % 12}")
    )
    before = resolved(uri)
    assert ids(samples(before)) == [name(row) for row in range(30)]
    lance.dataset(uri).delete("uid in ('u0', 'u3', 'u13')")
    rest = [row for row in range(30) if row not in {0, 3, 13}]
    found = samples(resolved(uri), lambda sample_id: sample_id != name(5))
    assert ids(found) == [name(row) for row in rest if row != 5] and not rejects(found)
    assert [sample.image for sample in found] == [picture(row) for row in rest if row != 5]
    assert [sample.label for sample in found] == [row % 3 for row in rest if row != 5]
    # a run that began before the deletion goes on with its version
    assert ids(samples(open_source(before.settings))) == [name(row) for row in range(30)]
    assert ids(samples(resolved(f"lance://{uri}", version="1"))) == ids(samples(before))


@needs_lance
def test_only_fragments_whose_rows_changed_are_new(tmp_path: Path) -> None:
    import lance

    uri = write(tmp_path)
    before = [part.fragment_id for scan in scans(resolved(uri)) for part in scan.fragments]
    dataset = lance.dataset(uri)
    dataset.delete("uid = 'u13'")
    dataset.add_columns({"score": "label * 2"})  # is not read
    after = [part.fragment_id for scan in scans(resolved(uri)) for part in scan.fragments]
    changed = {identity for identity in before if identity not in after}
    assert len(changed) == 3 and all(name.startswith("fragment-1-") for name in changed)


@needs_lance
def test_blobs_and_ids_of_a_column(tmp_path: Path) -> None:
    import lance

    blob = pa.field("image", pa.large_binary(), metadata={"lance-encoding:blob": "true"})
    schema = pa.schema([blob, ("label", pa.int64()), ("uid", pa.string())])
    content = [[picture(row) for row in range(9)], [row % 3 for row in range(9)], [*"abcdefgha"]]
    arrays = [pa.array(values, field.type) for values, field in zip(content, schema)]
    uri = f"{tmp_path}/set.lance"
    lance.write_dataset(pa.table(arrays, schema=schema), uri)
    found = samples(resolved(uri, id_column="uid", format="lance"))
    assert ids(found) == [*"abcdefgha"] and [sample.image for sample in found[:5]] == content[0][:5]
    reason = "duplicate id: an earlier row has it too"
    assert rejects(list(resolved(uri, id_column="uid").read(scans(make(uri))[0].fragments[0]))) == {
        "a": reason
    }


@needs_lance
def test_versions_that_cannot_be_read(tmp_path: Path) -> None:
    import lance

    uri = write(tmp_path)
    lance.write_dataset(lance.dataset(uri).to_table(), uri, mode="append")
    newest = min(Path(uri, "_versions").glob("*.manifest"))
    for content in (b"", newest.read_bytes()[:200]):
        newest.write_bytes(content)  # as a writer that died leaves it
        with pytest.raises(SourceError) as caught:
            list(make(uri).files())
        message = str(caught.value)
        assert "the newest version cannot be read" in message and ".rs:" not in message
        assert "Set source.version to 1, the last readable one" in message and "\n" not in message
    assert len(samples(resolved(uri, version="1"))) == 30
    for version in ("7", "best"):
        with pytest.raises(SourceError, match=f"version {version}: cannot be read"):
            list(make(uri, version=version).files())
    with pytest.raises(SourceError, match=r"no Lance dataset here; check source\.uri"):
        list(make(f"{tmp_path}/none.lance").files())


@needs_lance
def test_a_data_file_that_is_missing_or_cut_off(tmp_path: Path) -> None:
    import lance

    uri = write(tmp_path)
    names = [part.metadata.data_files()[0].path for part in lance.dataset(uri).get_fragments()]
    os.truncate(f"{uri}/data/{names[0]}", 500)
    os.remove(f"{uri}/data/{names[1]}")
    scanned = scans(resolved(uri))
    errors = [scan.fragments[0].error for scan in scanned]
    assert all(error.startswith("not a readable fragment: ") for error in errors[:2])
    assert not errors[2] and ".rs" not in "".join(errors) and sum(map(len, errors)) < 500


@needs_lance
def test_a_store_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.setattr("raypipe.sources.lance.MAX_RETRIES", 0)
    with pytest.raises(StorageError, match=r"Generic S3 error.*then run the same command again"):
        list(make("s3://bucket/set.lance").files())


@needs_lance
def test_on_s3(s3: str) -> None:
    import lance

    from raypipe.sources.lance import client_options

    uri = f"{s3}/lance/set.lance"
    table = pa.table({"image": [picture(row) for row in range(5)], "label": [0, 1, 0, 1, 0]})
    lance.write_dataset(table, uri, storage_options=client_options(uri))
    assert [sample.image for sample in samples(resolved(uri))] == [picture(row) for row in range(5)]
