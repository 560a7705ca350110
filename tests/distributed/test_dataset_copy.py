"""A Ray Data dataset as the source: the copy keeps its rows and order, and is written once."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import QUIET, SMALL, digit_pngs, stamps
from PIL import Image
from sklearn.datasets import load_digits

import raypipe
from raypipe import storage
from raypipe.config import SourceSettings, parse_config
from raypipe.errors import ConfigError, RunError, SourceError
from raypipe.runs.manifests import SeedManifest
from raypipe.runs.run import Run
from raypipe.runs.seed_shards import read_shard
from raypipe.sources import open_source
from raypipe.vision.decode import decode

pytestmark = pytest.mark.ray
COUNT = 300


def pixels() -> tuple[np.ndarray, np.ndarray]:
    digits = load_digits()
    return (digits.images[:COUNT] * 255 / 16).round().astype(np.uint8), digits.target[:COUNT]


def settings(run: str, **source: Any) -> dict[str, Any]:
    return {**SMALL, "run": run, "source": {"fragment_samples": 128, **source}}


def dataset(later: Path, shift: int = 0) -> Any:
    """A dataset whose images are computed lazily. The first block waits until the last is done."""
    import time

    import ray

    images, labels = pixels()

    def load(row: dict[str, Any]) -> dict[str, Any]:
        if row["number"] == COUNT - 1:
            later.touch()
        if row["number"] == 0:
            ends = time.monotonic() + 10  # on one CPU the other block would never come
            while not later.exists() and time.monotonic() < ends:
                time.sleep(0.1)
            time.sleep(0.5)
        number = (row["number"] + shift) % COUNT
        return {"picture": images[number], "digit": labels[number], "name": f"digit {number}"}

    return ray.data.from_items(
        [{"number": number} for number in range(COUNT)], override_num_blocks=2
    ).map(load)


def copy(run: str, given: Any, **source: Any) -> None:
    from raypipe.distributed.context import Context
    from raypipe.distributed.ray_data.copy import copy_dataset

    config = parse_config(settings(run, uri=f"{run}/source", **source))
    copy_dataset(given, config.source, Context(config, Run(run), QUIET))


def copied(run: str) -> list[Any]:
    source = open_source(
        SourceSettings(uri=f"{run}/source", format="parquet", id_column="sample_id")
    )
    return [
        sample
        for file in source.files()
        for part in source.scan(file).fragments
        for sample in source.read(part)
    ]


def test_a_run_reads_its_copy_which_has_every_row_in_order(cluster: str, tmp_path: Path) -> None:
    run, columns = str(tmp_path / "run"), {"image_column": "picture", "label_column": "digit"}
    later = tmp_path / "later"
    given = dataset(later)
    raypipe.run(settings(run, **columns), source=given, until="seed", progress=QUIET)
    assert not given.context.execution_options.preserve_order  # as it was
    images, labels = pixels()
    found = copied(run)
    assert [sample.sample_id for sample in found] == [f"row-{row:010d}" for row in range(COUNT)]
    assert [sample.label for sample in found] == labels.tolist()
    for sample, image in zip(found, images, strict=True):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(sample.image))), image)
    # what the seed set has of them, after everything a run does to a source
    shards = [read_shard(Run(run), shard) for shard in SeedManifest.read(Run(run)).shards]
    drawn = {
        name: (image, label)
        for ids, pixels_, labels_ in shards
        for name, image, label in zip(ids, pixels_, labels_, strict=True)
    }
    assert 60 < len(drawn) < 150
    for name, (image, label) in drawn.items():
        row = int(name.removeprefix("row-"))
        assert np.array_equal(image, np.stack([images[row]] * 3)) and label == labels[row]

    before = stamps(run, "source")
    raypipe.run(
        parse_config(settings(run, uri=f"{run}/source", **columns)),
        source=dataset(later),
        until="seed",
        progress=QUIET,
    )
    assert stamps(run, "source") == before
    with pytest.raises(RunError, match=r"copy of another dataset \(steps differ\)"):
        copy(run, dataset(later, shift=1), **columns)
    # other columns are another setting, and a copy that lacks a file is none
    copy(run, dataset(later), id_column="name", limit=100, **columns)
    assert [sample.sample_id for sample in copied(run)] == [
        f"digit {number}" for number in range(100)
    ]
    storage.delete(f"{run}/source/part-000000.parquet")
    copy(run, dataset(later, shift=5), id_column="name", limit=100, **columns)
    assert [sample.sample_id for sample in copied(run)] == [
        f"digit {number}" for number in range(5, 105)
    ]


def test_encoded_images_on_s3(cluster: str, s3: str) -> None:
    import ray

    images, labels = digit_pngs(100)
    names = [f"class {label}" for label in labels]
    given = ray.data.from_arrow(pa.table({"image": images, "label": names}))
    run = f"{s3}/runs/of-dataset"
    copy(run, given)
    before = stamps(run, "source")
    copy(run, given)
    with pytest.raises(SourceError, match="no rows"):
        copy(f"{s3}/runs/of-nothing", given.limit(0))
    assert stamps(run, "source") == before and set(before) == {
        "manifest.json",
        "part-000000.parquet",
    }
    found = copied(run)
    assert [sample.image for sample in found] == images and [
        sample.label for sample in found
    ] == names


def test_files_that_changed_make_another_dataset(cluster: str, tmp_path: Path) -> None:
    import ray

    from raypipe.distributed.ray_data.identity import identity

    (tmp_path / "set").mkdir()
    for number in range(2):
        pq.write_table(
            pa.table({"image": [b"x"], "label": [1]}), tmp_path / "set" / f"{number}.parquet"
        )
        (tmp_path / "set" / f"{number}.bin").write_bytes(b"one")

    def found() -> list[dict[str, str]]:
        sets = (
            ray.data.read_parquet(str(tmp_path / "set")),
            ray.data.read_binary_files(str(tmp_path / "set"), file_extensions=["bin"]),
        )
        return [identity(given).hashes for given in sets]

    before = found()
    assert found() == before
    pq.write_table(
        pa.table({"image": [b"y", b"z"], "label": [1, 2]}), tmp_path / "set" / "1.parquet"
    )
    (tmp_path / "set" / "2.bin").write_bytes(b"more")
    for one, other in zip(before, found(), strict=True):
        assert {name for name in one if one[name] != other[name]} == {"input files"}


def test_data_in_memory_is_told_by_its_rows(cluster: str) -> None:
    import ray

    from raypipe.distributed.ray_data.identity import identity

    rows = [{"image": bytes([number]), "label": number} for number in range(40)]
    one = identity(ray.data.from_items(rows, override_num_blocks=2)).hashes
    assert identity(ray.data.from_items(rows, override_num_blocks=5)).hashes == one
    other = identity(ray.data.from_items([*rows[1:], rows[0]], override_num_blocks=2)).hashes
    assert other["data"] != one["data"] and other["steps"] == one["steps"]
    assert (
        identity(ray.data.from_items(rows).filter(expr="label < 5")).hashes["steps"]
        != identity(ray.data.from_items(rows).filter(expr="label < 6")).hashes["steps"]
    )


def block(batch: dict[str, Any]) -> Any:
    """A batch as a task of Ray Data leaves it."""
    from ray.data.block import BlockAccessor

    return BlockAccessor.batch_to_block(batch)


HUGE = 2**53 + 1
"""The first whole number that floating point cannot hold."""


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (pa.array([HUGE, None, 3]), [str(HUGE), None, "3"]),
        (pa.array(["b", None, "c"], pa.large_string()), ["b", None, "c"]),
        (pa.nulls(3), [None, None, None]),
        (
            pa.ExtensionArray.from_storage(
                pa.uuid(), pa.array([bytes(16), None, bytes(15) + b"1"], pa.binary(16))
            ),
            ["00000000-0000-0000-0000-000000000000", None, "00000000-0000-0000-0000-000000000031"],
        ),
    ],
)
def test_ids_keep_every_digit_and_a_null_is_no_id(ids: pa.Array, expected: list[Any]) -> None:
    from raypipe.distributed.ray_data.copy import _columns

    table = pa.table({"image": [b"x"] * 3, "label": [2, None, 1], "id": ids})
    columns = _columns(table, "image", "label", "id")
    assert columns["sample_id"].to_pylist() == expected
    assert columns["label"].to_pylist() == ["2", "null", "1"]


@pytest.mark.parametrize("ids", [[1.0, None, 3.0], [b"s0", b"s1", b"s2"], [[1], [2], [3]]])
def test_ids_without_one_text_are_refused_as_in_parquet(ids: list[Any]) -> None:
    import pandas as pd

    from raypipe.distributed.ray_data.copy import _columns

    columns = {"image": [b"x"] * 3, "label": [0, 1, 2], "id": ids}
    for given in (pa.table(columns), pd.DataFrame(columns)):
        with pytest.raises(SourceError, match=r"column 'id' is .*; expected text or whole numbers"):
            _columns(given, "image", "label", "id")


def test_a_missing_id_is_a_reject_and_the_others_stay_what_they_are(
    cluster: str, tmp_path: Path
) -> None:
    import ray

    images, labels = digit_pngs(4)
    rows = [
        {"image": image, "label": int(label), "key": key}
        for image, label, key in zip(images, labels, [HUGE, None, HUGE + 1, 3], strict=True)
    ]
    run = str(tmp_path / "run")
    copy(run, ray.data.from_items(rows, override_num_blocks=1), id_column="key")
    assert [(sample.sample_id, sample.reason) for sample in copied(run)] == [
        (str(HUGE), ""),
        ("part-000000.parquet#1", "no id: sample_id is null"),
        (str(HUGE + 1), ""),
        ("3", ""),
    ]


@pytest.mark.parametrize(
    ("row", "source", "words"),
    [
        (
            {"content": b"x", "label": 1},
            {},
            "no column 'image'; it has content, label; set source.image_column",
        ),
        (
            {"picture": b"x", "kind": 1},
            {},
            "no column 'label'; it has picture, kind; set source.label_column",
        ),
        ({"image": b"x", "label": 1}, {"id_column": "name"}, "no column 'name'.*source.id_column"),
        (
            {"image": np.zeros((3, 8, 8), np.uint8), "label": 1},
            {},
            r"column 'image' holds uint8 \[3, 8, 8\]; expected encoded",
        ),
        (
            {"image": np.zeros((8, 8), np.float32), "label": 1},
            {},
            r"column 'image' holds float32 \[8, 8\]",
        ),
        ({"image": "a.jpg", "label": 1}, {}, "column 'image' holds str"),
        ({"image": b"x", "label": 1.5}, {}, "column 'label': label is not a number or a name: 1.5"),
    ],
)
def test_columns_that_cannot_be_used_are_named(
    row: dict[str, Any], source: dict[str, str], words: str
) -> None:
    from raypipe.distributed.ray_data.copy import _columns

    given = SourceSettings(uri="unused", **source)
    batch = {
        name: np.array([value], object) if not isinstance(value, np.ndarray) else value[None]
        for name, value in row.items()
    }
    with pytest.raises(SourceError, match=words):
        _columns(block(batch), given.image_column, given.label_column, given.id_column)


def test_what_a_column_of_images_may_hold() -> None:
    from raypipe.distributed.ray_data.copy import _columns

    grey, colour = (
        np.arange(16, dtype=np.uint8).reshape(4, 4),
        np.arange(48, dtype=np.uint8).reshape(4, 4, 3),
    )
    encoded = io.BytesIO()
    Image.fromarray(colour).save(encoded, "PNG")
    values = [
        grey,
        grey[:, :, None],
        colour,
        Image.fromarray(colour),
        encoded.getvalue(),
        {"bytes": encoded.getvalue()},
        None,
    ]
    batch = {
        "image": np.empty(7, object),
        "label": np.array([0, 1, 2, 3, 4, np.nan, 6]),
        "id": np.arange(7),
    }
    batch["image"][:] = values
    table = _columns(block(batch), "image", "label", "id")
    assert table["label"].to_pylist() == ["0", "1", "2", "3", "4", "null", "6"] and table[
        "sample_id"
    ].to_pylist() == list("0123456")
    *images, missing = table["image"].to_pylist()
    assert missing is None
    for image, expected in zip(images, [grey, grey, *[colour] * 4], strict=True):
        expected = np.stack([expected] * 3) if expected.ndim == 2 else expected.transpose(2, 0, 1)
        assert np.array_equal(decode(image, 4, 100), expected)


def test_files_do_not_depend_on_how_the_rows_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raypipe.distributed.ray_data import copy

    monkeypatch.setattr(copy, "FILE_ROWS", 512)
    labels = ["null"] * 300 + ["1"] * 430
    table = pa.table(
        {"image": [b"x"] * 730, "label": labels, "sample_id": list(map(str, range(730)))}
    )
    for name, step in (("one", 64), ("other", 32)):
        files = copy._Files(Run(str(tmp_path / name)))
        for start in range(0, 730, step):
            files.add(table.slice(start, step))
        files.close()
        assert sum(entry["rows"] for entry in files.written) == 730
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name / "source").iterdir()}
        for name in ("one", "other")
    )
    assert first == second and sorted(first) == ["part-000000.parquet", "part-000001.parquet"]
    read = [pq.read_table(tmp_path / "one" / "source" / name) for name in sorted(first)]
    assert [part["sample_id"].to_pylist() for part in read] == [
        list(map(str, range(512))),
        list(map(str, range(512, 730))),
    ]


def test_a_dataset_and_a_uri_are_one_too_many(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"source\.uri is 'digits://', but a dataset is given as well"
    ):
        raypipe.run(settings(str(tmp_path), uri="digits://"), source=object(), progress=QUIET)
    with pytest.raises(ConfigError, match=r"source is list, not a ray\.data\.Dataset"):
        raypipe.run(settings(str(tmp_path)), source=[1], progress=QUIET)
    with pytest.raises(ConfigError, match="run: required"):
        raypipe.run({}, source=object(), progress=QUIET)
