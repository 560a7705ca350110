"""The bundled set: 1,797 handwritten digits of 8x8 pixels, as scikit-learn carries them. Needs no storage."""

from __future__ import annotations

import functools
import gzip
import importlib.util
import os
from collections import Counter
from collections.abc import Iterator

import numpy as np

from raypipe.errors import SourceError
from raypipe.sources.base import FileScan, Fragment, IdFilter, RawSample, Source, SourceFile


class DigitsSource(Source):
    """Optical Recognition of Handwritten Digits (E. Alpaydin, C. Kaynak, 1998; test part). Ids are digits/0000 to digits/1796."""

    format = "digits"
    scan_reads = "nothing"
    reads_singly = True

    def files(self) -> Iterator[SourceFile]:
        if not self.settings.uri.startswith("digits:"):
            raise SourceError(
                f"{self.settings.uri}: format digits is the bundled set; set source.uri to digits://"
            )
        images, _ = _digits()
        yield SourceFile("digits", images.nbytes, "1")

    def scan(self, file: SourceFile) -> FileScan:
        images, labels = _digits()
        return FileScan(
            self.cut(file, len(images)),
            tuple(str(digit) for digit in range(10)),
            frozenset(labels.tolist()),
        )

    def listed_labels(self, file: SourceFile) -> Counter[int | str | None] | None:
        return Counter(_digits()[1].tolist())

    def read(self, fragment: Fragment, wanted: IdFilter | None = None) -> Iterator[RawSample]:
        images, labels = _digits()
        for position in range(fragment.start, fragment.stop):
            sample_id = f"digits/{position:04d}"
            if wanted is None or wanted(sample_id):
                yield RawSample(sample_id, images[position], int(labels[position]))


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [1797, 8, 8] (16 grey levels spread over 0..255) and labels int [1797]."""
    # from its file: all of scikit-learn takes more than a second to import
    found = importlib.util.find_spec("sklearn")
    if found is None or not found.submodule_search_locations:
        raise SourceError("digits:// is in scikit-learn, which is not installed")
    path = os.path.join(found.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")
    if not os.path.exists(path):
        raise SourceError(
            f"digits:// is not where scikit-learn had it: {path}; install a version that constraints.txt names"
        )
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, np.int64, delimiter=",")
    return np.rint(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8), table[:, -1]
