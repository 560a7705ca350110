"""Folders as `save_to_disk` of Hugging Face's datasets writes them, written with pyarrow alone."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from source_helpers import ids, make, picture, rejects, samples, scans

from raypipe import storage
from raypipe.errors import SourceError
from raypipe.sources.arrowstream import ArrowStream
from raypipe.vision.decode import decode_batch

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
NAMES = ["cat", "dog", "eel"]


def images(rows: int, start: int = 0, **columns: Any) -> pa.Table:
    """The columns of CIFAR-100: img and two kinds of labels."""
    content = [{"bytes": picture(start + row), "path": None} for row in range(rows)]
    labels = [(start + row) % 3 for row in range(rows)]
    return pa.table(
        {
            "img": pa.array(content, STRUCT),
            "fine_label": labels,
            "coarse_label": [0] * rows,
            **columns,
        }
    )


def arrow(table: pa.Table, batch: int = 4, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with pa.ipc.new_stream(
        buffer, table.schema, options=pa.ipc.IpcWriteOptions(**options)
    ) as writer:
        writer.write_table(table, max_chunksize=batch)
    return buffer.getvalue()


def save(uri: str, *shards: bytes, features: Any = "classes", split: str | None = "train") -> str:
    """Write what `save_to_disk` writes; return the URI."""
    names = [f"data-{number:05d}-of-{len(shards):05d}.arrow" for number in range(len(shards))]
    for name, content in zip(names, shards, strict=True):
        storage.write_bytes(f"{uri}/{name}", content)
    if features == "classes":
        features = {
            "img": {"_type": "Image"},
            "fine_label": {"names": NAMES, "_type": "ClassLabel"},
            "coarse_label": {"names": ["x"], "_type": "ClassLabel"},
        }
    storage.write_json(
        f"{uri}/dataset_info.json",
        {"builder_name": "generator", "features": features, "splits": {}},
    )
    state = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": "a002c933a4684769",
        "_split": split,
    }
    storage.write_json(f"{uri}/state.json", state)
    return uri


def test_a_saved_dataset(place: str) -> None:
    source = make(save(f"{place}/set", arrow(images(7)), arrow(images(5, 100))))
    assert source.format == "huggingface"
    settled = source.resolved_settings()
    assert (settled.format, settled.image_column, settled.label_column) == (
        "huggingface",
        "img",
        "fine_label",
    )
    found = samples(source, lambda sample_id: True)
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    assert ids(found) == [f"{names[0]}#{row}" for row in range(7)] + [
        f"{names[1]}#{row}" for row in range(5)
    ]
    assert [sample.image for sample in found] == [
        picture(seed) for seed in (*range(7), *range(100, 105))
    ]
    assert [sample.label for sample in found] == [
        *(NAMES[row % 3] for row in range(7)),
        *(NAMES[(100 + row) % 3] for row in range(5)),
    ]
    assert all(scan.class_names == tuple(NAMES) and not scan.labels for scan in scans(source))
    assert samples(make(f"{place}/set", fragment_samples=3), lambda name: name[-1] in "14") == [
        sample for sample in found if sample.sample_id[-1] in "14"
    ]
    assert (
        ids(samples(make(f"{place}/set", format="huggingface", include="*-00001-*")))
        == ids(found)[7:]
    )
    assert {
        sample.label for sample in samples(make(f"{place}/set", label_column="coarse_label"))
    } == {"x"}


def test_a_pattern_that_matches_nothing_is_named_with_a_file(tmp_path: Path) -> None:
    uri = save(str(tmp_path / "set"), arrow(images(4)))
    source = make(uri, format="huggingface", include="*.parquet")
    words = (
        r"none of 1 files matches source.include = '\*\.parquet', such as \S+\.arrow; correct it$"
    )
    with pytest.raises(SourceError, match=words):
        list(source.files())


def test_a_file_that_the_state_names_twice_is_read_once(tmp_path: Path) -> None:
    uri = save(f"{tmp_path}/set", arrow(images(3)))
    state = storage.read_json(f"{uri}/state.json")
    storage.write_json(f"{uri}/state.json", {**state, "_data_files": 2 * state["_data_files"]})
    assert len(list(make(uri).files())) == 1


def test_a_dictionary_of_splits(place: str) -> None:
    storage.write_json(f"{place}/dict/dataset_dict.json", {"splits": ["train", "test"]})
    save(f"{place}/dict/train", arrow(images(3)))
    save(f"{place}/dict/test", arrow(images(2, 50)))
    found = samples(make(f"{place}/dict", split="test"))
    assert ids(found) == ["test/data-00000-of-00001.arrow#0", "test/data-00000-of-00001.arrow#1"]
    assert found[0].image == picture(50)
    for split, words in (
        (None, "the splits are train, test; set source.split"),
        ("val", "no split 'val': the splits are train, test"),
    ):
        with pytest.raises(SourceError, match=words):
            list(make(f"{place}/dict", split=split).files())
    storage.write_json(f"{place}/dict/dataset_dict.json", {"splits": ["train"]})
    assert len(samples(make(f"{place}/dict"))) == 3
    assert (
        len(samples(make(f"{place}/dict/test", split="train"))) == 2
    )  # the split that the folder is
    with pytest.raises(
        SourceError,
        match=r"no split 'test': this is one dataset, of split 'train'; leave out source.split",
    ):
        list(make(f"{place}/dict/train", split="test").files())


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array([5, None, 7]), [5, None, 7]),
        (pa.array([5, 6, 7], pa.uint8()), [5, 6, 7]),
        (pa.array(["b", "", "ü"]), ["b", None, "ü"]),
        (pa.array(["b", None, "c"], pa.large_string()), ["b", None, "c"]),
        (pa.array([True, False, None]), [1, 0, None]),
        (pa.array([1.0, float("nan"), 2.0]), [1, None, 2]),
        (pa.array(["b", "a", "b"]).dictionary_encode(), ["b", "a", "b"]),
        (pa.array([None, None, None]), [None, None, None]),
    ],
)
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_labels_and_ids_without_a_description(
    tmp_path: Any, values: pa.Array, expected: list[Any], compression: str | None
) -> None:
    before = pa.array(
        [{"a": [[1.5], []], "b": None}, None, {"a": None, "b": "x"}],
        pa.struct([("a", pa.list_(pa.list_(pa.float32()))), ("b", pa.string())]),
    )
    table = pa.table(
        {
            "facts": before,
            "image": [picture(row) for row in range(3)],
            "label": values,
            "key": ["x", "y", "x"],
        }
    )
    uri = save(str(tmp_path), arrow(table, 2, compression=compression), features=None)
    source = make(uri, id_column="key")
    assert [sample.label for sample in samples(source)] == expected
    assert scans(source)[0].class_names is None and scans(source)[0].labels == set(expected) - {
        None
    }
    assert rejects(samples(source)) == {"x": "duplicate id: an earlier row has it too"} and ids(
        samples(source)
    ) == [
        "x",
        "y",
        "x",
    ]


def test_images_of_pixels_and_images_that_are_not_there(tmp_path: Any) -> None:
    content = [
        {"bytes": picture(0), "path": None},
        {"bytes": None, "path": "/etc/1.png"},
        {"bytes": None, "path": None},
        None,
    ]
    table = pa.table({"img": pa.array(content, STRUCT), "label": [0, 1, 2, 3]})
    found = samples(make(save(f"{tmp_path}/a", arrow(table, 3), features=None)))
    assert [sample.reason for sample in found] == [
        "", "no image: the file holds only its path, '/etc/1.png'", "no image: bytes are null",
        "no image: null",
    ]  # fmt: skip
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3))
    table = pa.table(
        {
            "image": pa.array(pixels.tolist(), pa.list_(pa.list_(pa.list_(pa.uint8())))),
            "label": [0, -1],
        }
    )
    source = make(
        save(
            f"{tmp_path}/b",
            arrow(table),
            features={"label": {"_type": "ClassLabel", "names": NAMES}},
        )
    )
    read = [
        sample for scan in scans(source) for part in scan.fragments for sample in source.read(part)
    ]
    assert np.array_equal([sample.image for sample in read], pixels) and [
        sample.label for sample in read
    ] == [NAMES[0], None]


def test_the_schema_describes_the_columns_where_the_folder_does_not(tmp_path: Any) -> None:
    features = {"fine_label": {"_type": "ClassLabel", "names": NAMES}}
    table = images(3).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    uri = save(str(tmp_path), arrow(table), features=None)
    for content in (None, b"", b"{broken", b"[1]"):
        storage.delete(f"{uri}/dataset_info.json") if content is None else storage.write_bytes(
            f"{uri}/dataset_info.json", content
        )
        assert scans(make(uri, format="huggingface"))[0].class_names == tuple(NAMES)


def test_a_fragment_needs_its_own_batches_only(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pa.table(
        {
            "image": [np.random.default_rng(row).bytes(50_000) for row in range(40)],
            "label": list(range(40)),
        }
    )
    uri = save(str(tmp_path), arrow(table, 5), features=None)
    asked, open_read, fetch = 0, storage.open_read, storage.streams.Ranges._fetch

    def counting(self: Any, length: int) -> bytes:
        nonlocal asked
        asked += length
        return fetch(self, length)

    monkeypatch.setattr(storage, "open_read", lambda uri: open_read(uri, block=1024))
    monkeypatch.setattr(storage.streams.Ranges, "_fetch", counting)
    source = make(uri, fragment_samples=10)
    (scan,) = scans(source)
    assert [(part.start, part.stop) for part in scan.fragments] == [
        (0, 10),
        (10, 20),
        (20, 30),
        (30, 40),
    ]
    assert scan.labels == set(range(40)) and asked < 50_000  # headers and labels, of 2 MB
    asked = 0
    assert [sample.label for sample in source.read(scan.fragments[2])] == list(range(20, 30))
    assert 500_000 < asked < 520_000
    asked = 0
    assert [
        sample.label for sample in source.read(scan.fragments[2], lambda name: name.endswith("#27"))
    ] == [27]
    assert asked < 260_000
    before, most = pa.total_allocated_bytes(), 0
    for _ in make(uri).read(scans(make(uri))[0].fragments[0]):
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 600_000


def test_batches_and_fragments_of_all_sizes(tmp_path: Any) -> None:
    whole = None
    for batch in (1, 3, 5, 20):
        uri = save(f"{tmp_path}/{batch}", arrow(images(12), batch))
        for limit in (1, 4, 7, 100):
            found = samples(make(uri, fragment_samples=limit))
            whole = whole or found
            assert found == whole and len(found) == 12


def test_an_arrow_file_cut_off(tmp_path: Any) -> None:
    content = arrow(images(10), 4)
    uri = save(f"{tmp_path}/set", content)
    batches = list(ArrowStream(storage.open_read(f"{uri}/data-00000-of-00001.arrow")).batches())
    for cut, readable, counted in (
        (len(content) - 8, 10, 10),  # the end marker
        (batches[2].body + 100, 8, 10),
        (batches[2].offset + 20, 8, 8),
        (batches[2].offset, 8, 8),
        (batches[0].body, 0, 4),
    ):
        storage.write_bytes(f"{uri}/data-00000-of-00001.arrow", content[:cut])
        source = make(uri, fragment_samples=4)
        found = samples(source)
        assert len(found) == counted and [
            sample.image for sample in found if not sample.reason
        ] == [picture(row) for row in range(readable)]
        assert all("cut off" in reason for reason in rejects(found).values())
        last = scans(source)[0].fragments[-1]
        assert last.samples == 0 and f"from row {counted} on: it is cut off" in last.error


def test_what_is_no_arrow_file_is_an_unreadable_file(tmp_path: Any) -> None:
    good, other = arrow(images(2)), arrow(pa.table({"x": [1]}))
    file = io.BytesIO()
    with pa.ipc.new_file(file, images(2).schema) as writer:
        writer.write_table(images(2))
    uri = save(str(tmp_path), good, b"", b"<html>", good[:100], other, file.getvalue(), good)
    storage.delete(f"{uri}/data-00006-of-00007.arrow")
    source = make(uri)
    assert len(samples(source)) == 2
    errors = [scan.fragments[0].error for scan in scans(source)]
    for error, words in zip(
        errors,
        [
            "",
            "empty",
            "an HTML page instead of the file",
            "cut off",
            "no column 'img'; columns are x",
            "no message at byte 0",
            "no such file",
        ],
        strict=True,
    ):
        assert words in error and bool(words) == bool(error)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (None, "it has no state.json"),
        ({"_data_files": []}, "the dataset has no rows"),
        (
            {"_data_files": [{"filename": "../x.arrow"}]},
            "'../x.arrow' is not a name in this folder",
        ),
        ({"_data_files": ["x"]}, "state.json: not as save_to_disk writes it"),
        ({"files": []}, "state.json: not as save_to_disk writes it"),
        (
            {"_data_files": [{"filename": "x.arrow"}]},
            "none of the 1 files in state.json exists, such as x.arrow",
        ),
        (
            {
                "_data_files": [{"filename": "data-00000-of-00001.arrow"}],
                "_indices_data_files": [{}],
            },
            "a selection of rows",
        ),
    ],
)
def test_a_folder_that_is_not_as_it_should_be(tmp_path: Any, state: Any, words: str) -> None:
    uri = save(str(tmp_path), arrow(images(1)))
    storage.delete(f"{uri}/state.json") if state is None else storage.write_json(
        f"{uri}/state.json", state
    )
    with pytest.raises(SourceError, match=words):
        list(make(uri, format="huggingface").files())


def test_a_file_that_changes_after_the_scan(tmp_path: Any) -> None:
    uri = save(str(tmp_path), arrow(images(10), 4))
    source = make(uri, fragment_samples=4)
    fragments = scans(source)[0].fragments
    for content in (arrow(images(5), 3), arrow(pa.table({"x": [1]})), b"", b"\xff" * 5000):
        storage.write_bytes(f"{uri}/data-00000-of-00001.arrow", content)
        for fragment in fragments:
            found = list(source.read(fragment))
            assert len(found) == fragment.samples == len(set(ids(found)))


def test_a_storage_fault_is_not_mistaken_for_damage(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = images(400, pad=[np.random.default_rng(row).bytes(9000) for row in range(400)])
    source = make(save(str(tmp_path), arrow(wide, 50)))
    file = next(source.files())
    fragments = source.scan(file).fragments
    fetch = storage.streams.Ranges._fetch

    def fails(self: Any, length: int) -> bytes:
        if self._position > 1_500_000:
            raise PermissionError("the token has expired")
        return fetch(self, length)

    monkeypatch.setattr(storage.streams.Ranges, "_fetch", fails)
    for action in (
        lambda: source.scan(file),
        lambda: [list(source.read(part)) for part in fragments],
    ):
        with pytest.raises(PermissionError, match="expired"):
            action()


FUZZ = [
    arrow(images(12), 5),
    arrow(images(12, key=[f"k{row}" for row in range(12)]), 4, compression="lz4"),
    arrow(images(12, label=pa.array([*"abcabcabcabc"]).dictionary_encode()), 4),
]


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    which=st.integers(0, len(FUZZ) - 1),
    cut=st.none() | st.floats(0, 1),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
    header=st.booleans(),
    described=st.booleans(),
)
def test_damage_gives_rejects_or_a_broken_file(
    tmp_path: Any,
    which: int,
    cut: float | None,
    changes: list[tuple[float, int]],
    header: bool,
    described: bool,
) -> None:
    damaged = bytearray(FUZZ[which])
    reach = 1800 if header else len(damaged)  # schema, first header and what its buffers begin with
    for place, value in changes:
        damaged[int(place * reach)] = value
    if cut is not None:
        del damaged[int(cut * len(damaged)) :]
    uri = save(str(tmp_path), bytes(damaged), features="classes" if described else None)
    found = samples(
        make(
            uri,
            format="huggingface",
            fragment_samples=7,
            image_column="img",
            label_column="fine_label",
        )
    )
    decode_batch(found, 8, 10_000)
