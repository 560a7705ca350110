"""Every bad input through every format.

The result is pixels and a valid label, one reject that a person understands, or one SourceError.
"""

from __future__ import annotations

import gzip
import re
from collections import Counter
from pathlib import Path
from typing import Any

import bad_inputs
import pyarrow as pa
import pytest
from bad_inputs import ANY_DAMAGE, BadSample, good_samples, parquet_bytes, tar_bytes, write_source
from source_helpers import samples, scans

from raypipe import storage
from raypipe.config import SourceSettings
from raypipe.errors import SourceError
from raypipe.sources import class_map, open_source
from raypipe.vision.decode import decode_batch

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:PIL"
)  # pytest turns warnings on that raypipe.vision.decode silences
TRACES = re.compile(
    r"Traceback|Error\b|Exception|Errno|0x[0-9a-f]{6}|object at|<class|pyarrow|lib\.|\.py\b"
    r"|\bNone\b|\\x00"
)
"""What only programmers understand."""


def outcome(**options: Any) -> tuple[list[tuple[str, int]], list[tuple[str, str]]]:
    """What the stages make of a source.

    (sample_id, class index) of each usable sample, (sample_id or file, reason) of each reject.
    """
    source = open_source(
        SourceSettings(
            **{
                "max_pixels": bad_inputs.MAX_PIXELS,
                "num_classes": 3,
                "fragment_samples": 50,
                **options,
            }
        )
    )
    found = scans(source)
    names = next((scan.class_names for scan in found if scan.class_names is not None), None)
    classes = class_map(
        names, frozenset().union(*(scan.labels for scan in found)), source.settings.num_classes
    )
    used: list[tuple[str, int]] = []
    rejects = [(part.path, part.error) for scan in found for part in scan.fragments if part.error]
    stored = samples(source)  # checks that each fragment has as many as its scan counted
    pixels, reasons = decode_batch(stored, 8, source.settings.max_pixels)
    for sample, image, reason in zip(stored, pixels, reasons, strict=True):
        label, wrong = classes.index(sample.label)
        assert reason or image.any() or not image.size
        assert -1 <= label < len(classes.names)
        if reason or wrong:
            rejects.append((sample.sample_id, reason or wrong))
        else:
            used.append((sample.sample_id, label))
    for _, reason in rejects:
        assert 6 < len(reason) < 400 and reason.isprintable() and not TRACES.search(reason), reason
    return used, rejects


def key(sample_id: str) -> str:
    return re.sub(r"\.\w+$", "", re.split(r"[/#]", sample_id)[-1])


def check(
    cases: list[BadSample], used: list[tuple[str, int]], rejects: list[tuple[str, str]]
) -> None:
    """Check that each case appears once, with the expected result."""
    assert Counter(key(name) for name, _ in used + rejects) == Counter(case.key for case in cases)
    reasons = {key(name): reason for name, reason in rejects}
    for case in cases:
        reason = reasons.get(case.key, "")
        if case.words is None:
            assert not reason or re.search(ANY_DAMAGE, reason), (case.key, reason)
        else:
            assert re.search(case.words, reason) if case.words else not reason, (case.key, reason)


@pytest.mark.parametrize("format", ["parquet", "tar", "tar.gz", "folder", "tfrecord", "mds"])
def test_images(place: str, format: str) -> None:
    cases = [*good_samples(5), *bad_inputs.bad_images(), *good_samples(5, 5)]
    check(
        cases,
        *outcome(
            **write_source(format, place, cases),
            **({"num_classes": None} if format == "folder" else {}),
        ),
    )


@pytest.mark.parametrize("format", ["parquet", "tar", "tar.gz", "folder", "tfrecord", "mds"])
def test_images_cut_off_anywhere(tmp_path: Path, format: str) -> None:
    cases = [*good_samples(1), *bad_inputs.truncated(), *good_samples(1, 1)]
    assert len(cases) > 150
    used, rejects = outcome(
        **write_source(format, str(tmp_path), cases),
        **({"num_classes": None} if format == "folder" else {}),
    )
    check(cases, used, rejects)
    assert len(rejects) > 0.9 * len(cases)


@pytest.mark.parametrize("format", ["parquet", "tar", "tfrecord", "mds"])
def test_labels(tmp_path: Path, format: str) -> None:
    cases = [*good_samples(5), *bad_inputs.bad_labels(), *good_samples(5, 5)]
    if format == "tar":  # any text is a class name there
        cases = [case for case in cases if case.key not in {"fraction", "not-a-number"}]
    used, rejects = outcome(**write_source(format, str(tmp_path), cases))
    check(cases, used, rejects)
    assert {key(name) for name, label in used if label < 0} == {
        case.key for case in cases if case.label in {None, -1} or case.label != case.label
    }


def test_names_among_numbers_are_refused_as_a_whole(tmp_path: Path) -> None:
    cases = [*good_samples(3), BadSample("odd", bad_inputs.GOOD, "cat")]
    with pytest.raises(
        SourceError, match=r"partly numbers \(such as 0\) and partly names \(such as 'cat'\)"
    ):
        outcome(**write_source("tar", f"{tmp_path}/tar", cases))
    storage.write_bytes(f"{tmp_path}/p/a.parquet", parquet_bytes(cases[:3]))
    storage.write_bytes(f"{tmp_path}/p/b.parquet", parquet_bytes(cases[3:]))
    with pytest.raises(SourceError, match="partly numbers"):
        outcome(uri=f"{tmp_path}/p")
    with pytest.raises(
        SourceError, match=r"the largest label is 1000000000000000; .* set source.num_classes"
    ):
        outcome(
            **write_source(
                "parquet", f"{tmp_path}/large", [BadSample("x", bad_inputs.GOOD, 10**15)]
            ),
            num_classes=None,
        )


def test_shards_of_parquet_that_are_empty_cut_off_or_of_another_kind(place: str) -> None:
    good = parquet_bytes(good_samples(4))
    bad = {
        "a-empty": b"",
        "b-half": good[: len(good) // 2],
        "c-no-rows": parquet_bytes([]),
        "d-text": b"label,image\n0,a.png\n",
        "e-other-columns": parquet_bytes(good_samples(2)).replace(b"image", b"photo"),
        "f-label-is-a-list": parquet_bytes([BadSample("x", b"", [0, 1])]),  # type: ignore[arg-type]
        "g-footer-lies": good[:-8] + b"\xff\xff\xff\x7f" + good[-4:],
        "h-swapped-halves": good[len(good) // 2 :] + good[: len(good) // 2],
    }
    for name, content in {**bad, "m": good, "z": parquet_bytes(good_samples(3, 4))}.items():
        storage.write_bytes(f"{place}/{name}.parquet", content)
    used, rejects = outcome(uri=place, id_column="key")
    assert sorted(key(name) for name, _ in used) == [f"good-{number:02d}" for number in range(7)]
    reasons = {name.removesuffix(".parquet"): reason for name, reason in rejects}
    assert set(reasons) == set(bad) - {"c-no-rows"}
    assert reasons["a-empty"] == "empty: 0 bytes"
    assert (
        "there is no column 'image'" in reasons["e-other-columns"]
        and "set source.image_column" in reasons["e-other-columns"]
    )
    assert "expected one number or name per sample" in reasons["f-label-is-a-list"]
    for name in ("b-half", "d-text", "g-footer-lies", "h-swapped-halves"):
        assert reasons[name].startswith("not a readable Parquet file: ")


def test_types_that_change_between_shards(tmp_path: Path) -> None:
    """The same numbers as integers, floating-point numbers and booleans are the same labels."""
    for name, type in (("a", pa.int8()), ("b", pa.float32()), ("c", pa.uint64())):
        storage.write_bytes(f"{tmp_path}/{name}.parquet", parquet_bytes(good_samples(3), type))
    used, rejects = outcome(uri=str(tmp_path))
    assert [label for _, label in used] == [0, 1, 2] * 3 and not rejects


@pytest.mark.parametrize("packed", [False, True])
def test_shards_of_tar_that_are_empty_or_cut_off(place: str, packed: bool) -> None:
    whole = tar_bytes(good_samples(4))
    empty = tar_bytes([])
    pack = gzip.compress if packed else bytes
    shards = {
        "a-empty": b"",
        "b-half": pack(whole)[: len(pack(whole)) // 2]
        if not packed
        else pack(whole[: len(whole) // 2]),
        "c-no-members": pack(empty),
        "d-text": b"key,label\nx,1\n",
        "e-other-kind": whole if packed else gzip.compress(whole),
        "m": pack(whole),
    }
    for name, content in shards.items():
        storage.write_bytes(f"{place}/{name}.tar{'.gz' * packed}", content)
    used, rejects = outcome(uri=place)
    shard = Counter(name.split(".tar")[0] for name, _ in used)
    assert shard.pop("m") == 4 and set(shard) <= {"b-half"} and shard["b-half"] in {1, 2}
    assert sorted(name.split(".tar")[0] for name, _ in rejects) == [
        "a-empty",
        "b-half",
        "d-text",
        "e-other-kind",
    ]
    words = {name.split(".tar")[0]: reason for name, reason in rejects}
    assert "cut off" in words["b-half"] and all(
        "not a tar file" in words[name] for name in ("d-text", "e-other-kind")
    )


def test_path_tricks_in_a_tar(tmp_path: Path) -> None:
    tricks = list(bad_inputs.path_tricks())
    content = tar_bytes(good_samples(3), *((info, data) for info, data, _ in tricks))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar").write_bytes(content + tar_bytes(good_samples(2, 3)))
    used, rejects = outcome(uri=f"{tmp_path}/in")
    assert len(used) == 5 and len(rejects) == len(tricks)
    for (_, reason), (info, _, words) in zip(rejects, tricks, strict=True):
        assert reason == f"{info.name}: {words}"
    assert [path.name for path in tmp_path.rglob("*")] == ["in", "a.tar"]


@pytest.mark.parametrize("format", ["parquet", "tar"])
def test_ids_that_repeat_in_one_file(tmp_path: Path, format: str) -> None:
    cases = [*good_samples(3), *good_samples(2), *good_samples(1, 9)]
    options = write_source(format, str(tmp_path), [*cases, *cases[:0]])
    if format == "parquet":
        storage.delete(f"{tmp_path}/b.parquet")
        storage.write_bytes(f"{tmp_path}/a.parquet", parquet_bytes(cases))
    used, rejects = outcome(**options)
    assert [key(name) for name, _ in used] == ["good-00", "good-01", "good-02", "good-09"]
    assert [key(name) for name, _ in rejects] == ["good-00", "good-01"]
    assert all("duplicate" in reason and "earlier" in reason for _, reason in rejects)
