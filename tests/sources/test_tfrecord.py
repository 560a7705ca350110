from __future__ import annotations

import gzip
import struct
import zlib
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from bad_inputs import example, tfrecord_bytes
from source_helpers import ids, make, picture, rejects, samples, scans

from raypipe import storage
from raypipe.estimate import inspect_source, sampling
from raypipe.sources import tfrecord
from raypipe.sources.crc32c import crc32c
from raypipe.sources.examples import NotAnExample, parse_example
from raypipe.sources.values import stored_label


def records(count: int, start: int = 0) -> list[bytes]:
    return [
        example({"image/encoded": picture(row), "image/class/label": row % 3, "uid": f"u{row}"})
        for row in range(start, start + count)
    ]


def slow_crc32c(data: bytes) -> int:
    """Bit by bit, from the definition."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@pytest.mark.parametrize("length", [0, 1, 9, 2047, 2048, 2049, 4095, 4096, 6400, 10_001])
def test_crc32c(length: int) -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the check value of the catalogue of CRCs
    data = np.random.default_rng(length).bytes(length)
    assert crc32c(data) == slow_crc32c(data)


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zlib.compress])
def test_samples_of_two_files(place: str, pack: Any) -> None:
    for number in range(2):
        storage.write_bytes(
            f"{place}/set/train.tfrecord-0000{number}-of-00002",
            pack(tfrecord_bytes(records(5, 5 * number))),
        )
    source = make(f"{place}/set", fragment_samples=2, format="tfrecord")
    found = samples(source, lambda sample_id: not sample_id.endswith("#1"))
    names = [f"train.tfrecord-0000{row // 5}-of-00002#{row % 5}" for row in range(10)]
    assert ids(found) == [name for name in names if not name.endswith("#1")]
    assert [sample.image for sample in found[4:]] == [picture(row) for row in (5, 7, 8, 9)]
    assert [sample.label for sample in found[4:]] == [2, 1, 2, 0] and not rejects(found)
    assert scans(source)[0].labels == {0, 1, 2}


def one(place: Any, content: bytes, **options: Any) -> Any:
    storage.write_bytes(f"{place}/a.tfrecord", content)
    return make(f"{place}/a.tfrecord", **options)


def test_damage(tmp_path: Any) -> None:
    whole = tfrecord_bytes(records(4))
    second = len(tfrecord_bytes(records(1)))
    third = len(tfrecord_bytes(records(2)))

    def flipped(position: int) -> bytes:
        return whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :]

    source = one(tmp_path, flipped(second + 40))
    assert rejects(samples(source)) == {"a.tfrecord#1": "wrong checksum (CRC-32C) of the record"}
    for content, problem in (
        (whole[: third + 50], "cut off in the middle of a record"),
        (whole[: third + 5], "cut off in the middle of a record"),
        (flipped(third + 3), "wrong checksum (CRC-32C) of a record's length"),
        (gzip.compress(whole)[:-300], "the compression is damaged: .*"),
    ):
        fragments = scans(one(tmp_path, content))[0].fragments
        start = fragments[-1].start
        assert start == (2 if content[:2] != b"\x1f\x8b" else start)
        assert [part.samples for part in fragments] == [start, 0]
        words = fragments[-1].error
        assert words.startswith(f"from row {start} on: {problem.rstrip('.*')}"), words
        assert len(samples(one(tmp_path, content))) == start
    for content, problem in (
        (b"no records at all", "wrong checksum"),
        (tfrecord_bytes([b"text", b"text"]), "the record is not a tf.train.Example"),
        (
            tfrecord_bytes([example({"a": 1, "b": 2})]),
            "no feature holds an image; features are a, b",
        ),
    ):
        (fragment,) = scans(one(tmp_path, content))[0].fragments
        assert problem in fragment.error and fragment.error.startswith("not a TFRecord file of")


def test_a_file_that_became_shorter(tmp_path: Any) -> None:
    source = one(tmp_path, tfrecord_bytes(records(4)), fragment_samples=3)
    parts = scans(source)[0].fragments
    storage.write_bytes(f"{tmp_path}/a.tfrecord", tfrecord_bytes(records(2)))
    found = [sample for part in parts for sample in source.read(part)]
    reason = "the file has fewer records than when it was indexed"
    assert rejects(found) == {"a.tfrecord#2": reason, "a.tfrecord#3": reason}


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ({"image": b"x", "label": "cat"}, "cat"),
        ({"image": b"x", "label": -1}, -1),
        ({"image": b"x", "label": 2.0}, 2),
        ({"image": b"x", "label": []}, None),
        ({"image": b"x"}, None),
        ({"image": b"x", "label": [1, 2]}, "label: feature 'label' has 2 values"),
        ({"image": b"x", "label": 0.5}, "label is not a number or a name: 0.5"),
        ({"image": [b"x", b"y"]}, "feature 'image' holds 2 values of bytes, not one image"),
    ],
)
def test_features(tmp_path: Any, features: dict[str, Any], expected: Any) -> None:
    good = example({"image": picture(1), "label": 0})
    found = samples(one(tmp_path, tfrecord_bytes([good, example(features)])))[1]
    assert (found.reason or found.label) == expected


def test_pixels_next_to_their_shape(tmp_path: Any) -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    features = {"image_raw": pixels.tobytes(), "height": 2, "width": 4, "depth": 3, "label": 1}
    (found,) = samples(one(tmp_path, tfrecord_bytes([example(features)])))
    np.testing.assert_array_equal(found.image, pixels)


def test_named_features_and_ids(tmp_path: Any) -> None:
    two = [example({"left": picture(1), "right": picture(2), "kind": "a", "uid": 7})] * 2
    source = one(tmp_path, tfrecord_bytes(two))
    assert "several features hold images" in scans(source)[0].fragments[0].error
    options = {"image_column": "right", "label_column": "kind", "id_column": "uid"}
    found = samples(one(tmp_path, tfrecord_bytes(two), **options))
    assert ids(found) == ["7", "7"] and found[0].image == picture(2) and found[0].label == "a"
    assert found[1].reason == "duplicate id: an earlier row has it too"
    wrong = one(tmp_path, tfrecord_bytes(two), image_column="top")
    assert "no feature 'top'; features are kind, left, right" in scans(wrong)[0].fragments[0].error


def test_preview(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "WHOLE_BYTES", 0)
    source = one(tmp_path, tfrecord_bytes(records(60)))
    found = inspect_source(source.settings, samples=10)
    assert found.survey.format == "tfrecord" and 55 < found.survey.samples < 65
    storage.write_bytes(f"{tmp_path}/a.tfrecord", struct.pack("<Q", 5))
    ((_, reason),) = inspect_source(source.settings).survey.unreadable_files
    assert reason == "not a TFRecord file of images: cut off in the middle of a record"


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress])
def test_preview_of_a_compressed_file(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, pack: Any
) -> None:
    monkeypatch.setattr(sampling, "WHOLE_BYTES", 0)
    pixels = np.zeros((32, 32), np.uint8).tobytes()  # a fiftieth of its size when compressed
    record = {"image_raw": pixels, "height": 32, "width": 32, "channels": 1, "label": 1}
    source = one(tmp_path, pack(tfrecord_bytes([example(record)]) * 300))
    assert inspect_source(source.settings, samples=10).survey.samples == 300
    # of a larger file, the beginning shows it
    random = np.random.default_rng(0)
    noise = [random.integers(0, 4, 1024, np.uint8).tobytes() for _ in range(100)]
    block = tfrecord_bytes([example({**record, "image_raw": pixels}) for pixels in noise])
    monkeypatch.setattr(tfrecord, "READ_BYTES", 512 << 10)
    survey = inspect_source(one(tmp_path, pack(block * 30)).settings, samples=10).survey
    assert 2400 < survey.samples < 3600 and survey.samples != 3000 and not survey.counted


def test_a_fraction_stored_as_a_large_number_is_no_example() -> None:
    number = bytes([1 << 3 | 1]) + (1 << 40).to_bytes(8, "little")
    feature = bytes([2 << 3 | 2, len(number)]) + number
    entry = b"\x0a\x01x\x12" + bytes([len(feature)]) + feature
    features = b"\x0a" + bytes([len(entry)]) + entry
    record = b"\x0a" + bytes([len(features)]) + features
    with pytest.raises(NotAnExample):
        parse_example(memoryview(record))


def test_a_decimal_of_many_digits_is_no_label() -> None:
    assert stored_label(Decimal("1e999999999"))[1].startswith("label is not a number")
    assert stored_label(Decimal("3.0")) == (3, "")
