"""Helpers for the tests of several sources."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from raypipe.config import SourceSettings
from raypipe.sources import FileScan, IdFilter, RawSample, Source, open_source


def picture(seed: int, size: int = 8) -> bytes:
    """A PNG of random pixels; each seed gives another."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def make(uri: str, **options: Any) -> Source:
    return open_source(SourceSettings(uri=uri, **options))


def scans(source: Source) -> list[FileScan]:
    return [source.scan(file) for file in source.files()]


def samples(source: Source, keep_id: IdFilter | None = None) -> list[RawSample]:
    """All samples that pass `keep_id`; checks the contract of `Source` on the way."""
    result: list[RawSample] = []
    names: set[str] = set()
    for scan in scans(source):
        start = 0
        for fragment in scan.fragments:
            assert fragment.start == start and fragment.samples <= source.settings.fragment_samples
            assert fragment.fragment_id not in names
            names.add(fragment.fragment_id)
            start = fragment.stop
            stored = list(source.read(fragment))
            assert len(stored) == fragment.samples
            for sample in stored:
                assert (sample.image is None) == bool(sample.reason)
                for text in (sample.sample_id, sample.reason, str(sample.label)):
                    text.encode()
            chosen = [sample for sample in stored if keep_id is None or keep_id(sample.sample_id)]
            if keep_id is not None:
                assert list(source.read(fragment, keep_id)) == chosen
            result += chosen
    return result


def ids(samples: list[RawSample]) -> list[str]:
    return [sample.sample_id for sample in samples]


def rejects(samples: list[RawSample]) -> dict[str, str]:
    """Sample id -> reason of the unreadable samples."""
    return {sample.sample_id: sample.reason for sample in samples if sample.reason}
