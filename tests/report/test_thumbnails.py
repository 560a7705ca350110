from __future__ import annotations

import base64
import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from raypipe.errors import SourceError
from raypipe.report import thumbnails
from raypipe.report.score_scan import Pick
from raypipe.report.thumbnails import load_thumbnails, make_thumbnail
from raypipe.runs.run import Run
from raypipe.sources import RawSample

MakeRun = Callable[..., Run]


def grid(fragments: range, row: int = 1) -> list[Pick]:
    return [Pick(f"part-{number}#{row}", f"f{number:03d}", 0, 0.0) for number in fragments]


def opened(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_images_are_read_from_the_source(make_run: MakeRun, source) -> None:
    run = make_run()
    found = load_thumbnails(run, source.settings, [grid(range(4)), grid(range(2), row=3)])
    assert len(found.images) == 6
    assert sorted(source.reads) == ["f000", "f001", "f002", "f003"]
    assert found.note == ""
    image = found.images["part-1#3"]
    assert image.uri.startswith("data:image/")
    assert image.pixelated
    assert opened(image.uri).size == (8, 8)


def test_large_images_are_made_small_and_are_not_pixelated() -> None:
    image = make_thumbnail(RawSample("a", np.zeros((300, 400, 3), np.uint8), None), 10**6)
    assert opened(image.uri).size == (thumbnails.NORMAL.pixels, thumbnails.NORMAL.pixels)
    assert not image.pixelated


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        (RawSample("a", None, None, "truncated"), "truncated"),
        (RawSample("a", b"no image", None), "not"),
        (RawSample("a", b"", None), "empty"),
    ],
)
def test_an_image_that_cannot_be_shown_has_a_reason(sample: RawSample, reason: str) -> None:
    image = make_thumbnail(sample, 10**6)
    assert image.uri == ""
    assert reason in image.reason


def test_no_more_than_so_many_fragments_are_opened_the_first_of_each_grid_first(
    make_run: MakeRun, source, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(fragments=6)
    monkeypatch.setattr(thumbnails, "MAX_FRAGMENTS", 3)
    found = load_thumbnails(run, source.settings, [grid(range(3)), grid(range(3, 6))])
    assert set(source.reads) == {"f000", "f003", "f001"}
    assert found.note.startswith("3 images are not shown")


def test_a_source_that_is_gone_is_given_up_after_a_few_fragments(make_run: MakeRun, source) -> None:
    run = make_run(fragments=9)
    source.broken = {f"f{number:03d}" for number in range(9)}
    found = load_thumbnails(run, source.settings, [grid(range(9))])
    assert len(source.reads) == thumbnails.PROBES
    assert found.note == "The source cannot be read, so no images are shown: part-2: gone"
    assert not any(image.uri for image in found.images.values())


def test_one_broken_fragment_does_not_hide_the_others(make_run: MakeRun, source) -> None:
    run = make_run()
    source.broken = {"f000", "f002"}
    found = load_thumbnails(run, source.settings, [grid(range(4))])
    assert [bool(found.images[f"part-{number}#1"].uri) for number in range(4)] == [
        False,
        True,
        False,
        True,
    ]
    assert found.images["part-2#1"].reason == "part-2: gone"


def test_a_source_that_cannot_be_opened(
    make_run: MakeRun, source, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()

    def refuse(settings: object) -> None:
        raise SourceError("memory: nothing there")

    monkeypatch.setattr(thumbnails, "open_source", refuse)
    assert load_thumbnails(run, source.settings, [grid(range(4))]).note.endswith("nothing there")


def test_samples_that_left_the_source_are_said_to_have(make_run: MakeRun, source) -> None:
    run = make_run()
    picks = [
        Pick("part-1#1", "f001", 0, 0.0),
        Pick("old#1", "gone", 0, 0.0),
        Pick("part-1#999", "f001", 0, 0.0),
    ]
    found = load_thumbnails(run, source.settings, [picks])
    assert found.images["part-1#1"].uri
    assert (
        found.images["old#1"].reason
        == found.images["part-1#999"].reason
        == "no longer in the source"
    )


def test_nothing_wanted_opens_nothing(make_run: MakeRun, source) -> None:
    assert load_thumbnails(make_run(), source.settings, [[], []]).images == {}
    assert source.reads == []
