from __future__ import annotations

import io
import json
import subprocess
import sys
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from source_helpers import ids, make, picture, rejects, samples, scans

from raypipe import storage
from raypipe.config import SourceSettings
from raypipe.sources import SourceFile, class_map
from raypipe.sources.parquet import reader as parquet_reader
from raypipe.sources.parquet.source import ParquetSource
from raypipe.vision.decode import decode_batch

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
NAMES = ["cat", "dog", "eel"]


def hugging_face(rows: int, start: int = 0) -> pa.Table:
    images = [{"bytes": picture(start + row), "path": f"{row}.png"} for row in range(rows)]
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": NAMES}}
    table = pa.table(
        {"image": pa.array(images, STRUCT), "label": [(start + row) % 3 for row in range(rows)]}
    )
    return table.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )


def plain(rows: int, **columns: Any) -> pa.Table:
    return pa.table(
        {
            "image": [picture(row) for row in range(rows)],
            "label": [row % 3 for row in range(rows)],
            **columns,
        }
    )


def file_bytes(table: pa.Table, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


def put(uri: str, table: pa.Table, **options: Any) -> str:
    storage.write_bytes(uri, file_bytes(table, **options))
    return uri


def test_hugging_face_layout(place: str) -> None:
    put(f"{place}/data/train-0.parquet", hugging_face(7), row_group_size=3)
    put(f"{place}/data/more/train-1.parquet", hugging_face(4, 100))
    storage.write_bytes(f"{place}/data/README.md", b"about")
    source = make(f"{place}/data")
    assert [file.path for file in source.files()] == ["more/train-1.parquet", "train-0.parquet"]
    found = samples(source)
    assert ids(found) == [f"more/train-1.parquet#{row}" for row in range(4)] + [
        f"train-0.parquet#{row}" for row in range(7)
    ]
    assert [sample.image for sample in found] == [picture(100 + row) for row in range(4)] + [
        picture(row) for row in range(7)
    ]
    assert [sample.label for sample in found[4:]] == [NAMES[row % 3] for row in range(7)]
    for scan in scans(source):
        assert scan.class_names == tuple(NAMES) and scan.labels == frozenset()


def test_local_and_s3_give_the_same(tmp_path: Any, s3: str) -> None:
    for place in (str(tmp_path), f"{s3}/same"):
        put(f"{place}/a.parquet", hugging_face(20), row_group_size=6)
    assert samples(make(str(tmp_path), fragment_samples=8)) == samples(
        make(f"{s3}/same", fragment_samples=8)
    )


def test_a_file_a_glob_and_include_choose_the_same_ids(place: str) -> None:
    put(f"{place}/x/train.parquet", plain(2))
    put(f"{place}/x/test.parquet", plain(3))
    expected = ["train.parquet#0", "train.parquet#1"]
    assert ids(samples(make(f"{place}/x/train.parquet"))) == expected
    assert ids(samples(make(f"{place}/x/tr*.parquet"))) == expected
    assert ids(samples(make(f"{place}/x", include="tr*"))) == expected
    assert ids(samples(make(f"{place}/*/tr*.parquet"))) == [
        f"x/{sample_id}" for sample_id in expected
    ]


def test_folders_named_like_files_and_names_with_wildcards(tmp_path: Any) -> None:
    put(f"{tmp_path}/set[1].parquet/set[1].parquet", plain(2))
    assert ids(samples(make(f"{tmp_path}/set[1].parquet"))) == [
        "set[1].parquet#0",
        "set[1].parquet#1",
    ]
    assert len(samples(make(f"{tmp_path}/set[1].parquet/set[1].parquet"))) == 2


def test_fragments_end_at_row_groups_where_they_can(tmp_path: Any) -> None:
    uri = put(f"{tmp_path}/a.parquet", plain(25), row_group_size=4)
    cuts = [(part.start, part.stop) for part in scans(make(uri, fragment_samples=10))[0].fragments]
    assert cuts == [(0, 8), (8, 16), (16, 25)]
    uri = put(f"{tmp_path}/b.parquet", plain(25), row_group_size=20)
    cuts = [(part.start, part.stop) for part in scans(make(uri, fragment_samples=8))[0].fragments]
    assert cuts == [(0, 8), (8, 16), (16, 20), (20, 25)]
    found = samples(make(uri, fragment_samples=8))
    assert [sample.image for sample in found] == [picture(row) for row in range(25)]


def test_wanted_samples_only(place: str) -> None:
    uri = put(
        f"{place}/a.parquet", plain(25, key=[f"k{row}" for row in range(25)]), row_group_size=7
    )
    assert (
        len(samples(make(uri, fragment_samples=10), lambda sample_id: sample_id.endswith("3"))) == 3
    )
    assert (
        len(samples(make(uri, id_column="key"), lambda sample_id: sample_id in {"k1", "k24"})) == 2
    )


def test_only_needed_columns_and_row_groups_are_read(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = plain(40, other=[np.random.default_rng(row).bytes(50_000) for row in range(40)])
    uri = put(f"{tmp_path}/a.parquet", wide, row_group_size=10, compression="none")
    asked = 0
    fetch = storage.streams.Ranges._fetch

    def counting(self: Any, length: int) -> bytes:
        nonlocal asked
        data = fetch(self, length)
        asked += len(data)
        return data

    monkeypatch.setattr(storage.streams.Ranges, "_fetch", counting)
    open_read = storage.open_read
    monkeypatch.setattr(storage, "open_read", lambda uri: open_read(uri, block=1024))
    source = make(uri, fragment_samples=10)
    fragments = scans(source)[0].fragments
    assert asked < 200_000  # the footer and the labels, of 2 MB
    asked = 0
    assert len(list(source.read(fragments[2]))) == 10
    assert asked < 100_000
    images, asked = asked, 0
    assert list(source.read(fragments[2], lambda sample_id: False)) == []
    assert asked < images


def test_rows_are_decoded_a_few_at_a_time(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    big = pa.table(
        {
            "image": [np.random.default_rng(row).bytes(1 << 20) for row in range(64)],
            "label": [0] * 64,
        }
    )
    uri = put(
        f"{tmp_path}/a.parquet", big, compression="none", use_dictionary=False, write_batch_size=2
    )
    monkeypatch.setattr(parquet_reader, "BATCH_BYTES", 4 << 20)
    source = make(uri)
    (fragment,) = scans(source)[0].fragments
    del big
    before, most = pa.total_allocated_bytes(), 0
    for _ in source.read(fragment):
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 40 << 20


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array([5, None, 7]), [5, None, 7]),
        (pa.array(["b", "a", None]), ["b", "a", None]),
        (pa.array(["b", "a", "b"]).dictionary_encode(), ["b", "a", "b"]),
        (pa.array([1.0, 2.0, float("nan")]), [1, 2, None]),
        (pa.array([True, False, None]), [1, 0, None]),
        (pa.array([1, 2, 3], pa.uint8()), [1, 2, 3]),
        (pa.array([None, None, None]), [None, None, None]),
        (pa.array(["b", " ", "3"], pa.large_string()), ["b", None, "3"]),
    ],
)
def test_labels_as_they_are_stored(tmp_path: Any, values: pa.Array, expected: list[Any]) -> None:
    uri = put(f"{tmp_path}/a.parquet", pa.table({"image": [picture(0)] * 3, "label": values}))
    source = make(uri)
    assert [sample.label for sample in samples(source)] == expected
    (scan,) = scans(source)
    assert scan.class_names is None and scan.labels == {
        label for label in expected if label is not None
    }
    assert not any(sample.reason for sample in samples(source))


def test_a_label_that_is_no_class_is_a_reject(tmp_path: Any) -> None:
    uri = put(f"{tmp_path}/a.parquet", pa.table({"image": [picture(0)] * 2, "label": [0.5, 2.0]}))
    assert rejects(samples(make(uri))) == {"a.parquet#0": "label is not a number or a name: 0.5"}
    assert scans(make(uri))[0].labels == {2}


def test_negative_class_labels_are_missing(tmp_path: Any) -> None:
    table = hugging_face(2).set_column(1, "label", pa.array([-1, 1]))
    assert [sample.label for sample in samples(make(put(f"{tmp_path}/a.parquet", table)))] == [
        None,
        NAMES[1],
    ]
    table = table.replace_schema_metadata({"huggingface": "{broken"})
    assert [sample.label for sample in samples(make(put(f"{tmp_path}/b.parquet", table)))] == [
        -1,
        1,
    ]


def test_ids_from_a_column(tmp_path: Any) -> None:
    uri = put(f"{tmp_path}/a.parquet", plain(5, key=["x", "y", "x", None, "z"]), row_group_size=2)
    found = samples(make(uri, id_column="key"))
    assert ids(found) == ["x", "y", "x", "a.parquet#3", "z"]
    assert [sample.reason for sample in found] == [
        "",
        "",
        "duplicate id: an earlier row has it too",
        "no id: key is null",
        "",
    ]
    uri = put(f"{tmp_path}/b.parquet", plain(2, key=[10, 20]))
    assert ids(samples(make(uri, id_column="key"))) == ["10", "20"]
    uri = put(f"{tmp_path}/c.parquet", plain(2, key=pa.array(["x", "y"]).dictionary_encode()))
    assert ids(samples(make(uri, id_column="key"))) == ["x", "y"]


def test_images_that_are_not_there(tmp_path: Any) -> None:
    images = [
        {"bytes": picture(0), "path": None},
        {"bytes": None, "path": "0/1.png"},
        {"bytes": None, "path": None},
        None,
    ]
    uri = put(
        f"{tmp_path}/a.parquet",
        pa.table({"image": pa.array(images, STRUCT), "label": [0, 1, 2, 3]}),
    )
    assert rejects(samples(make(uri))) == {
        "a.parquet#1": "no image: the file holds only its path, '0/1.png'",
        "a.parquet#2": "no image: bytes are null",
        "a.parquet#3": "no image: null",
    }
    uri = put(
        f"{tmp_path}/b.parquet",
        pa.table({"image": pa.array([None, b""], pa.binary()), "label": [0, 1]}),
    )
    found = samples(make(uri))
    assert [sample.reason for sample in found] == ["no image: null", ""]
    assert decode_batch(found, 8, 100)[1] == ["no image: null", "empty: 0 bytes"]


@pytest.mark.parametrize("inner", [pa.uint8(), pa.int64()])
def test_nested_lists_of_pixels(tmp_path: Any, inner: pa.DataType) -> None:
    colour = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3))
    grey = colour[..., 0]
    nested = pa.list_(pa.list_(pa.list_(inner)))
    uri = put(
        f"{tmp_path}/a.parquet",
        pa.table({"image": pa.array(colour.tolist(), nested), "label": [0, 1]}),
    )
    assert np.array_equal(
        [sample.image for sample in samples_of_arrays(uri)], colour.astype(np.uint8)
    )
    uri = put(
        f"{tmp_path}/b.parquet",
        pa.table(
            {"image": pa.array(grey.tolist(), pa.list_(pa.list_(inner, 5), 4)), "label": [0, 1]}
        ),
    )
    assert np.array_equal(
        [sample.image for sample in samples_of_arrays(uri)], grey.astype(np.uint8)
    )
    odd = [
        [[1, 2], [3]],
        [[1, 300]],
        [[1, -1]],
        [],
        [[], []],
        None,
        [[1, None]],
        [[1, 2], None],
        [[7, 8]],
    ]
    uri = put(
        f"{tmp_path}/c.parquet",
        pa.table({"image": pa.array(odd, pa.list_(pa.list_(pa.int64()))), "label": [0] * 9}),
    )
    found = samples_of_arrays(uri)
    assert [bool(sample.reason) for sample in found] == [True] * 8 + [False]
    assert np.array_equal(found[8].image, [[7, 8]])


def samples_of_arrays(uri: str) -> list[Any]:
    source = make(uri)
    return [
        sample for scan in scans(source) for part in scan.fragments for sample in source.read(part)
    ]


@pytest.mark.parametrize(
    ("table", "options", "words"),
    [
        (
            pa.table({"img": [b"x"], "label": [0]}),
            {"image_column": "image"},
            "no column 'image'; columns are img, label; set source.image_column",
        ),
        (
            pa.table({"image": [b"x"], "class": [0]}),
            {"label_column": "label"},
            "no column 'label'; columns are image, class; set source.label_column",
        ),
        (
            pa.table({"image": [b"x"], "label": [{"name": "cat"}]}),
            {"label_column": "label"},
            "column 'label' is struct<name: string>; expected one number or name per sample",
        ),
        (
            plain(1),
            {"id_column": "key"},
            "no column 'key'; columns are image, label; set source.id_column",
        ),
        (
            pa.table({"image": ["a.png"], "label": [0]}),
            {},
            "column 'image' is string; expected encoded bytes",
        ),
        (pa.table({"image": [[1, 2]], "label": [0]}), {}, "expected encoded bytes"),
        (
            pa.table({"image": [b"x"], "label": [[0, 1]]}),
            {},
            "column 'label' is list<.*>; expected one number or name per sample",
        ),
        (
            plain(1, key=[0.5]),
            {"id_column": "key"},
            "column 'key' is double; expected text or whole numbers",
        ),
        (
            pa.Table.from_arrays(
                [pa.array([b"x"]), pa.array([0]), pa.array([1])], ["image", "label", "label"]
            ),
            {},
            "2 columns 'label'",
        ),
    ],
)
def test_columns_that_do_not_fit_are_named(
    tmp_path: Any, table: pa.Table, options: dict[str, Any], words: str
) -> None:
    source = make(put(f"{tmp_path}/a.parquet", table), **options)
    (scan,) = scans(source)
    (fragment,) = scan.fragments
    assert fragment.samples == 0
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(fragment.error)


def test_a_schema_that_changes_between_shards_breaks_one_shard(tmp_path: Any) -> None:
    put(f"{tmp_path}/a.parquet", plain(2))
    put(f"{tmp_path}/b.parquet", pa.table({"picture": [b"x"]}))
    first, second = scans(make(str(tmp_path)))
    assert first.fragments[0].samples == 2 and not first.fragments[0].error
    assert second.fragments[0].samples == 0 and "picture" in second.fragments[0].error


@pytest.mark.parametrize("keep", [0, 3, 0.5, 0.99])
def test_a_file_cut_off_is_one_broken_fragment(place: str, keep: float) -> None:
    whole = file_bytes(plain(20))
    storage.write_bytes(
        f"{place}/cut.parquet", whole[: int(len(whole) * keep) if keep < 1 else int(keep)]
    )
    (scan,) = scans(make(f"{place}/cut.parquet"))
    (fragment,) = scan.fragments
    assert fragment.samples == 0 and fragment.error and fragment.path == "cut.parquet"


def test_an_empty_table_is_fine_and_has_no_fragments(tmp_path: Any) -> None:
    (scan,) = scans(make(put(f"{tmp_path}/a.parquet", plain(3).slice(0, 0))))
    assert scan.fragments == () and scan.labels == frozenset()
    (scan,) = scans(make(put(f"{tmp_path}/b.parquet", pa.table({"x": [0]}).slice(0, 0))))
    assert scan.fragments == ()  # it has other columns, but no rows that could be lost


@pytest.mark.parametrize("column", ["image", "label", "key"])
def test_a_damaged_row_group_costs_its_own_samples(place: str, column: str) -> None:
    table = plain(12, key=[f"k{row}" for row in range(12)])
    data = bytearray(file_bytes(table, row_group_size=4, compression="zstd"))
    metadata = pq.read_metadata(io.BytesIO(data))
    chunk = metadata.row_group(1).column(["image", "label", "key"].index(column))
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    storage.write_bytes(f"{place}/a.parquet", bytes(data))
    source = make(f"{place}/a.parquet", id_column="key", fragment_samples=6)
    found = samples(source, lambda sample_id: sample_id != "k2")
    assert len(found) == 11
    bad = rejects(found)
    assert sorted(bad) == (
        [f"a.parquet#{row}" for row in range(4, 8)]
        if column == "key"
        else [f"k{row}" for row in range(4, 8)]
    )
    assert all("damaged row group 1" in reason for reason in bad.values())
    if column != "label":
        assert scans(source)[0].labels == {0, 1, 2}


def test_a_file_that_changes_after_the_scan(tmp_path: Any) -> None:
    uri = put(f"{tmp_path}/a.parquet", plain(10))
    source = make(uri)
    (fragment,) = scans(source)[0].fragments
    for content in (file_bytes(plain(4)), b"", b"PAR1 no more", file_bytes(pa.table({"x": [0]}))):
        storage.write_bytes(uri, content)
        found = list(source.read(fragment))
        assert len(found) == 10 and len(set(ids(found))) == 10
        assert all(sample.reason for sample in found[4:])
    put(uri, plain(30))
    assert not rejects(list(source.read(fragment)))


def test_a_number_of_rows_that_cannot_be_is_refused(tmp_path: Any) -> None:
    uri = put(
        f"{tmp_path}/a.parquet",
        pa.table({"image": pa.nulls(100_000, pa.binary()), "label": [0] * 100_000}),
    )
    source = make(uri)
    file = next(source.files())
    assert sum(part.samples for part in source.scan(file).fragments) in {0, 100_000}
    scan = source.scan(SourceFile(file.path, 500, file.stamp))
    assert (
        scan.fragments[0].samples == 0
        and "100000 rows stated in 500 bytes" in scan.fragments[0].error
    )


def test_a_file_deleted_after_the_listing_is_broken(place: str) -> None:
    uri = put(f"{place}/a.parquet", plain(2))
    source = make(f"{place}")
    (file,) = source.files()
    storage.delete(uri)
    assert "no such file" in source.scan(file).fragments[0].error


def test_a_storage_fault_is_not_mistaken_for_damage(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = put(
        f"{tmp_path}/a.parquet",
        plain(400, pad=[np.random.default_rng(row).bytes(5000) for row in range(400)]),
        row_group_size=100,
    )
    source = make(uri)
    file = next(source.files())
    (fragment,) = source.scan(file).fragments

    def fails(self: Any, length: int) -> bytes:
        raise PermissionError("the token has expired")

    with monkeypatch.context() as patch, pytest.raises(PermissionError, match="expired"):
        patch.setattr(storage.streams.Ranges, "_fetch", fails)
        source.scan(file)
    stream = source.read(fragment)
    next(stream)
    monkeypatch.setattr(storage.streams.Ranges, "_fetch", fails)
    with pytest.raises(PermissionError, match="expired"):
        list(stream)


def test_classes_of_named_labels_are_sorted(tmp_path: Any) -> None:
    uri = put(f"{tmp_path}/a.parquet", pa.table({"image": [b""] * 3, "label": ["b", "c", "a"]}))
    (scan,) = scans(make(uri))
    assert class_map(scan.class_names, scan.labels, None).names == ("a", "b", "c")


FUZZ = [
    file_bytes(hugging_face(12), row_group_size=5),
    file_bytes(
        plain(12, key=[f"k{row}" for row in range(12)]), row_group_size=4, compression="none"
    ),
    file_bytes(
        plain(12, key=list(range(12))),
        compression="gzip",
        write_page_checksum=True,
        data_page_version="2.0",
    ),
]


@settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    which=st.integers(0, len(FUZZ) - 1),
    cut=st.none() | st.floats(0, 1),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
    tail=st.booleans(),
    key=st.booleans(),
)
def test_damage_gives_rejects_or_a_broken_file(
    tmp_path: Any,
    which: int,
    cut: float | None,
    changes: list[tuple[float, int]],
    tail: bool,
    key: bool,
) -> None:
    damaged = bytearray(FUZZ[which])
    reach = min(len(damaged), 1500)  # where the footer is
    for place, value in changes:
        damaged[
            len(damaged) - reach + int(place * reach) if tail else int(place * len(damaged))
        ] = value
    if cut is not None:
        del damaged[int(cut * len(damaged)) :]
    (tmp_path / "a.parquet").write_bytes(damaged)
    source = ParquetSource(
        SourceSettings(
            uri=f"{tmp_path}/a.parquet", fragment_samples=7, id_column="key" if key else None
        )
    )
    found = samples(source)
    assert len(found) == sum(part.samples for scan in scans(source) for part in scan.fragments)
    decode_batch(found, 8, 10_000)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from /proc")
def test_a_page_whose_header_claims_gigabytes_takes_no_memory(tmp_path: Any) -> None:
    """In a separate process: sizes in page headers are replaced one after the other."""
    program = """
import sys
from pathlib import Path
from raypipe.config import SourceSettings
from raypipe.sources import open_source

def peak():
    status = open("/proc/self/status")
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) // 1024

path, started, bad = Path(sys.argv[1]), 0, False
whole = path.read_bytes()
for place in range(4, 44):
    size = bytes.fromhex("acffffff0f")  # 2,147,483,606 as Thrift writes it
    path.write_bytes(whole[:place] + size + whole[place + 5 :])
    source = open_source(SourceSettings(uri=str(path)))
    parts = [part for file in source.files() for part in source.scan(file).fragments]
    found = [sample for part in parts for sample in source.read(part)]
    assert len(found) == 20, len(found)
    started, bad = started or peak(), bad or any(sample.reason for sample in found)
assert bad
print(peak() - started)
"""
    file = f"{tmp_path}/a.parquet"
    pq.write_table(
        pa.table({"image": [picture(row) for row in range(20)], "label": list(range(20))}), file
    )
    done = subprocess.run([sys.executable, "-c", program, file], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100
