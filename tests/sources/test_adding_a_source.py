"""The example in the docstring of `Source` works as printed."""

from __future__ import annotations

import doctest
import io
import zipfile
from typing import Any

import numpy as np
from source_helpers import ids, rejects, samples, scans

from raypipe import storage
from raypipe.config import SourceSettings
from raypipe.sources import FileScan, RawSample, Source, SourceFile
from raypipe.sources.location import Location


def example() -> type[Source]:
    """The class that the example defines."""
    (code,) = (part.source for part in doctest.DocTestParser().get_examples(Source.__doc__ or ""))
    names: dict[str, Any] = {
        "FileScan": FileScan,
        "Location": Location,
        "RawSample": RawSample,
        "Source": Source,
        "SourceFile": SourceFile,
        "io": io,
        "np": np,
        "storage": storage,
        "zipfile": zipfile,
    }
    exec(code, names)
    return names["NpzSource"]


def test_the_documented_example_is_a_complete_source(place: str) -> None:
    images = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 3), np.uint8)
    content = io.BytesIO()
    np.savez(content, images=images, labels=np.arange(7) % 3)
    storage.write_bytes(f"{place}/set/a.npz", content.getvalue())
    storage.write_bytes(f"{place}/set/b.npz", content.getvalue()[:100])
    source = example()(SourceSettings(uri=f"{place}/set", fragment_samples=3))
    found = samples(source)
    assert ids(found) == [f"a.npz#{row}" for row in range(7)] and not rejects(found)
    assert [sample.label for sample in found] == [0, 1, 2, 0, 1, 2, 0]
    assert np.array_equal([sample.image for sample in found], images)
    whole, cut_off = scans(source)
    chosen = [
        sample
        for part in whole.fragments
        for sample in source.read(part, lambda sample_id: sample_id[-1] in "25")
    ]
    assert ids(chosen) == ["a.npz#2", "a.npz#5"]
    assert [part.samples for part in whole.fragments] == [3, 3, 1] and whole.labels == {0, 1, 2}
    assert cut_off.fragments[0].error and not cut_off.fragments[0].samples
