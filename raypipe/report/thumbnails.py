"""Small images of some samples, read from the source again."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

from raypipe.config import SourceSettings
from raypipe.errors import RaypipeError
from raypipe.report.score_scan import Pick
from raypipe.runs.run import Run
from raypipe.sources import Fragment, RawSample, Source, open_source
from raypipe.text import error_text
from raypipe.vision.own_code import Transform, displayed, transform_to_show

PIXELATED = 48
"""Images of at most this many pixels a side are shown with visible pixels."""
MAX_FRAGMENTS = 64
"""Fragments that are read at most: one can have hundreds of megabytes."""
THREADS = 4
PROBES = 3
"""Fragments that are tried before the source counts as gone."""


class Size(NamedTuple):
    """Pixels a side of a thumbnail, and its quality; smaller images keep their size."""

    pixels: int
    quality: int


NORMAL = Size(96, 88)
SMALL = Size(64, 80)
"""In the grids of a class."""


@dataclass(frozen=True)
class Thumbnail:
    """An image as a data: URI; without an image it is empty, and `reason` tells why."""

    uri: str = ""
    pixelated: bool = False
    reason: str = ""


@dataclass
class Thumbnails:
    """Images by sample id, and a sentence about what is missing, if anything is."""

    images: dict[str, Thumbnail] = field(default_factory=dict)
    note: str = ""


def load_thumbnails(
    run: Run, settings: SourceSettings, grids: Sequence[Sequence[Pick]], small: Sequence[Pick] = ()
) -> Thumbnails:
    """Return images for grids of samples; raise nothing.

    Parameters
    ----------
    run
        The run that has the index of the source.
    settings
        The source.
    grids
        Samples of at most MAX_FRAGMENTS fragments get an image, the first of each grid first.
    small
        Samples for which smaller images suffice, whatever fragments they are in.
    """
    request = _Request()
    for pick in _interleaved(grids):
        request.add(pick)
    result = Thumbnails(note=request.note())
    request.add_small(small)
    if not request.ids:
        return result
    try:
        source, transform = open_source(settings), transform_to_show(settings)
        fragments = {fragment.fragment_id: fragment for fragment in run.fragments()}
    except (RaypipeError, OSError) as error:
        result.note = f"The source cannot be opened, so no images are shown: {error_text(error)}"
        return result

    def load(fragment_id: str) -> FragmentImages:
        return fragment_images(
            run, source, transform, fragments.get(fragment_id), request.sizes(fragment_id)
        )

    result.note += untransformed(settings, transform)
    # a source that is gone costs a minute of retries a fragment: the first few tell whether it is
    for fragment_id in list(request.ids)[:PROBES]:
        loaded = load(fragment_id)
        result.images |= loaded.images
        if not loaded.error:
            break
    else:
        result.note = f"The source cannot be read, so no images are shown: {loaded.error}"
        return result
    rest = [name for name, ids in request.ids.items() if not ids <= result.images.keys()]
    with ThreadPoolExecutor(THREADS, thread_name_prefix="raypipe-images") as pool:
        for loaded in pool.map(load, rest):
            result.images |= loaded.images
    return result


class _Request:
    """Ids of the samples to read, by fragment."""

    def __init__(self) -> None:
        self.ids: dict[str, set[str]] = {}
        self._large: set[str] = set()
        self._left_out = 0

    def add(self, pick: Pick) -> None:
        """Add a sample, unless its fragment would be one too many."""
        if pick.fragment not in self.ids and len(self.ids) == MAX_FRAGMENTS:
            self._left_out += 1
            return
        self.ids.setdefault(pick.fragment, set()).add(pick.sample_id)
        self._large.add(pick.sample_id)

    def add_small(self, picks: Sequence[Pick]) -> None:
        for pick in picks:
            self.ids.setdefault(pick.fragment, set()).add(pick.sample_id)

    def sizes(self, fragment_id: str) -> dict[str, Size]:
        """Return the size of each image of a fragment."""
        return {
            sample_id: NORMAL if sample_id in self._large else SMALL
            for sample_id in self.ids[fragment_id]
        }

    def note(self) -> str:
        if not self._left_out:
            return ""
        return (
            f"{self._left_out} images are not shown: the report opens at most {MAX_FRAGMENTS} "
            "fragments."
        )


def _interleaved(grids: Sequence[Sequence[Pick]]) -> Iterator[Pick]:
    """Yield the first of each grid, then the second of each, and so on."""
    for rank in range(max(map(len, grids), default=0)):
        for grid in grids:
            if rank < len(grid):
                yield grid[rank]


@dataclass(frozen=True)
class FragmentImages:
    """Thumbnails by sample id; `error` tells why the fragment as a whole could not be read."""

    images: dict[str, Thumbnail]
    error: str = ""


def fragment_images(
    run: Run,
    source: Source,
    transform: Transform | None,
    fragment: Fragment | None,
    sizes: Mapping[str, Size],
) -> FragmentImages:
    """Return a thumbnail, or why it cannot be made, for every id of `sizes`."""
    images = {sample_id: Thumbnail(reason="no longer in the source") for sample_id in sizes}
    if fragment is None:
        return FragmentImages(images)
    try:
        for sample in source.read(run.with_members(fragment), sizes.__contains__):
            if sample.sample_id in sizes:
                images[sample.sample_id] = make_thumbnail(
                    sample,
                    source.settings.max_pixels,
                    source.settings.bit_depth,
                    sizes[sample.sample_id],
                    transform,
                )
    except Exception as error:  # whatever is wrong with a source, the report must be written
        failed = Thumbnail(reason=error_text(error))
        return FragmentImages(
            {sample_id: image if image.uri else failed for sample_id, image in images.items()},
            failed.reason,
        )
    return FragmentImages(images)


def untransformed(settings: SourceSettings, transform: Transform | None) -> str:
    """Return a sentence if images are shown without `source.transform`, else ""."""
    if settings.transform is None or transform is not None:
        return ""
    return (
        f" Images are shown without source.transform {settings.transform}, which is imported "
        "only with --allow-code."
    )


def make_thumbnail(
    sample: RawSample,
    max_pixels: int,
    bit_depth: int = 16,
    size: Size = NORMAL,
    transform: Transform | None = None,
) -> Thumbnail:
    """Decode a sample to a square of at most `size.pixels` a side."""
    from raypipe.vision.decode import BadImage, decode, encode_thumbnail

    if sample.image is None:
        return Thumbnail(reason=sample.reason or "no image")
    native = _native_size(sample)
    try:
        pixels = decode(
            sample.image, min(native, size.pixels), max_pixels, bit_depth, transform, None
        )
        data = encode_thumbnail(displayed(pixels), size.quality)
    except BadImage as error:
        return Thumbnail(reason=error_text(error))
    uri = f"data:image/{_format(data)};base64,{base64.b64encode(data).decode()}"
    return Thumbnail(uri, pixelated=native <= PIXELATED)


def _format(data: bytes) -> str:
    if data.startswith(b"\x89PNG"):
        return "png"
    return "jpeg" if data.startswith(b"\xff\xd8") else "webp"


def _native_size(sample: RawSample) -> int:
    """Return the shorter side in pixels; NORMAL.pixels if the header cannot be read."""
    from raypipe.vision.decode import open_image

    if not isinstance(sample.image, bytes):
        return min(sample.image.shape[:2]) if sample.image is not None else NORMAL.pixels
    try:
        with open_image(sample.image) as image:
            return min(image.size)
    except Exception:  # decoding reports what is wrong with it
        return NORMAL.pixels
