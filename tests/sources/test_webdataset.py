from __future__ import annotations

import gzip
import io
import json
import re
import tarfile
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serial import index, no_ray  # noqa: F401  a fixture
from source_helpers import ids, make, picture, rejects, samples, scans

from raypipe import storage
from raypipe.config import SourceSettings, parse_config
from raypipe.errors import SourceError
from raypipe.estimate import inspect_source, sampling
from raypipe.sources import tarfiles, tarmembers, webdataset
from raypipe.sources.webdataset import WebDatasetSource
from raypipe.vision.decode import decode_batch

Member = tuple[str, bytes] | tarfile.TarInfo


def tar(members: list[Member], format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


def special(name: str, type: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = type, target
    return info


def pairs(count: int, start: int = 0) -> list[Member]:
    members: list[Member] = []
    for number in range(start, start + count):
        members += [
            (f"{number:04d}.png", picture(number)),
            (f"{number:04d}.cls", str(number % 3).encode()),
        ]
    return members


def one(tmp_path: Any, content: bytes, name: str = "a.tar", **options: Any) -> WebDatasetSource:
    (tmp_path / name).write_bytes(content)
    return WebDatasetSource(SourceSettings(uri=f"{tmp_path}/{name}", **options))


def test_samples_of_two_tars(place: str) -> None:
    storage.write_bytes(f"{place}/set/b.tar", tar(pairs(3)))
    storage.write_bytes(f"{place}/set/deep/a.tar", tar(pairs(2, 10)))
    source = make(f"{place}/set")
    found = samples(source, lambda sample_id: sample_id != "b.tar#0001")
    assert ids(found) == ["b.tar#0000", "b.tar#0002", "deep/a.tar#0010", "deep/a.tar#0011"]
    assert [sample.image for sample in found] == [picture(0), picture(2), picture(10), picture(11)]
    assert [sample.label for sample in found] == [0, 2, 1, 2]
    assert [scan.labels for scan in scans(source)] == [{0, 1, 2}, {1, 2}]


def test_local_and_s3_give_the_same(tmp_path: Any, s3: str) -> None:
    (tmp_path / "a.tar").write_bytes(tar(pairs(30)))
    storage.write_bytes(f"{s3}/tars/a.tar", tar(pairs(30)))
    local = samples(make(str(tmp_path), fragment_samples=7))
    assert len(local) == 30 and local == samples(make(f"{s3}/tars", fragment_samples=7))
    assert local == samples(make(f"{s3}/tars/*.tar", fragment_samples=7))
    assert local == samples(make(f"{s3}/tars/a.tar", fragment_samples=7))


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_keys_and_extensions(tmp_path: Any, format: int) -> None:
    long = "folder/" * 20
    members: list[Member] = [
        special("dir/", tarfile.DIRTYPE),
        ("./dir/x.JPEG", b"1"),
        ("./dir/x.seg.png", b"no image of the sample"),
        ("dir.with.dots/y.Jpg", b"2"),
        ("README", b"no extension"),
        (".hidden.png", b"hidden"),
        ("dir/._x.png", b"of a file manager"),
        ("z.a.b.webp", b"3"),
        ("z.tiff", b"4"),
        (long[:120] + "/n.png", b"5"),
        ("ünï.gif", b"6"),
    ]
    found = samples(one(tmp_path, tar(members, format)))
    expected = ["dir/x", "dir.with.dots/y", "z", long[:120] + "/n", "ünï"]
    assert ids(found) == [f"a.tar#{key}" for key in expected]
    assert [sample.image for sample in found] == [b"1", b"2", b"4", b"5", b"6"]


@pytest.mark.parametrize(
    ("member", "expected"),
    [
        (("x.cls", b"7"), 7),
        (("x.cls", b" 7\n"), 7),
        (("x.cls", b"7.0"), 7),
        (("x.cls", b"-1"), -1),
        (("x.cls", b"cat"), "cat"),
        (("x.cls", b"1_000"), "1_000"),
        (("x.cls", b""), None),
        (("x.cls", b"\xff\xfe"), "cannot be read"),
        (("x.cls", b"9" * 1_200_000), "more than 1048576 bytes"),
        (("x.json", b'{"label": 4}'), 4),
        (("x.json", b'{"label": 4.0, "other": 1}'), 4),
        (("x.json", b'{"label": "dog"}'), "dog"),
        (("x.json", b'{"label": "\\ud800x"}'), "\\ud800x"),
        (("x.json", b'{"other": 1}'), None),
        (("x.json", b'{"label": null}'), None),
        (("x.json", b'{"label": [1, 2]}'), "not a number or a name"),
        (("x.json", b'{"label": 0.5}'), "not a number or a name"),
        (("x.json", b"[1]"), "holds no fields but list"),
        (("x.json", b"{"), "cannot be read"),
        (("x.json", b"[" * 100_000), "cannot be read"),
        (("x.txt", b"dog\n"), "dog"),
        (("x.txt", b"12"), 12),
        (("x.json", b'{"kind": 1, "class": "dog", "label": 4}'), 4),
        (("x.json", b'{"fine_label": 3, "class": "dog"}'), 3),
        (("x.note", b"dog"), None),
    ],
)
def test_labels(tmp_path: Any, member: Member, expected: Any) -> None:
    source = one(tmp_path, tar([("x.png", picture(0)), member]))
    (sample,) = samples(source)
    if sample.reason:
        assert str(expected) in sample.reason and sample.label is None
    else:
        assert sample.label == expected
    assert scans(source)[0].labels == ({sample.label} - {None})


def test_label_field_is_a_setting_and_cls_comes_first(tmp_path: Any) -> None:
    members: list[Member] = [("x.json", json.dumps({"kind": 5}).encode()), ("x.png", picture(0))]
    assert samples(one(tmp_path, tar(members), label_column="kind"))[0].label == 5
    members.append(("x.txt", b"7"))
    assert samples(one(tmp_path, tar(members), label_column="kind"))[0].label == 5
    assert samples(one(tmp_path, tar(members), label_column="sort"))[0].label is None
    assert (
        samples(one(tmp_path, tar(members)))[0].label == 7
    )  # the .json has no field with a usual name
    members.append(("x.cls", b"6"))
    assert samples(one(tmp_path, tar(members), label_column="kind"))[0].label == 6


def test_fragments_are_read_from_their_own_offset(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    members: list[Member] = []
    for number in range(20):
        members += [(f"{number:04d}.png", bytes([number]) * 20_000), (f"{number:04d}.cls", b"1")]
    source = one(tmp_path, tar(members), fragment_samples=6)
    (scan,) = scans(source)
    assert [(part.start, part.stop, part.offset) for part in scan.fragments] == [
        (start, min(start + 6, 20), start * (512 + 20_480 + 1024)) for start in (0, 6, 12, 18)
    ]
    asked: list[int] = []
    fetch = storage.streams.Ranges._fetch
    monkeypatch.setattr(webdataset, "READ_BYTES", 4096)
    monkeypatch.setattr(
        storage.streams.Ranges,
        "_fetch",
        lambda self, length: asked.append(self._position) or fetch(self, length),
    )
    found = list(source.read(scan.fragments[2]))
    assert ids(found) == [f"a.tar#{number:04d}" for number in range(12, 18)]
    assert min(asked) >= scan.fragments[2].offset - 512
    assert (
        max(asked) <= scan.fragments[3].offset + 4096
    )  # one header more, to find that the last sample is complete


def test_samples_that_are_not_wanted_are_skipped_over(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    members: list[Member] = [(f"{number}.png", bytes([number]) * 100_000) for number in range(20)]
    source = one(tmp_path, tar(members))
    (fragment,) = scans(source)[0].fragments
    read = 0
    fetch = storage.streams.Ranges._fetch

    def counting(self: Any, length: int) -> bytes:
        nonlocal read
        read += length
        return fetch(self, length)

    monkeypatch.setattr(webdataset, "READ_BYTES", 4096)
    monkeypatch.setattr(storage.streams.Ranges, "_fetch", counting)
    (sample,) = source.read(fragment, lambda sample_id: sample_id == "a.tar#7")
    assert sample.image == bytes([7]) * 100_000
    assert read < 300_000


@pytest.mark.parametrize(
    ("member", "words"),
    [
        (special("evil.png", tarfile.SYMTYPE, "/etc/passwd"), "a link or special file"),
        (special("evil.png", tarfile.LNKTYPE, "0000.png"), "a link or special file"),
        (special("evil.png", tarfile.FIFOTYPE), "a link or special file"),
        (special("evil.png", tarfile.CHRTYPE), "a link or special file"),
        (special("passwd", tarfile.SYMTYPE, "/etc/passwd"), "a link or special file"),
        (("/etc/evil.png", b"x"), "a path out of the tar"),
        (("../evil.png", b"x"), "a path out of the tar"),
        (("a/../../evil.png", b"x"), "a path out of the tar"),
    ],
)
def test_path_tricks_are_rejects_and_nothing_is_extracted(
    tmp_path: Any, member: Member, words: str
) -> None:
    source = one(tmp_path, tar([*pairs(1), member, *pairs(1, 1)]))
    found = samples(source)
    assert len(found) == 3 and [bool(sample.reason) for sample in found] == [False, True, False]
    assert words in found[1].reason
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_names_that_are_not_utf8_are_shown_escaped(tmp_path: Any) -> None:
    found = samples(
        one(
            tmp_path,
            tar(
                [("\udcffa.png", picture(0)), ("../\udcff.png", b""), ("b.\udcff", b"")],
                tarfile.GNU_FORMAT,
            ),
        )
    )
    assert ids(found) == ["a.tar#\\xffa", "a.tar#../\\xff", "a.tar#b"]
    assert [sample.reason for sample in found] == [
        "",
        "../\\xff.png: a path out of the tar, which is not followed",
        "no image: only .\\xff",
    ]


def test_a_link_for_a_label_rejects_its_sample(tmp_path: Any) -> None:
    source = one(
        tmp_path, tar([("x.png", picture(0)), special("x.cls", tarfile.SYMTYPE, "/etc/hostname")])
    )
    assert list(rejects(samples(source))) == ["a.tar#x"]


def test_a_sample_without_an_image_is_a_reject(tmp_path: Any) -> None:
    found = samples(
        one(tmp_path, tar([("x.cls", b"1"), ("x.txt", b"words"), ("y.png", picture(0))]))
    )
    assert rejects(found) == {"a.tar#x": "no image: only .cls, .txt"}


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
@pytest.mark.parametrize("limit", [2, 4, 100])
def test_a_key_that_comes_again_is_a_reject(tmp_path: Any, limit: int, name: str) -> None:
    content = tar([*pairs(5), *pairs(1, 1), ("0009.png", picture(9)), ("0009.png", picture(8))])
    found = samples(
        one(
            tmp_path,
            gzip.compress(content) if name.endswith("gz") else content,
            name,
            fragment_samples=limit,
        )
    )
    assert [sample.sample_id[-1] for sample in found] == list("01234199")
    assert [sample.sample_id[-1] for sample in found if "duplicate key" in sample.reason] == [
        "1",
        "9",
    ]
    assert found[1].image == picture(1) and found[6].image == picture(9)


def scattered(count: int, first: str) -> list[Member]:
    """Samples whose images and labels are apart, with a caption after both."""
    images = [(f"{number:02d}.png", picture(number)) for number in range(count)]
    labels = [(f"{number:02d}.cls", f"class {number % 3}".encode()) for number in range(count)]
    captions = [(f"{number:02d}.txt", b"words") for number in reversed(range(count))]
    return [*(images + labels if first == "images" else labels + images), *captions]


@pytest.mark.parametrize("first", ["images", "labels"])
@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
@pytest.mark.parametrize("limit", [7, 100])
def test_members_that_do_not_follow_one_another_are_one_sample(
    tmp_path: Any, limit: int, name: str, first: str
) -> None:
    content = tar(scattered(60, first))
    content = gzip.compress(content) if name.endswith("gz") else content
    source = one(tmp_path, content, name, fragment_samples=limit)
    found = samples(source, lambda name: name[-1] != "9")
    assert [(sample.sample_id, sample.image, sample.label, sample.reason) for sample in found] == [
        (f"{name}#{number:02d}", picture(number), f"class {number % 3}", "")
        for number in range(60)
        if number % 10 != 9
    ]
    assert [scan.labels for scan in scans(source)] == [{"class 0", "class 1", "class 2"}]


def test_what_is_wrong_in_a_tar_with_scattered_samples(tmp_path: Any) -> None:
    members = scattered(4, "images")
    members += [("01.png", picture(9)), ("only.cls", b"1"), special("03.json", tarfile.SYMTYPE)]
    found = samples(one(tmp_path, tar(members), fragment_samples=3))
    assert {sample.sample_id[6:]: sample.image for sample in found if sample.image} == {
        f"{number:02d}": picture(number) for number in range(3)
    }
    assert rejects(found) == {
        "a.tar#01": "duplicate key: an earlier sample of the tar has it too",
        "a.tar#03": "03.json: a link or special file, which is not followed",
        "a.tar#only": "no image: only .cls",
    }
    # it becomes shorter after the scan
    source = one(tmp_path, tar(scattered(8, "images")), fragment_samples=3)
    fragments = scans(source)[0].fragments
    (tmp_path / "a.tar").write_bytes(tar(scattered(2, "images")))
    again = [sample for fragment in fragments for sample in source.read(fragment)]
    assert [bool(sample.reason) for sample in again] == [False] * 2 + [True] * 6


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("first", ["images", "labels"])
def test_an_inspection_of_scattered_samples(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, first: str, small: bool
) -> None:
    if not small:
        monkeypatch.setattr(sampling, "WHOLE_BYTES", 0)
        monkeypatch.setattr(webdataset, "PREVIEW_BYTES", 4096)
    (tmp_path / "a.tar").write_bytes(tar(scattered(60, first)))
    survey = inspect_source(SourceSettings(uri=f"{tmp_path}/a.tar")).survey
    assert survey.samples == 60 and survey.rejects.count == 0 and survey.balance is not None
    assert survey.balance.per_class == {f"class {number}": 20 for number in range(3)}


def test_which_member_is_the_image(tmp_path: Any) -> None:
    content = tar(
        [
            member
            for number in range(3)
            for member in (
                (f"{number}.png", picture(90 + number)),  # the mask comes first
                (f"{number}.jpg", picture(number)),
                (f"{number}.rgb.webp", picture(30 + number)),
                (f"{number}.cls", b"1"),
            )
        ]
    )
    (scan,) = scans(one(tmp_path, content))
    assert [fragment.error for fragment in scan.fragments] == [
        "several members can be the image: .png, .jpg; set source.image_column"
    ]
    for column, first in (("jpg", 0), (".PNG", 90), ("rgb.webp", 30)):
        found = samples(one(tmp_path, content, image_column=column))
        assert [sample.image for sample in found] == [picture(first + row) for row in range(3)]
    assert rejects(samples(one(tmp_path, content, image_column="webp"))) == {
        f"a.tar#{row}": "no image: no .webp, only .png, .jpg, .rgb.webp, .cls" for row in range(3)
    }
    # if it is clear in other samples, only those in which it is not are rejects
    mixed = tar([("a.png", b"1"), ("b.jpg", b"2"), ("b.png", b"3"), ("c.jpg", b"4")])
    found = samples(one(tmp_path, mixed))
    assert [sample.image for sample in found] == [b"1", None, b"4"]
    assert list(rejects(found)) == ["a.tar#b"]
    (tmp_path / "a.tar").write_bytes(content)
    survey = inspect_source(SourceSettings(uri=f"{tmp_path}/a.tar")).survey
    assert survey.unreadable_files == (("a.tar", scan.fragments[0].error),)


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_images_without_an_extension(tmp_path: Any, name: str) -> None:
    members: list[Member] = [("README", b"about these images"), ("empty", b"")]
    for number in range(5):
        large = picture(number) + bytes(1500)
        members += [(f"./in/{number}", large), (f"in/{number}.cls", b"cat")]
    members += [("both", picture(8)), ("both.jpg", picture(9)), special("link", tarfile.SYMTYPE)]
    content = tar(members)
    content = gzip.compress(content) if name.endswith("gz") else content
    found = samples(one(tmp_path, content, name, fragment_samples=2), lambda name: "3" not in name)
    assert [(sample.sample_id, sample.image, sample.label) for sample in found[:4]] == [
        (f"{name}#in/{number}", picture(number) + bytes(1500), "cat") for number in (0, 1, 2, 4)
    ]
    assert rejects(found) == {
        f"{name}#both": "several members can be the image: one without an extension, .jpg; "
        "set source.image_column",
        f"{name}#link": "link: a link or special file, which is not followed",
    }
    # a tar that is cut off in such a member
    (tmp_path / "cut.tar").write_bytes(tar([("0", picture(0)), ("1", picture(1) * 9)])[:2200])
    cut = samples(make(f"{tmp_path}/cut.tar"))
    assert [bool(sample.reason) for sample in cut] == [False, True]


@pytest.mark.parametrize("name", ["a.tar.gz", "a.TGZ"])
def test_gzip(tmp_path: Any, name: str) -> None:
    source = one(tmp_path, gzip.compress(tar(pairs(20))), name, fragment_samples=7)
    plain = one(tmp_path, tar(pairs(20)), fragment_samples=7)
    assert [sample[1:] for sample in samples(source)] == [sample[1:] for sample in samples(plain)]
    assert {part.offset for part in scans(source)[0].fragments} == {0}


def test_a_cut_tar_loses_one_sample(place: str) -> None:
    whole = tar(
        [
            (f"{number}.{kind}", bytes([65 + number]) * 700)
            for number in range(4)
            for kind in ("png", "txt")
        ]
    )
    member, sample = 512 + 1024, 2 * (512 + 1024)
    for cut in (
        3 * sample + 100,
        3 * sample + 512,
        3 * sample + 900,
        3 * sample + member,
        3 * sample + member + 700,
        4 * sample,
    ):
        storage.write_bytes(f"{place}/a.tar", whole[:cut])
        found = samples(make(f"{place}/a.tar", fragment_samples=2))
        assert [item.image for item in found if not item.reason] == [
            bytes([65 + number]) * 700 for number in range(len(found) - 1)
        ]
        assert len(found) == (3 if cut < 3 * sample + 512 else 4)
        assert "cut off" in found[-1].reason
    storage.write_bytes(
        f"{place}/a.tar", whole[: 4 * sample + 512]
    )  # the first half of the end marker is enough
    assert not rejects(samples(make(f"{place}/a.tar")))


def test_a_cut_gzip_loses_one_sample(tmp_path: Any) -> None:
    whole = gzip.compress(tar(pairs(40)))
    found = samples(one(tmp_path, whole[: len(whole) // 2], "a.tar.gz", fragment_samples=9))
    assert 10 < len(found) < 30 and [bool(sample.reason) for sample in found] == [False] * (
        len(found) - 1
    ) + [True]


@pytest.mark.parametrize("filler", [b"\xff", b"\0"])
def test_a_damaged_header_costs_its_neighbourhood_only(tmp_path: Any, filler: bytes) -> None:
    content = bytearray(tar([(f"{number}.png", bytes([number + 1]) * 700) for number in range(6)]))
    content[3 * 1536 : 3 * 1536 + 512] = filler * 512
    source = one(tmp_path, bytes(content), fragment_samples=2)
    found = samples(source)
    assert [sample.sample_id for sample in found] == [
        "a.tar#0",
        "a.tar#1",
        "a.tar#2",
        "a.tar#4",
        "a.tar#5",
    ]
    assert list(rejects(found)) == ["a.tar#2"] and "damaged" in found[2].reason


def test_a_damaged_first_header_is_a_reject_of_its_own(tmp_path: Any) -> None:
    content = bytearray(tar(pairs(3)))
    content[:512] = b"\xff" * 512
    found = samples(one(tmp_path, bytes(content)))
    assert [sample.sample_id for sample in found] == [
        "a.tar#byte-0",
        "a.tar#0000",
        "a.tar#0001",
        "a.tar#0002",
    ]
    assert list(rejects(found)) == [
        "a.tar#byte-0",
        "a.tar#0000",
    ]  # the damage includes the image of 0000


def test_tars_one_after_the_other_are_all_read(tmp_path: Any) -> None:
    found = samples(one(tmp_path, tar(pairs(3)) + tar(pairs(3, 3)), fragment_samples=2))
    assert len(found) == 6 and not rejects(found)


def test_what_follows_the_end_is_not_damage(tmp_path: Any) -> None:
    assert not rejects(samples(one(tmp_path, tar(pairs(3)) + b"signature of some tool")))


def test_an_endless_name_is_damage(tmp_path: Any) -> None:
    header = special("././@LongLink", tarfile.GNUTYPE_LONGNAME)
    header.size = 1 << 40
    found = samples(
        one(
            tmp_path,
            tar(pairs(2))[: 4 * 1024] + header.tobuf(tarfile.GNU_FORMAT) + tar(pairs(1, 5)),
        )
    )
    assert ids(found) == ["a.tar#0000", "a.tar#0001", "a.tar#0005"] and list(rejects(found)) == [
        "a.tar#0001"
    ]


def test_a_size_beyond_the_end_is_a_cut(tmp_path: Any) -> None:
    header = tarfile.TarInfo("big.png")
    header.size = 1 << 50
    found = samples(one(tmp_path, tar(pairs(1))[:2048] + header.tobuf(tarfile.GNU_FORMAT)))
    assert ids(found) == ["a.tar#0000", "a.tar#big"] and "cut off" in found[1].reason


def test_a_member_that_is_too_large_is_not_loaded(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tarmembers, "MAX_IMAGE_BYTES", 1000)
    found = samples(one(tmp_path, tar([("x.png", b"1" * 1001), ("y.png", b"1" * 1000)])))
    assert rejects(found) == {"a.tar#x": "the image has more than 1000 bytes"}


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"\xff" * 5000])
@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_no_tar_at_all_is_a_broken_file(tmp_path: Any, content: bytes, name: str) -> None:
    (fragment,) = scans(one(tmp_path, content, name))[0].fragments
    assert fragment.samples == 0
    words = {b"": "empty", b"<": "an HTML page instead of the file"}
    expected = words.get(content[:1], "not a tar file")
    assert fragment.error.startswith(expected)


def test_an_empty_tar_has_no_fragments(tmp_path: Any) -> None:
    assert scans(one(tmp_path, tar([])))[0].fragments == ()
    assert (
        scans(one(tmp_path, tar([special("folder", tarfile.DIRTYPE), ("README", b"x")])))[
            0
        ].fragments
        == ()
    )


def test_a_tar_that_changes_after_the_scan(tmp_path: Any) -> None:
    source = one(tmp_path, tar(pairs(10)), fragment_samples=6)
    fragments = scans(source)[0].fragments
    for content in (tar(pairs(2)), b"", b"\0" * 20_000, b"\xff" * 20_000):
        (tmp_path / "a.tar").write_bytes(content)
        for fragment in fragments:
            found = list(source.read(fragment))
            assert len(found) == fragment.samples == len(set(ids(found)))


def test_a_storage_fault_is_not_mistaken_for_damage(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.tar", "a.tar.gz"):
        content = tar([(f"{number}.png", picture(number, 64)) for number in range(30)])
        source = one(tmp_path, gzip.compress(content, 0) if name.endswith("gz") else content, name)
        file = next(source.files())
        (fragment,) = source.scan(file).fragments
        fetch = storage.streams.Ranges._fetch

        def fails(self: Any, length: int, fetch: Any = fetch) -> bytes:
            if self._position > 50_000:
                raise PermissionError("the token has expired")
            return fetch(self, length)

        with monkeypatch.context() as patch:
            patch.setattr(webdataset, "READ_BYTES", 4096)
            patch.setattr(storage.streams.Ranges, "_fetch", fails)
            with pytest.raises(PermissionError, match="expired"):
                source.scan(file)
            with pytest.raises(PermissionError, match="expired"):
                list(source.read(fragment))


def mixed() -> list[Member]:
    members = pairs(6)
    members += [
        special("l.png", tarfile.SYMTYPE, "x"),
        ("n" * 150 + ".png", picture(7)),
        ("j.json", b'{"label": 1}'),
        ("j.png", picture(8)),
    ]
    return members + pairs(2, 2)


FUZZ = [tar(mixed(), format) for format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)]


@settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    which=st.integers(0, len(FUZZ) - 1),
    cut=st.none() | st.floats(0, 1),
    changes=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=40)), max_size=6
    ),
    packed=st.booleans(),
    limit=st.integers(1, 8),
)
def test_damage_gives_rejects_or_a_broken_file(
    tmp_path: Any,
    which: int,
    cut: float | None,
    changes: list[tuple[float, bytes]],
    packed: bool,
    limit: int,
) -> None:
    damaged = bytearray(gzip.compress(FUZZ[which], 1) if packed else FUZZ[which])
    for place, value in changes:
        start = int(place * len(damaged))
        damaged[start : start + len(value)] = value
    if cut is not None:
        del damaged[int(cut * len(damaged)) :]
    found = samples(
        one(tmp_path, bytes(damaged), "a.tar.gz" if packed else "a.tar", fragment_samples=limit),
        lambda name: hash(name) % 2,
    )
    decode_batch(found, 8, 10_000)


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=300), position=st.integers(0, 30))
def test_any_extended_header_can_be_parsed(data: bytes, position: int) -> None:
    content = b"20 path=some/name.p\n"[:position] + data
    assert all(
        isinstance(value, str) for value in tarfiles._extension(tarfile.XHDTYPE, content).values()
    )


@pytest.mark.parametrize(
    ("first", "second", "refused"),
    [
        (["1", "01"], [], "a.tar: label '1' is the same number as '01' in the same file"),
        (["01", "001"], [], "label '01' is the same number as '001' in the same file"),
        (["2", "01"], ["1"], "a.tar: label '01' is the same number as '1' in another file"),
        (["1", "2"], ["2", "01"], "b.tar: label '01' is the same number as '1' in another file"),
        (["01"], ["001"], "b.tar: label '001' is the same number as '01' in a.tar"),
        (["01", "10"], ["02", "10"], ""),
        (["1", "2.0"], ["2", "1"], ""),
    ],
)
def test_two_spellings_of_a_number_are_not_one_class(
    tmp_path: Any, no_ray: None, first: list[str], second: list[str], refused: str
) -> None:
    for name, labels in (("a.tar", first), ("b.tar", second or ["5"])):
        members: list[Member] = []
        for number, label in enumerate(labels):
            members += [(f"{number}.png", picture(number)), (f"{number}.cls", label.encode())]
        storage.write_bytes(f"{tmp_path}/set/{name}", tar(members))
    config = parse_config({"run": f"{tmp_path}/run", "source": {"uri": f"{tmp_path}/set"}})
    if refused:
        with pytest.raises(SourceError, match=re.escape(refused)):
            index(config)
    else:
        index(config)
        record = index(config)  # and from the existing index
        assert record.samples == len(first) + len(second or ["5"])
