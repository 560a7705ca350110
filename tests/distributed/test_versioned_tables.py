"""Iceberg and Delta tables through Ray Data: the rows of the last version, each with its label."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from helpers import QUIET, SMALL, by_id, digit_pngs

import raypipe

pytestmark = pytest.mark.ray
COUNT, DELETED = 330, 30


def rows() -> pa.Table:
    images, labels = digit_pngs(COUNT)
    return pa.table(
        {
            "image": pa.array(images, pa.binary()),
            "label": pa.array(labels, pa.int64()),
            "uuid": [f"s{number:04d}" for number in range(COUNT)],
            "camera": ["a"] * COUNT,
        }
    )


def iceberg(folder: Path) -> Any:
    """A table of two snapshots, from whose first file rows were deleted by rewriting it."""
    import ray
    from pyiceberg.catalog.sql import SqlCatalog

    catalog = {"uri": f"sqlite:///{folder}/catalog.db", "warehouse": f"file://{folder}/warehouse"}
    vision = SqlCatalog("local", **catalog)
    vision.create_namespace("vision")
    table = vision.create_table("vision.images", schema=rows().schema)
    table.append(rows().slice(0, 200))
    table.append(rows().slice(200))
    table.delete(f"uuid < 's{DELETED:04d}'")
    return ray.data.read_iceberg(
        table_identifier="vision.images", catalog_kwargs={"name": "local", **catalog}
    )


def delta(folder: Path) -> Any:
    """The same as a Delta table."""
    import deltalake
    import ray

    for part in (rows().slice(0, 200), rows().slice(200)):
        deltalake.write_deltalake(str(folder / "table"), part, mode="append")
    deltalake.DeltaTable(str(folder / "table")).delete(f"uuid < 's{DELETED:04d}'")
    return ray.data.read_delta(str(folder / "table"))


def _needs(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed")


@pytest.mark.parametrize(
    "table",
    [
        pytest.param(iceberg, marks=_needs("pyiceberg")),
        pytest.param(delta, marks=_needs("deltalake")),
    ],
)
def test_a_run_reads_the_last_version(table: Any, cluster: str, tmp_path: Path) -> None:
    dataset = table(tmp_path).select_columns(["image", "label", "uuid"])
    source = {"id_column": "uuid", "fragment_samples": 128}
    config = {**SMALL, "run": str(tmp_path / "run"), "source": source}
    raypipe.run(config, source=dataset, until="extrapolate", progress=QUIET)
    scores, labels = by_id(str(tmp_path / "run")), rows()["label"].to_pylist()
    kept = {f"s{number:04d}": labels[number] for number in range(DELETED, COUNT)}
    assert {sample_id: row["label"] for sample_id, row in scores.items()} == kept
