"""Folders named `key=value` are columns of the Parquet files below them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from serial import index, no_ray  # noqa: F401  a fixture
from source_helpers import make, picture, samples, scans

from raypipe import storage
from raypipe.config import SourceSettings, parse_config
from raypipe.errors import SourceError
from raypipe.estimate import inspect_source
from raypipe.sources.hive import partition_values
from raypipe.tables.embeddings import read_batches, read_ids
from raypipe.tables.fragments import plan_embeddings


def write(folder: Path, paths: list[str], **columns: Any) -> str:
    """Write two rows with an image to each path."""
    for number, path in enumerate(paths):
        images = [picture(2 * number), picture(2 * number + 1)]
        storage.write_table(f"{folder}/{path}", pa.table({"image": images, **columns}))
    return str(folder)


@pytest.mark.parametrize(
    ("path", "values"),
    [
        ("label=cat/part-0.parquet", {"label": "cat"}),
        ("y=2024/label=3/x=y.parquet", {"y": 2024, "label": 3}),
        ("label=a%2Fb%20c/0", {"label": "a/b c"}),
        ("label=__HIVE_DEFAULT_PARTITION__/0", {"label": None}),
        ("=x/a/0", {}),
        ("label=a=b/0", {"label": "a=b"}),
    ],
)
def test_columns_of_a_path(path: str, values: dict[str, Any]) -> None:
    assert partition_values(path) == values


@pytest.mark.parametrize(("first", "second"), [("cat", "dog"), (0, 1)])
def test_labels_of_images(tmp_path: Path, first: Any, second: Any) -> None:
    none = "__HIVE_DEFAULT_PARTITION__"
    write(tmp_path, [f"label={name}/part-0.parquet" for name in (first, second, none)])
    source = make(str(tmp_path))
    found = samples(source, lambda name: not name.endswith("#1"))
    assert {sample.sample_id: (sample.label, sample.image) for sample in found} == {
        f"label={first}/part-0.parquet#0": (first, picture(0)),
        f"label={second}/part-0.parquet#0": (second, picture(2)),
        f"label={none}/part-0.parquet#0": (None, picture(4)),
    }
    assert frozenset().union(*(scan.labels for scan in scans(source))) == {first, second}
    survey = inspect_source(SourceSettings(uri=str(tmp_path))).survey
    assert survey.balance is not None and survey.rejects.count == 0
    assert survey.balance.per_class == {str(first): 2, str(second): 2}


def test_a_column_of_the_file_counts_and_any_column_can_be_named(tmp_path: Path) -> None:
    write(tmp_path, ["kind=a/label=cat/0.parquet"], label=["dog", "eel"])
    assert [sample.label for sample in samples(make(str(tmp_path)))] == ["dog", "eel"]
    named = samples(make(str(tmp_path), label_column="kind"))
    assert [sample.label for sample in named] == ["a", "a"]


@pytest.mark.parametrize(("values", "kind"), [(("cat", "dog"), pa.string()), ((0, 1), pa.int64())])
def test_labels_of_embeddings(tmp_path: Path, values: tuple[Any, Any], kind: pa.DataType) -> None:
    for value in values:
        table = pa.table({"sample_id": [f"{value}-x"], "embedding": [[1.0, 2.0]]})
        storage.write_table(f"{tmp_path}/label={value}/0.parquet", table)
    for label, fragment in zip(values, plan_embeddings(str(tmp_path)), strict=True):
        (batch,) = read_batches(fragment)
        ((_, names, labels),) = read_ids(fragment)
        assert batch.label.to_pylist() == labels.to_pylist() == [label]
        assert batch.label.type == kind and names.to_pylist() == [f"{label}-x"]


def test_embeddings_whose_files_number_the_classes_differently_are_refused(tmp_path: Path) -> None:
    for number, names in enumerate((["cat", "dog"], ["dog", "cat"])):
        features = {"label": {"_type": "ClassLabel", "names": names}}
        table = pa.table({"sample_id": [f"{number}"], "embedding": [[1.0]], "label": [0]})
        described = storage.json_bytes({"info": {"features": features}})
        storage.write_table(
            f"{tmp_path}/{number}.parquet",
            table.replace_schema_metadata({"huggingface": described}),
        )
    with pytest.raises(SourceError, match="the same in another order"):
        plan_embeddings(str(tmp_path))


@pytest.mark.parametrize(
    ("values", "refused"), [(("1", "01"), True), (("01", "1"), True), (("01", "02"), False)]
)
def test_two_spellings_of_a_number_are_not_one_class(
    tmp_path: Path, no_ray: None, values: tuple[str, str], refused: bool
) -> None:
    paths = [f"label={value}/part-0.parquet" for value in values]
    uri = write(tmp_path / "set", paths)
    for number, path in enumerate(paths):
        columns = {"sample_id": [f"{number}a", f"{number}b"], "embedding": [[1.0, 2.0], [3.0, 4.0]]}
        storage.write_table(f"{tmp_path}/table/{path}", pa.table(columns))
    config = parse_config({"run": f"{tmp_path}/run", "source": {"uri": uri}})
    for read in (lambda: index(config), lambda: plan_embeddings(f"{tmp_path}/table")):
        if refused:
            with pytest.raises(SourceError, match="label '01' is the same number as '1'"):
                read()
        else:
            read()
