from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits
from source_helpers import ids, make, samples, scans

from raypipe.errors import SourceError
from raypipe.vision.decode import decode_batch


def test_the_bundled_digits() -> None:
    source = make("digits://", fragment_samples=1000)
    found = samples(source)
    assert len(found) == 1797 and len(set(ids(found))) == 1797
    assert ids(found)[0] == "digits/0000" and ids(found)[-1] == "digits/1796"
    (scan,) = scans(source)
    assert scan.class_names == tuple("0123456789")
    assert np.bincount([sample.label for sample in found]).min() > 170
    images = np.stack([sample.image for sample in found])
    assert (
        images.shape == (1797, 8, 8)
        and images.dtype == np.uint8
        and images.min() == 0
        and images.max() == 255
    )


def test_wanted_digits() -> None:
    source = make("digits://")
    (fragment, _) = scans(source)[0].fragments
    found = list(source.read(fragment, lambda sample_id: sample_id.endswith("7")))
    assert ids(found) == [f"digits/{number:04d}" for number in range(7, 1024, 10)]
    assert np.array_equal(found[1].image, samples(source)[17].image)


def test_digits_are_grey_and_bright_on_dark_when_enlarged() -> None:
    pixels, reasons = decode_batch(samples(make("digits://"))[:50], 32, 100)
    assert not any(reasons) and pixels.shape == (50, 3, 32, 32)
    assert np.array_equal(pixels[:, 0], pixels[:, 1]) and np.array_equal(pixels[:, 0], pixels[:, 2])
    assert (pixels[:, 0, :, 0] < 64).mean() > 0.95 and pixels.max(axis=(1, 2, 3)).min() > 200


def test_another_uri_is_refused() -> None:
    with pytest.raises(SourceError, match="digits://"):
        list(make("/data", format="digits").files())


def test_they_are_those_that_scikit_learn_gives() -> None:
    data = load_digits()
    found = samples(make("digits://"))
    assert [sample.label for sample in found] == data.target.tolist()
    assert np.array_equal(
        np.stack([sample.image for sample in found]), np.rint(data.images * (255 / 16))
    )
