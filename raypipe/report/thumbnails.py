"""The images of some samples, read from the source again and made small."""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from raypipe.config import SourceSettings
from raypipe.errors import RaypipeError
from raypipe.report.score_scan import Pick
from raypipe.runs.layout import Run
from raypipe.sources import Fragment, RawSample, Source, open_source

SIZE, SMALL = 96, 64
"""Pixels of a thumbnail, and of one in the grids of a class; smaller images stay as they are."""
QUALITY, SMALL_QUALITY = 88, 80
PIXELATED = 48
"""Images of at most so many pixels a side are shown with their pixels."""
MOST_FRAGMENTS = 64
"""Fragments read at most: one may be hundreds of megabytes."""
THREADS, PROBES = 4, 3


@dataclass(frozen=True)
class Thumbnail:
    """`uri` is a data: URI; empty when there is no image, for the `reason` given."""

    uri: str = ""
    pixelated: bool = False
    reason: str = ""


@dataclass
class Thumbnails:
    """Images by sample_id; `note` says in a sentence what is missing, if anything is."""

    images: dict[str, Thumbnail] = field(default_factory=dict)
    note: str = ""


def load_thumbnails(
    run: Run, settings: SourceSettings, grids: Sequence[Sequence[Pick]], small: Sequence[Pick] = ()
) -> Thumbnails:
    """Images for grids of samples, the first of each grid first, from at most MOST_FRAGMENTS fragments. Raises nothing.

    small  samples of which smaller images will do, from whatever fragments they are in
    """
    wanted: dict[str, set[str]] = defaultdict(set)
    left_out = 0
    for rank in range(max(map(len, grids), default=0)):
        for pick in (grid[rank] for grid in grids if rank < len(grid)):
            if pick.fragment not in wanted and len(wanted) == MOST_FRAGMENTS:
                left_out += 1
                continue
            wanted[pick.fragment].add(pick.sample_id)
    result = Thumbnails()
    if left_out:
        result.note = f"{left_out} images are not shown: no more than {MOST_FRAGMENTS} fragments are opened for the report."
    large = {sample_id for ids in wanted.values() for sample_id in ids}
    for pick in small:
        wanted[pick.fragment].add(pick.sample_id)
    if not wanted:
        return result
    try:
        source = open_source(settings)
        fragments = {fragment.fragment_id: fragment for fragment in run.fragments()}
    except (RaypipeError, OSError) as error:
        result.note = f"The source cannot be opened, so no images are shown: {_line(error)}"
        return result

    def load(item: tuple[str, set[str]]) -> tuple[dict[str, Thumbnail], str]:
        return _fragment_images(run, source, fragments.get(item[0]), item[1], large)

    todo = list(wanted.items())
    # a source that is gone costs a minute of retries for each fragment: find out with the first few
    for item in todo[:PROBES]:
        images, reason = load(item)
        result.images |= images
        if not reason:
            break
    else:
        result.note = f"The source cannot be read, so no images are shown: {reason}"
        return result
    with ThreadPoolExecutor(THREADS, thread_name_prefix="raypipe-images") as pool:
        for images, _ in pool.map(
            load, [item for item in todo if not item[1] <= result.images.keys()]
        ):
            result.images |= images
    return result


def _fragment_images(
    run: Run, source: Source, fragment: Fragment | None, ids: set[str], large: set[str]
) -> tuple[dict[str, Thumbnail], str]:
    """A thumbnail, or the reason why there is none, for every id; and why the fragment as a whole could not be read.

    large  ids whose images are not made smaller than SIZE
    """
    images = {sample_id: Thumbnail(reason="not in the source any more") for sample_id in ids}
    if fragment is None:
        return images, ""
    try:
        for sample in source.read(run.with_members(fragment), ids.__contains__):
            if sample.sample_id in ids:
                images[sample.sample_id] = make_thumbnail(
                    sample, source.settings.max_pixels, sample.sample_id not in large
                )
    except Exception as error:  # whatever ails a source, the report of the run must still be made
        failed = Thumbnail(reason=_line(error))
        return {
            sample_id: image if image.uri else failed for sample_id, image in images.items()
        }, failed.reason
    return images, ""


def make_thumbnail(sample: RawSample, max_pixels: int, small: bool = False) -> Thumbnail:
    """Decode one sample to at most SIZE pixels square, or SMALL."""
    from raypipe.vision.decode import BadImage, decode, encode_thumbnail

    if sample.image is None:
        return Thumbnail(reason=sample.reason or "no image")
    native = _native_size(sample)
    try:
        size, quality = (SMALL, SMALL_QUALITY) if small else (SIZE, QUALITY)
        data = encode_thumbnail(decode(sample.image, min(native, size), max_pixels), quality)
    except BadImage as error:
        return Thumbnail(reason=_line(error))
    kind = (
        "png" if data.startswith(b"\x89PNG") else "jpeg" if data.startswith(b"\xff\xd8") else "webp"
    )
    return Thumbnail(
        f"data:image/{kind};base64,{base64.b64encode(data).decode()}", pixelated=native <= PIXELATED
    )


def _native_size(sample: RawSample) -> int:
    """The shorter side in pixels; SIZE where the header cannot be read."""
    from PIL import Image

    if not isinstance(sample.image, bytes):
        return min(sample.image.shape[:2]) if sample.image is not None else SIZE
    try:
        with Image.open(io.BytesIO(sample.image)) as image:
            return min(image.size)
    except Exception:  # decoding says what is wrong with it
        return SIZE


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
