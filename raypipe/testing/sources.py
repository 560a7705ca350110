"""Check a source."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np

from raypipe.config import SourceSettings
from raypipe.config.parts import part_names_accepted
from raypipe.sources import Fragment, RawSample, Source
from raypipe.testing.contract import check_declaration, failures, require

FILES, SMALL_FRAGMENT = 3, 7
"""Files that are read, and the samples of a fragment at the second reading."""


def check_source(part: type[Source], uri: str, **options: Any) -> None:
    """Check a source on data of your own: the first three files.

    Checked are what the class declares, that listing and reading give the same at every call, that
    fragments cover each file without gaps, ids (unique texts, independent of
    `source.fragment_samples`), images and labels, and that `keep_id` filters.

    Parameters
    ----------
    part : type of Source
    uri : str
        `source.uri`.
    **options
        Options by name. Default: those of the part.

    Raises
    ------
    ContractError
        What is broken.
    """
    chosen = check_declaration(part, Source, options).model_dump()
    part.format = "tested"
    with part_names_accepted():
        settings = SourceSettings(uri=uri, format="tested", options={"tested": chosen})
    source = part(settings)
    with failures(part, "files"):
        files = list(islice(source.files(), FILES))
        again = list(islice(part(settings).files(), FILES))
    require(bool(files), part, f"lists no file in {uri}; raise SourceError if there are no files")
    require(files == again, part, "files lists others, or in another order, at a second call")
    small = part(settings.model_copy(update={"fragment_samples": SMALL_FRAGMENT}))
    seen: set[str] = set()
    for file in files:
        whole = _read(part, source, file)
        ids = [sample.sample_id for sample in whole]
        cut = [sample.sample_id for sample in _read(part, small, file)]
        require(ids == cut, part, f"{file.path}: ids depend on source.fragment_samples")
        repeated = {item for item in ids if item in seen or ids.count(item) > 1}
        require(
            not repeated or source.ids_can_repeat,
            part,
            f"{file.path}: the id {min(repeated, default='')!r} occurs twice",
        )
        seen.update(ids)
        for sample in whole:
            _check_sample(part, sample)


def _read(part: type[Source], source: Source, file: Any) -> list[RawSample]:
    """Return all samples of a file; check its fragments."""
    with failures(part, f"scan of {file.path}"):
        fragments: Sequence[Fragment] = source.scan(file).fragments
        again = source.scan(file).fragments
    require(fragments == again, part, f"{file.path}: scan gives other fragments at a second call")
    limit, start = source.settings.fragment_samples, 0
    result: list[RawSample] = []
    for fragment in fragments:
        if fragment.error:
            continue
        where = f"{fragment.path}, samples {fragment.start} to {fragment.stop}"
        require(fragment.start == start, part, f"{where}: the fragment before ends at {start}")
        require(
            fragment.samples <= limit, part, f"{where}: more than source.fragment_samples ({limit})"
        )
        start = fragment.stop
        with failures(part, f"read of {where}"):
            samples = list(source.read(fragment))
            second = list(source.read(dataclasses.replace(fragment)))
        require(
            len(samples) == fragment.samples,
            part,
            f"{where}: read yields {len(samples)} samples",
        )
        ids = [sample.sample_id for sample in samples]
        equal = all(_same(first, other) for first, other in zip(samples, second, strict=False))
        require(
            len(samples) == len(second) and equal,
            part,
            f"{where}: read yields other samples at a second call",
        )
        with failures(part, f"read of {where} with keep_id"):
            kept = [item.sample_id for item in source.read(fragment, set(ids[::2]).__contains__)]
        require(kept == ids[::2], part, f"{where}: read with keep_id yields other samples")
        result += samples
    return result


def _same(first: RawSample, second: RawSample) -> bool:
    if isinstance(first.image, np.ndarray):
        images = np.array_equal(first.image, np.asarray(second.image))
    else:
        images = first.image == second.image
    return images and (first.sample_id, first.label) == (second.sample_id, second.label)


def _check_sample(part: type[Source], sample: RawSample) -> None:
    require(
        isinstance(sample.sample_id, str) and bool(sample.sample_id),
        part,
        f"the id {sample.sample_id!r} is not a text",
    )
    where, image = f"sample {sample.sample_id!r}", sample.image
    if image is None:
        require(bool(sample.reason), part, f"{where} has neither an image nor a reason")
    elif isinstance(image, np.ndarray):
        shaped = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3))
        require(
            image.dtype == np.uint8 and shaped,
            part,
            f"{where}: the image is {image.dtype} {list(image.shape)}; expected uint8 [height, "
            "width] or [height, width, 3] (other arrays need source.transform)",
        )
    else:
        require(isinstance(image, bytes), part, f"{where}: the image is {type(image).__name__}")
    label = sample.label
    require(
        label is None or (isinstance(label, int | str) and not isinstance(label, bool)),
        part,
        f"{where}: the label is {type(label).__name__}; expected int, str or None",
    )
