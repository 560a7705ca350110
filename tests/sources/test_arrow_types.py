"""Columns in every layout, encoding and extension type that has one meaning are read alike."""

from __future__ import annotations

import pickle
import uuid
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from source_helpers import ids, make, picture, rejects, samples, scans

from raypipe.sources.arrow_types import storage_array, vectors
from raypipe.sources.types import RawSample

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
RAGGED = [PIXELS[0], PIXELS[1][:2], PIXELS[2][:, :3]]
CANONICAL_TYPE = pa.struct([("data", pa.list_(pa.uint8())), ("shape", pa.list_(pa.int32(), 3))])
RAGGED_TYPE = pa.struct([("data", pa.large_list(pa.uint8())), ("shape", pa.list_(pa.int64()))])
KEYS = [uuid.UUID(int=number) for number in range(3)]


def extension(values: Any, type: pa.DataType, name: str, metadata: bytes) -> pa.Table:
    """A column of an extension type as it is stored, whoever registered the type."""
    stated = {"ARROW:extension:name": name, "ARROW:extension:metadata": metadata}
    field = pa.field("image", type, metadata=stated)
    return pa.table([pa.array(values, type)], schema=pa.schema([field]))


def flat(arrays: Any) -> list[list[int]]:
    return [array.reshape(-1).tolist() for array in arrays]


def ragged(arrays: Any) -> list[dict[str, list[int]]]:
    return [{"data": array.reshape(-1).tolist(), "shape": list(array.shape)} for array in arrays]


def with_order(order: list[int]) -> pa.Array:
    type = pa.fixed_shape_tensor(pa.uint8(), [3, 4, 5], permutation=order)
    stored = flat(np.ascontiguousarray(PIXELS.transpose(0, 3, 1, 2)))
    return pa.ExtensionArray.from_storage(type, pa.array(stored, type.storage_type))


ARRAYS = {
    "ray.data.arrow_tensor": extension(
        flat(PIXELS), pa.list_(pa.uint8()), "ray.data.arrow_tensor", b"[4, 5, 3]"
    ),
    "ray.data.arrow_tensor_v2": extension(
        flat(PIXELS), pa.large_list(pa.uint8()), "ray.data.arrow_tensor_v2", b"[4, 5, 3]"
    ),
    "wider numbers": extension(
        flat(PIXELS), pa.large_list(pa.int64()), "ray.data.arrow_tensor_v2", b"[4, 5, 3]"
    ),
    "arrow.fixed_shape_tensor": pa.table(
        {"image": pa.FixedShapeTensorArray.from_numpy_ndarray(PIXELS)}
    ),
    "channels first, reordered": pa.table({"image": with_order([1, 2, 0])}),
    "nested views": pa.table(
        {"image": pa.array(PIXELS.tolist(), pa.list_view(pa.list_view(pa.list_(pa.uint8()))))}
    ),
}


def read(tmp_path: Any, table: pa.Table, **options: Any) -> list[RawSample]:
    if "label" not in table.column_names:
        table = table.append_column("label", pa.array(range(len(table))))
    pq.write_table(table, tmp_path / "a.parquet")
    return samples(make(str(tmp_path / "a.parquet"), **options))


def error(tmp_path: Any, table: pa.Table, **options: Any) -> str:
    """Why a file is left out."""
    pq.write_table(
        table.append_column("label", pa.array(range(len(table)))), tmp_path / "a.parquet"
    )
    (scan,) = scans(make(str(tmp_path / "a.parquet"), **options))
    return scan.fragments[0].error


@pytest.mark.parametrize("layout", ARRAYS)
def test_arrays_of_pixels(tmp_path: Any, layout: str) -> None:
    found = read(tmp_path, ARRAYS[layout])
    assert [sample.label for sample in found] == [0, 1, 2] and not rejects(found)
    assert np.array_equal([sample.image for sample in found], PIXELS)


@pytest.mark.parametrize(
    ("type", "name", "metadata"),
    [
        (RAGGED_TYPE, "ray.data.arrow_variable_shaped_tensor", b"3"),
        (CANONICAL_TYPE, "arrow.variable_shape_tensor", b"{}"),
    ],
)
def test_arrays_of_different_shapes(
    tmp_path: Any, type: pa.DataType, name: str, metadata: bytes
) -> None:
    wrong = [
        {"data": [1, 2, 3], "shape": [2, 2, 3]},
        None,
        {"data": [1] * 8, "shape": [2, 2, 2]},
    ]
    found = read(tmp_path, extension([*ragged(RAGGED), *wrong], type, name, metadata))
    for sample, expected in zip(found[:3], RAGGED, strict=True):
        assert np.array_equal(sample.image, expected)
    assert [sample.reason for sample in found[3:]] == [
        "3 numbers are stored for the shape [2, 2, 3]",
        "no image: null",
        "pixels have shape [2, 2, 2], not [height, width] or [height, width, 3]",
    ]


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        (b"[3, 4, 5]", "column 'image' is uint8 arrays of shape [3, 4, 5]; expected encoded"),
        (pickle.dumps((4, 5, 3)), "Ray 2.49"),  # raypipe says so, and Ray where it is imported
    ],
    ids=["channels first", "pickled"],
)
def test_arrays_that_are_not_images_are_named(tmp_path: Any, metadata: bytes, words: str) -> None:
    table = extension(flat(PIXELS), pa.large_list(pa.uint8()), "ray.data.arrow_tensor_v2", metadata)
    assert words in error(tmp_path, table, image_column="image")


@pytest.mark.parametrize("type", [pa.binary_view(), pa.dictionary(pa.int8(), pa.binary())])
def test_encoded_images(tmp_path: Any, type: pa.DataType) -> None:
    images = [picture(1), picture(2), picture(1), None]
    found = read(tmp_path, pa.table({"image": pa.array(images, type)}))
    assert [sample.image for sample in found] == images
    assert rejects(found) == {"a.parquet#3": "no image: null"}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (
            pa.ExtensionArray.from_storage(
                pa.uuid(), pa.array([KEYS[0].bytes, None, KEYS[2].bytes], pa.binary(16))
            ),
            [str(KEYS[0]), str(KEYS[2])],
        ),
        (pa.array([2**53 + 1, None, 2**63], pa.uint64()), [str(2**53 + 1), str(2**63)]),
        (
            pa.array([Decimal(2**80), None, Decimal(2)], pa.decimal128(30, 0)),
            ["1208925819614629174706176", "2"],
        ),
        (pa.array(["x", None, "z"], pa.string_view()), ["x", "z"]),
        (pa.array(["x", None, "z"]).dictionary_encode(), ["x", "z"]),
    ],
)
def test_ids(tmp_path: Any, keys: pa.Array, expected: list[str]) -> None:
    table = pa.table({"image": [picture(row) for row in range(3)], "key": keys})
    found = read(tmp_path, table, id_column="key")
    assert ids(found) == [expected[0], "a.parquet#1", expected[1]]
    assert rejects(found) == {"a.parquet#1": "no id: key is null"}


@pytest.mark.parametrize("keys", [[1.0, 2.0], [b"x", b"y"], [Decimal("1.5"), Decimal("2.5")]])
def test_values_without_one_text_are_no_ids(tmp_path: Any, keys: list[Any]) -> None:
    table = pa.table({"image": [picture(1), picture(2)], "key": keys})
    reason = error(tmp_path, table, id_column="key")
    assert "column 'key' is" in reason and "expected text or whole numbers" in reason


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (pa.array([True, False, None]), [1, 0, None]),
        (pa.array([Decimal(3), Decimal(1), None], pa.decimal128(9, 2)), [3, 1, None]),
        (pa.array(["cat", "dog", None], pa.string_view()), ["cat", "dog", None]),
        (pa.array([7, 5, None]).dictionary_encode(), [7, 5, None]),
        (pa.ExtensionArray.from_storage(pa.bool8(), pa.array([1, 0, None], pa.int8())),
         [1, 0, None]),
    ],
)  # fmt: skip
def test_labels(tmp_path: Any, labels: pa.Array, expected: list[Any]) -> None:
    table = pa.table({"image": [picture(row) for row in range(3)], "label": labels})
    assert [sample.label for sample in read(tmp_path, table)] == expected


LISTS = st.one_of(st.none(), st.lists(st.one_of(st.none(), st.integers(-9, 9)), max_size=4))


@given(
    values=st.lists(LISTS, max_size=8),
    type=st.sampled_from([pa.list_view, pa.large_list_view]),
    order=st.randoms(use_true_random=False),
)
def test_views_of_lists_hold_the_same_as_lists(values: Any, type: Any, order: Any) -> None:
    array = pa.array(values, type(pa.int64()))
    rows = [order.randrange(len(values)) for _ in values]
    for part, expected in (
        (array, values),
        (array[1:], values[1:]),
        (array.take(pa.array(rows, pa.int64())), [values[row] for row in rows]),
    ):
        plain = storage_array(part)
        plain.validate(full=True)
        assert pa.types.is_large_list(plain.type) and plain.to_pylist() == expected


def test_arrays_of_one_axis_are_vectors() -> None:
    values = [{"data": [0.5, 1.5], "shape": [2]}, None, {"data": [2.5], "shape": [1]}]
    type = pa.struct([("data", pa.list_(pa.float32())), ("shape", pa.list_(pa.int64()))])
    stated = {"ARROW:extension:name": "ray.data.arrow_variable_shaped_tensor"}
    field = pa.field("embedding", type, metadata=stated)
    assert vectors(pa.array(values, type), field).to_pylist() == [[0.5, 1.5], None, [2.5]]
    with pytest.raises(pa.ArrowInvalid, match="more than one axis"):
        vectors(pa.array([{"data": [0.5, 1.5], "shape": [2, 1]}], type), field)
