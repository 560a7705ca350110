"""Inspections of sources with known content: exact for small ones, estimated for large ones."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import UNREADABLE, digit_pngs
from PIL import Image

from raypipe import storage
from raypipe.config import SourceSettings
from raypipe.estimate import Survey, inspect_source, sampling
from raypipe.estimate.facts import upper_bound
from raypipe.estimate.inspect_text import describe_survey, size_classes
from raypipe.sources import open_source


def _survey(uri: Path | str, samples: int = 256, **options: object) -> Survey:
    return inspect_source(
        SourceSettings.model_validate({"uri": str(uri), **options}), samples=samples
    ).survey


def picture(seed: int, size: int = 8) -> bytes:
    """Return a PNG that differs for each seed."""
    buffer = io.BytesIO()
    Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    ).save(buffer, "PNG")
    return buffer.getvalue()


def _tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inspect sources as if they were large."""
    monkeypatch.setattr(sampling, "WHOLE_BYTES", 0)


@pytest.fixture(scope="module")
def sorted_tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 tars of 50 samples, sorted by class: the first half is class a, the last tenth class c."""
    folder = tmp_path_factory.mktemp("tars")
    images = [picture(seed, 24) for seed in range(50)]
    for number in range(40):
        label = "a" if number < 20 else "b" if number < 36 else "c"
        members = [
            (f"{row:03d}.{kind}", content)
            for row, image in enumerate(images)
            for kind, content in (("png", image), ("cls", label.encode()))
        ]
        _tar(folder / f"{number:04d}.tar", members)
    return folder


def test_a_small_source_is_counted_exactly(tmp_path: Path) -> None:
    images, labels = digit_pngs(120)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = tmp_path / "in" / f"class-{label}" / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    for name, content in UNREADABLE.items():
        (tmp_path / "in" / name).write_bytes(content)
    (tmp_path / "in" / "class-0" / "again.png").write_bytes(images[0])
    buffer = io.BytesIO()
    Image.new("CMYK", (60, 20)).save(buffer, "JPEG")
    (tmp_path / "in" / "class-9" / "wide.jpg").write_bytes(buffer.getvalue())
    found = _survey(tmp_path / "in")
    expected = Counter(f"class-{label}" for label in labels) + Counter(
        name.split("/")[0] for name in [*UNREADABLE, "class-0/", "class-9/"]
    )
    assert found.balance is not None and found.pictures is not None
    assert (found.files, found.samples, found.counted) == (125, 125, True)
    assert found.balance.exact and found.balance.per_class == dict(expected)
    assert found.balance.fewer_than_10 == sum(count < 10 for count in expected.values())
    assert {name for name, _ in found.rejects.first} == set(UNREADABLE)
    assert (found.rejects.drawn, found.rejects.count, found.rejects.upper_bound) == (
        125,
        3,
        3 / 125,
    )
    assert found.duplicates == 1
    assert (found.pictures.smallest, found.pictures.median, found.pictures.largest) == (
        (8, 8),
        (8, 8),
        (60, 20),
    )
    assert found.pictures.formats == {"PNG": 121 / 122, "JPEG": 1 / 122}
    assert found.pictures.modes == {"greyscale": 121 / 122, "CMYK": 1 / 122}
    json.dumps(found.as_dict(), allow_nan=False)


@pytest.mark.usefixtures("never_whole")
def test_large_tars_are_looked_at_all_over_not_only_at_their_start(sorted_tars: Path) -> None:
    found = _survey(sorted_tars, samples=64)
    assert not found.counted and 1700 < found.samples < 2300
    assert found.balance is not None and not found.balance.exact
    sizes = found.balance.per_class
    assert set(sizes) == {"a", "b", "c"} and 700 < sizes["a"] < 1300 and 80 < sizes["c"] < 500
    assert (
        20 <= found.rejects.drawn <= 64 and not found.rejects.count
    )  # where reading began is no damage
    assert 0.04 < found.rejects.upper_bound < 0.15
    assert not found.duplicates or found.duplicates < found.rejects.drawn


@pytest.mark.usefixtures("never_whole")
def test_the_same_seed_draws_the_same_samples(sorted_tars: Path) -> None:
    settings = SourceSettings(uri=str(sorted_tars))
    draws = [
        [item.sample.sample_id for item in inspect_source(settings, samples=40, seed=seed).drawn]
        for seed in (0, 0, 1)
    ]
    assert draws[0] == draws[1] and set(draws[0]) != set(draws[2])
    assert len(set(draws[0])) == len(draws[0])


@pytest.mark.usefixtures("never_whole")
def test_of_a_large_tar_little_is_read(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = picture(0, 8) + bytes(100_000)  # Pillow does not mind what follows a PNG
    _tar(
        tmp_path / "t",
        [
            (f"{row:04d}.{kind}", image if kind == "png" else b"3")
            for row in range(160)
            for kind in ("cls", "png")
        ],
    )
    storage.write_bytes(f"{place}/in/large.tar", (tmp_path / "t").read_bytes())
    read = [0]
    fetch = storage.streams.Ranges._fetch

    def counting(self: storage.streams.Ranges, length: int) -> bytes:
        read[0] += length
        return fetch(self, length)

    monkeypatch.setattr(storage.streams.Ranges, "_fetch", counting)
    found = _survey(f"{place}/in", samples=8)
    assert found.bytes > 15 << 20 and read[0] < 5 << 20
    assert 150 < found.samples < 170
    assert found.rejects.drawn == 8 and not found.rejects.count


@pytest.mark.usefixtures("never_whole")
def test_damage_inside_a_large_tar_is_told(tmp_path: Path) -> None:
    for number in range(10):
        image = picture(number, 16) if number % 2 else b"no image"
        _tar(
            tmp_path / f"{number}.tar",
            [
                (f"{row:03d}.{kind}", image if kind == "png" else b"0")
                for row in range(100)
                for kind in ("png", "cls")
            ],
        )
    (tmp_path / "other.tar").write_bytes(b"no tar at all" * 20_000)
    (tmp_path / "empty.tar").write_bytes(b"")
    found = _survey(tmp_path, samples=100)
    assert 0.3 < found.rejects.share < 0.7 < found.rejects.upper_bound + 0.2
    assert [name for name, _ in found.unreadable_files] == ["other.tar"]
    assert found.empty_files == 1
    assert list(found.rejects.reasons) == ["not a readable JPEG, PNG, WebP, GIF, BMP or TIFF image"]


def test_labels_of_parquet_are_counted_from_their_column_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = [0] * 1500 + [1] * 450 + [2] * 45 + [None] * 5
    for part in range(4):
        rows = labels[part::4]
        pq.write_table(
            pa.table({"image": [picture(0)] * len(rows), "label": rows}),
            tmp_path / f"{part}.parquet",
            row_group_size=25,
        )
    exact = _survey(tmp_path)
    assert "columns     images from image, labels from label" in describe_survey(exact)
    assert exact.balance is not None and exact.balance.exact
    assert (
        exact.balance.per_class == {"0": 1500, "1": 450, "2": 45}
        and exact.balance.unlabelled == 5 / 2000
    )
    monkeypatch.setattr(sampling, "WHOLE_BYTES", 0)
    sampled = _survey(tmp_path, samples=64)
    assert sampled.balance is not None and not sampled.balance.exact
    assert sampled.samples == 2000 and sampled.counted  # footers state that
    assert sampled.balance.counted == 4 * 8 * 25
    assert 1200 < sampled.balance.per_class["0"] < 1800
    assert sampled.duplicates == sampled.rejects.drawn - 1


def test_few_labels_of_many_classes_are_not_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "WHOLE_BYTES", 0)
    for part in range(3):
        members = [
            (f"{row:03d}.{kind}", picture(0, 32) if kind == "png" else f"{row}".encode())
            for row in range(200)
            for kind in ("png", "cls")
        ]
        _tar(tmp_path / f"{part}.tar", members)
    found = _survey(tmp_path, samples=12)
    assert found.balance is not None and found.balance.fewer_than_10 is None
    assert "too few to judge" in "\n".join(describe_survey(found))


@pytest.mark.parametrize("whole_bytes", [0, 1 << 30])
@pytest.mark.parametrize("kind", ["tars", "tables"])
def test_samples_looked_at_are_those_a_run_reads(
    request: pytest.FixtureRequest,
    kind: str,
    whole_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(sampling, "WHOLE_BYTES", whole_bytes)
    if kind == "tables":
        for part in range(4):
            images = [None if row % 7 == 0 else picture(100 * part + row) for row in range(50)]
            labels = [float("nan") if row % 5 == 0 else row % 3 for row in range(50)]
            ids = [f"{part}-{row}" for row in range(50)]
            pq.write_table(
                pa.table({"image": images, "label": labels, "id": ids}),
                tmp_path / f"{part}.parquet",
                row_group_size=9,
            )
        settings = SourceSettings(uri=str(tmp_path), id_column="id")
    else:
        settings = SourceSettings(
            uri=str(request.getfixturevalue("sorted_tars")), include="000[0-3].tar"
        )
    source = open_source(settings)
    drawn = {
        item.sample.sample_id: item.sample for item in inspect_source(settings, samples=30).drawn
    }
    assert 20 <= len(drawn) <= 30
    for file in source.files():
        for fragment in source.scan(file).fragments:
            for sample in source.read(fragment):
                if sample.sample_id in drawn:
                    assert sample == drawn.pop(sample.sample_id)
    assert not drawn


@pytest.mark.parametrize(("count", "drawn"), [(0, 256), (3, 60), (255, 256)])
def test_the_upper_bound_is_that_of_clopper_and_pearson(count: int, drawn: int) -> None:
    from scipy.stats import beta

    assert upper_bound(count, drawn) == pytest.approx(
        beta.ppf(0.95, count + 1, drawn - count), rel=1e-9
    )
    assert upper_bound(drawn, drawn) == 1


@pytest.mark.parametrize(
    "sizes", [[1300] * 900 + [732, 1000, 1299], [0, 0, 5, 80, 4000], [7] * 30, [1, 2, 3]]
)
def test_ranges_of_class_sizes_hold_every_class_once(sizes: list[int]) -> None:
    ranges = size_classes(sizes)
    assert sum(count for _, _, count in ranges) == len(sizes)
    assert all(low <= high for low, high, _ in ranges) and len(ranges) <= 15
    assert [low for low, _, _ in ranges] == sorted((low for low, _, _ in ranges), reverse=True)


def test_bytes_that_a_listing_does_not_say_are_estimated_from_those_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raypipe.sources.imagefolder import ImageFolderSource

    image = picture(0)
    for number in range(30):
        (tmp_path / f"{number}.png").write_bytes(image)
    assert _survey(tmp_path).bytes == 30 * len(image)
    listed = ImageFolderSource.files
    monkeypatch.setattr(
        ImageFolderSource, "files", lambda self: [replace(file, size=7) for file in listed(self)]
    )
    assert _survey(tmp_path).bytes == 30 * len(image)


def test_a_shard_that_a_pattern_names_and_that_is_not_there_is_told(place: str) -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for extension, data in (("png", digit_pngs(1)[0][0]), ("cls", b"0")):
            member = tarfile.TarInfo(f"one.{extension}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    storage.write_bytes(f"{place}/a-0.tar", content.getvalue())
    found = inspect_source(SourceSettings(uri=f"{place}/a-{{0..1}}.tar")).survey
    assert found.samples == 1 and found.unreadable_files == (
        ("a-1.tar", "no such file, although source.uri names it"),
    )


@pytest.mark.parametrize("sort", [False, True])
def test_an_imbalance_of_the_opened_files_is_none_of_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sort: bool
) -> None:
    """Of many small tars some are opened; their classes differ as chance, or their order, has it."""
    monkeypatch.setattr(sampling, "WHOLE_BYTES", 0)
    for part in range(8):
        classes = [part % 2] * 60 if sort else [(part + row) * 7 % 11 % 2 for row in range(60)]
        members = [
            (f"{row:03d}.{kind}", picture(0, 32) if kind == "png" else f"{label}".encode())
            for row, label in enumerate(classes)
            for kind in ("png", "cls")
        ]
        _tar(tmp_path / f"{part}.tar", members)
    balance = _survey(tmp_path, samples=32).balance
    assert balance is not None and not balance.exact
    assert balance.even and balance.margin is not None
    # sorted files tell much less about the others
    assert balance.margin > 100 if sort else balance.margin < 100
