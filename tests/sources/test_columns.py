"""Which columns `auto` takes, and which types they can have; tested on Parquet files."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from source_helpers import make, picture, rejects, samples, scans
from test_huggingface import arrow, save
from test_parquet import NAMES, put


def described(table: pa.Table, **kinds: str) -> pa.Table:
    features = {
        name: {"_type": kind, **({"names": NAMES} if kind == "ClassLabel" else {})}
        for name, kind in kinds.items()
    }
    return table.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )


def of(**columns: Any) -> pa.Table:
    return pa.table({name: [value] for name, value in columns.items()})


@pytest.mark.parametrize(
    ("table", "image", "label"),
    [
        (of(img=b"x", fine_label=3, coarse_label=1), "img", "fine_label"),  # CIFAR-100
        (of(label=0, image=b"x", img=b"y", cls=1), "image", "label"),
        (of(IMG=b"x", Class="cat"), "IMG", "Class"),
        (
            of(image="0.png", jpg=b"x", label={"name": "cat"}, target=1),
            "jpg",
            "target",
        ),  # a usual name does not count if the type is unsuitable
        (of(pixels=b"x", kind=4, name="a"), "pixels", "kind"),
        (of(scan=b"x", kind=4, id=7), "scan", "kind"),
        (
            described(of(hash=b"x", scan=b"y", area=4, kind=1), scan="Image", kind="ClassLabel"),
            "scan",
            "kind",
        ),
    ],
)
def test_columns_are_found_by_name_description_or_type(
    tmp_path: Any, table: pa.Table, image: str, label: str
) -> None:
    source = make(put(f"{tmp_path}/a.parquet", table))
    assert (source.resolved_settings().image_column, source.resolved_settings().label_column) == (
        image,
        label,
    )
    (sample,) = samples(source)
    row = table.to_pylist()[0]
    stored = row[label] if table.schema.metadata is None else NAMES[row[label]]
    assert sample == ("a.parquet#0", row[image], stored, "")
    # explicit names are kept without opening any file
    explicit = make(
        f"{tmp_path}/none.parquet", format="parquet", image_column="a", label_column="b"
    ).resolved_settings()
    assert (explicit.image_column, explicit.label_column) == ("a", "b")


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (
            of(before=b"x", after=b"y", label=1),
            "several columns may hold images: before, after; set source.image_column",
        ),
        (
            of(image=b"x", area=1, kind=2),
            "several columns may hold labels: area, kind; set source.label_column",
        ),
        (
            of(image=b"x", id=1),
            "no column is clearly the label; columns are image, id; set source.label_column",
        ),
        (
            of(image=b"x", name="a"),
            "no column is clearly the label; columns are image, name; set source.label_column",
        ),
        (
            of(path="x", label=1),
            "no column holds images; 'path' names files or addresses, which a table does not "
            "follow: write it as CSV (path, label), with the paths of downloaded files, and set "
            "source.uri to that",
        ),
        (
            of(image=b"x", label={"a": 1}),
            "column 'label' is struct<a: int64>; expected one number or name per sample; "
            "set source.label_column",
        ),
    ],
)
def test_columns_that_are_not_clear_are_named(tmp_path: Any, table: pa.Table, words: str) -> None:
    source = make(put(f"{tmp_path}/a.parquet", table))
    (fragment,) = scans(source)[0].fragments
    assert fragment.samples == 0 and fragment.error == words
    assert source.resolved_settings().image_column == "auto"


def test_most_of_the_files_in_which_columns_are_clear_decide_for_all(place: str) -> None:
    put(f"{place}/0.parquet", of(name="not", kind="images"))
    put(f"{place}/1.parquet", of(img=b"1", fine_label=1))
    put(f"{place}/2.parquet", of(img=b"2", label=2))
    put(f"{place}/3.parquet", of(img=b"3", fine_label=3, label=4))
    source = make(place)
    errors = [scan.fragments[0].error for scan in scans(source)]
    assert (
        "no column 'img'; columns are name, kind" in errors[0]
        and "no column 'label'; columns are img" in errors[1]
    )
    assert [(sample.image, sample.label) for sample in samples(source)] == [(b"2", 2), (b"3", 4)]


def test_a_single_file_that_is_clear_is_found_among_many(tmp_path: Any) -> None:
    for number in range(40):
        put(
            f"{tmp_path}/{number:02d}.parquet",
            of(img=b"1", fine_label=1) if number == 33 else of(name="not", kind="images"),
        )
    assert make(str(tmp_path)).resolved_settings().label_column == "fine_label"


class Values(pa.ExtensionArray):
    """Like the array types of `datasets`, whose values are not the scalars of pyarrow."""

    def __getitem__(self, index: int) -> Any:
        return self.storage[index]


class Kind(pa.ExtensionType):
    def __init__(self, storage: pa.DataType) -> None:
        super().__init__(storage, "raypipe.tests.kind")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: pa.DataType, serialized: bytes) -> Kind:
        return cls(storage)

    def __arrow_ext_class__(self) -> type:
        return Values


@pytest.mark.parametrize("registered", [True, False])
def test_extension_types_are_read_as_they_are_stored(tmp_path: Any, registered: bool) -> None:
    pixels, nested = np.arange(40).reshape(2, 4, 5), pa.list_(pa.list_(pa.uint8()))
    columns = {
        "image": pa.array([*pixels.tolist(), None], nested),
        "label": pa.array([3, 4, None]),
        "key": pa.array(["a", "b", "c"]),
    }
    table = pa.table({name: Kind(array.type).wrap_array(array) for name, array in columns.items()})
    if registered:
        pa.register_extension_type(Kind(pa.int64()))
    try:
        for uri in (
            put(f"{tmp_path}/a.parquet", table),
            save(f"{tmp_path}/saved", arrow(table), features=None),
        ):
            source = make(uri, id_column="key")
            (fragment,) = scans(source)[0].fragments
            found = list(source.read(fragment))
            assert [(sample.sample_id, sample.label, sample.reason) for sample in found] == [
                ("a", 3, ""), ("b", 4, ""), ("c", None, "no image: null"),
            ]  # fmt: skip
            assert np.array_equal([sample.image for sample in found[:2]], pixels) and scans(source)[
                0
            ].labels == {3, 4}
    finally:
        if registered:
            pa.unregister_extension_type("raypipe.tests.kind")


def test_bytes_in_other_arrow_types(tmp_path: Any) -> None:
    image = picture(1)
    for number, (values, type) in enumerate(
        [
            ([image, None], pa.large_binary()),
            ([list(image), None], pa.list_(pa.uint8())),
            ([np.frombuffer(image, np.int8).tolist(), None], pa.large_list(pa.int8())),
            (
                [{"bytes": image, "path": None}, None],
                pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())]),
            ),
        ]
    ):
        uri = put(
            f"{tmp_path}/{number}.parquet",
            pa.table({"image": pa.array(values, type), "label": [0, 1]}),
        )
        found = samples(make(uri))
        assert found[0].image == image and found[1].reason == "no image: null"
    uri = put(
        f"{tmp_path}/n.parquet",
        pa.table({"image": pa.array([[1, None]], pa.list_(pa.uint8())), "label": [0]}),
    )
    assert rejects(samples(make(uri))) == {"n.parquet#0": "bytes are null"}
