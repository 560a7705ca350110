"""What the tests of several sources use."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from raypipe.config import SourceSettings
from raypipe.sources import FileScan, RawSample, Source, open_source


def picture(seed: int, size: int = 8) -> bytes:
    """A PNG that is another one for each seed."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def make(uri: str, **options: Any) -> Source:
    return open_source(SourceSettings(uri=uri, **options))


def scans(source: Source) -> list[FileScan]:
    return [source.scan(file) for file in source.files()]


def samples(source: Source, wanted: Any = None) -> list[RawSample]:
    """Every sample of the source, with what every source promises checked on the way."""
    result: list[RawSample] = []
    names: set[str] = set()
    for scan in scans(source):
        start = 0
        for fragment in scan.fragments:
            assert fragment.start == start and fragment.samples <= source.settings.fragment_samples
            assert fragment.fragment_id not in names
            names.add(fragment.fragment_id)
            start = fragment.stop
            found = list(source.read(fragment))
            assert len(found) == fragment.samples
            for sample in found:
                assert (sample.image is None) == bool(sample.reason)
                for words in (sample.sample_id, sample.reason, str(sample.label)):
                    words.encode()
            chosen = [sample for sample in found if wanted is None or wanted(sample.sample_id)]
            if wanted is not None:
                assert list(source.read(fragment, wanted)) == chosen
            result += chosen
    return result


def ids(found: list[RawSample]) -> list[str]:
    return [sample.sample_id for sample in found]


def rejects(found: list[RawSample]) -> dict[str, str]:
    return {sample.sample_id: sample.reason for sample in found if sample.reason}
