"""The bundled dataset: 1,797 handwritten digits of 8x8 pixels from scikit-learn.

Needs no storage.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
import os
from collections import Counter
from collections.abc import Iterator

import numpy as np

from raypipe.errors import SourceError
from raypipe.sources.base import Source
from raypipe.sources.types import FileScan, Fragment, IdFilter, RawSample, SourceFile


class DigitsSource(Source):
    """Optical Recognition of Handwritten Digits (E. Alpaydin, C. Kaynak, 1998; test part).

    Sample ids are digits/0000 to digits/1796.
    """

    format = "digits"
    scan_reads = "nothing"
    random_access = True

    def files(self) -> Iterator[SourceFile]:
        if not self.settings.uri.startswith("digits:"):
            raise SourceError(
                f"{self.settings.uri}: format digits is the bundled dataset; set source.uri to "
                "digits://"
            )
        images, _ = read_digits()
        yield SourceFile("digits", images.nbytes, "1")

    def scan(self, file: SourceFile) -> FileScan:
        images, labels = read_digits()
        names = tuple(str(digit) for digit in range(10))
        fragments = self.cut_fragments(file, len(images))
        return FileScan(fragments, names, frozenset(labels.tolist()))

    def listed_labels(self, file: SourceFile) -> Counter[int | str | None] | None:
        return Counter(read_digits()[1].tolist())

    def read(self, fragment: Fragment, keep_id: IdFilter | None = None) -> Iterator[RawSample]:
        images, labels = read_digits()
        for position in range(fragment.start, fragment.stop):
            sample_id = f"digits/{position:04d}"
            if keep_id is None or keep_id(sample_id):
                yield RawSample(sample_id, images[position], int(labels[position]))


@functools.cache
def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return images and labels.

    Returns
    -------
    images : ndarray of uint8 [1797, 8, 8]
        16 grey levels, scaled to 0..255.
    labels : ndarray of int [1797]
    """
    # Read from scikit-learn's data file, since importing scikit-learn takes more than a second.
    package = importlib.util.find_spec("sklearn")
    if package is None or not package.submodule_search_locations:
        raise SourceError(
            "digits:// is part of scikit-learn, which is not installed; pip install scikit-learn"
        )
    folder = package.submodule_search_locations[0]
    path = os.path.join(folder, "datasets", "data", "digits.csv.gz")
    if not os.path.exists(path):
        raise SourceError(
            f"digits:// is not in {path}, where scikit-learn used to have it; install a version "
            "named in constraints.txt"
        )
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, np.int64, delimiter=",")
    return np.rint(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8), table[:, -1]
