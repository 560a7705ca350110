"""Tables in every Arrow type that has one meaning give the same scored samples."""

from __future__ import annotations

import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raypipe.errors import SourceError
from raypipe.tables.embeddings import read_batches, read_ids
from raypipe.tables.fragments import plan_embeddings
from raypipe.tables.problems import ProblemCounts
from raypipe.tables.scores import read_scores

VECTORS = [[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]


def write(path: Path, **columns: Any) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


def array_file(path: Path, shape: bytes, name: str = "ray.data.arrow_tensor_v2") -> str:
    """Embeddings as Ray Data writes them, read without Ray."""
    stated = {"ARROW:extension:name": name, "ARROW:extension:metadata": shape}
    field = pa.field("embedding", pa.large_list(pa.float32()), metadata=stated)
    columns = [pa.array(["a", "b", "c"]), pa.array(VECTORS, field.type)]
    schema = pa.schema([pa.field("sample_id", pa.string()), field])
    pq.write_table(pa.table(columns, schema=schema), path)
    return str(path)


def embeddings(uri: str) -> list[Any]:
    return [
        vector
        for fragment in plan_embeddings(uri)
        for batch in read_batches(fragment)
        for vector in batch.embedding.to_pylist()
    ]


@pytest.mark.parametrize("shape", [b"[2]", b"[1, 2]", b"[2, 1, 1]"])
def test_arrays_of_ray_data(tmp_path: Path, shape: bytes) -> None:
    assert embeddings(array_file(tmp_path / "e.parquet", shape)) == VECTORS


def test_arrays_of_two_long_axes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"float arrays of shape \[2, 3\]; expected a list"):
        plan_embeddings(array_file(tmp_path / "e.parquet", b"[2, 3]"))


@pytest.mark.parametrize(
    "type",
    [pa.list_view(pa.float64()), pa.large_list_view(pa.float16()), pa.list_(pa.float32(), 2)],
)
def test_layouts_of_lists(tmp_path: Path, type: pa.DataType) -> None:
    values = pa.array([*VECTORS, None], type)
    uri = write(tmp_path / "e.parquet", sample_id=list("abcd"), embedding=values)
    assert embeddings(uri) == [*VECTORS, None]


@pytest.mark.parametrize(
    "scores",
    [
        pa.array([Decimal("1.5"), Decimal("-2.25"), None], pa.decimal128(9, 4)),
        pa.array([1.5, -2.25, None], pa.float32()).dictionary_encode(),
    ],
)
def test_scores(tmp_path: Path, scores: pa.Array) -> None:
    keys = [uuid.UUID(int=number) for number in range(3)]
    stored = pa.ExtensionArray.from_storage(
        pa.uuid(), pa.array([key.bytes for key in keys], pa.binary(16))
    )
    problems = ProblemCounts()
    uri = write(tmp_path / "s.parquet", sample_id=stored, score=scores)
    table = read_scores(uri, "score", problems)
    assert table.to_pydict() == {"sample_id": list(map(str, keys[:2])), "score": [1.5, -2.25]}
    assert problems.as_dict() == {"score_not_finite": {"count": 1, "ids": [str(keys[2])]}}


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (pa.array([True, False, None]), [1, 0, None]),
        (pa.array([Decimal(3), Decimal(1), None], pa.decimal128(9, 0)), [3, 1, None]),
        (pa.array(["cat", "dog", None], pa.string_view()), ["cat", "dog", None]),
        (pa.array(["cat", "dog", None]).dictionary_encode(), ["cat", "dog", None]),
        (pa.array(["cat", " ", ""]), ["cat", None, None]),
    ],
)
def test_labels(tmp_path: Path, labels: pa.Array, expected: list[Any]) -> None:
    uri = write(tmp_path / "e.parquet", sample_id=list("abc"), embedding=VECTORS, label=labels)
    (fragment,) = plan_embeddings(uri)
    (batch,) = read_batches(fragment)
    assert batch.label.to_pylist() == expected


@pytest.mark.parametrize(
    ("log", "kind"),
    [
        ("_delta_log/0.json", "a Delta"),
        ("metadata/v1.metadata.json", "an Iceberg"),
        (".hoodie/hoodie.properties", "a Hudi"),
    ],
)
def test_tables_with_earlier_versions_are_refused(tmp_path: Path, log: str, kind: str) -> None:
    write(tmp_path / "e.parquet", sample_id=["a"], embedding=VECTORS[:1], score=[0.5])
    (tmp_path / log).parent.mkdir()
    (tmp_path / log).write_text("{}")
    message = f"{kind} table .* write its current version as Parquet, or name"
    with pytest.raises(SourceError, match=message):
        plan_embeddings(str(tmp_path))
    with pytest.raises(SourceError, match=message):
        read_scores(str(tmp_path), "score", ProblemCounts())
    assert len(plan_embeddings(f"{tmp_path}/*.parquet")) == 1


def test_labels_padded_with_zero_bytes_are_refused(tmp_path: Path) -> None:
    labels = ["cat", "dog\0\0", "cat"]
    uri = write(tmp_path / "e.parquet", sample_id=list("abc"), embedding=VECTORS, label=labels)
    with pytest.raises(SourceError, match=r"'label' has control characters, such as in 'dog\\x00"):
        embeddings(uri)
    with pytest.raises(SourceError, match="control characters"):
        [labels for fragment in plan_embeddings(uri) for *_, labels in read_ids(fragment)]


@pytest.mark.parametrize("name", ["a.csv", "a.NPY", "a.jsonl"])
def test_tables_of_other_formats_come_with_a_remedy(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("sample_id,score\na,1\n")
    with pytest.raises(SourceError, match="is not read; write the table as Parquet"):
        read_scores(f"{tmp_path}/{name}", "score", ProblemCounts())
