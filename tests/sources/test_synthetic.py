from __future__ import annotations

import hashlib

import numpy as np
import pytest
from source_helpers import ids, make, samples, scans

import raypipe
from raypipe.errors import SourceError
from raypipe.sources.synthetic import SHARD_SAMPLES, make_sample, parse_recipe
from raypipe.vision.decode import decode_batch


def test_every_sample_is_a_function_of_seed_and_index() -> None:
    source = make("synthetic://?samples=300&classes=7&size=16&seed=3", fragment_samples=128)
    assert source.format == "synthetic"
    found = samples(source)
    assert ids(found) == [f"synthetic/{index:010d}" for index in range(300)]
    assert all(
        sample.image.shape == (16, 16, 3) and sample.image.dtype == np.uint8 for sample in found
    )
    assert {sample.label for sample in found} == set(range(7))
    assert scans(source)[0].class_names == tuple(f"class {index}" for index in range(7))
    recipe = parse_recipe("synthetic://?classes=7&size=16&seed=3")
    for index in (299, 0):
        image, label = make_sample(recipe, index)
        assert np.array_equal(image, found[index].image) and label == found[index].label
    others = samples(make("synthetic://?samples=300&classes=7&size=16&seed=4"))
    assert not any(
        np.array_equal(one.image, other.image) for one, other in zip(found, others, strict=True)
    )


def test_the_pixels_are_the_same_everywhere() -> None:
    recipe = parse_recipe("synthetic://")
    content = b"".join(make_sample(recipe, index)[0].tobytes() for index in range(5))
    assert hashlib.sha256(content).hexdigest()[:16] == "d36881f5650da8f7"
    assert [make_sample(recipe, index)[1] for index in range(5)] == [8, 1, 3, 7, 2]


def test_more_samples_leave_the_fragments_before_them_as_they_are() -> None:
    def fragments(count: int) -> list[str]:
        found = [
            scan.fragments
            for scan in scans(make(f"synthetic://?samples={count}", fragment_samples=1000))
        ]
        return [fragment.fragment_id for part in found for fragment in part]

    few, many = fragments(SHARD_SAMPLES + 2500), fragments(2 * SHARD_SAMPLES)
    assert few[:-1] == many[: len(few) - 1] and few[-1] not in many
    assert len(set(many)) == len(many)


def test_a_hundred_million_samples_cost_a_few_hundred_lines_to_list() -> None:
    source = make("synthetic://?samples=100000000&classes=1000")
    files = list(source.files())
    assert len(files) == 763
    last = source.scan(files[-1]).fragments
    assert (len(files) - 1) * SHARD_SAMPLES + last[-1].stop == 100_000_000
    (sample,) = source.read(last[-1], lambda sample_id: sample_id == "synthetic/0099999999")
    assert sample.image.shape == (64, 64, 3)


def test_the_classes_can_be_told_apart_and_not_all_samples_alike() -> None:
    found = samples(make("synthetic://?samples=1500&classes=10&size=8"))
    images = np.stack([sample.image for sample in found]).reshape(1500, -1).astype(np.float64)
    labels = np.array([sample.label for sample in found])
    centres = np.stack([images[:1000][labels[:1000] == label].mean(0) for label in range(10)])
    nearest = np.linalg.norm(images[1000:, None] - centres, axis=2).argmin(1)
    assert 0.5 < (nearest == labels[1000:]).mean() < 0.99


def test_wrong_labels_and_broken_samples_have_their_share() -> None:
    noisy = parse_recipe("synthetic://?size=4&classes=5&label_noise=0.2")
    clean = parse_recipe("synthetic://?size=4&classes=5")
    labels = np.array(
        [[make_sample(recipe, index)[1] for index in range(2000)] for recipe in (noisy, clean)]
    )
    assert 0.17 < (labels[0] != labels[1]).mean() < 0.23
    assert set(labels[0]) == set(range(5))
    found = samples(make("synthetic://?samples=1000&size=64&broken=0.1"))
    _, reasons = decode_batch(found, 32, 10_000)
    bad = [reason for reason in reasons if reason]
    assert 70 < len(bad) < 130
    assert {reason.split(":")[0] for reason in bad} >= {
        "empty",
        "not a readable JPEG, PNG, WebP, GIF, BMP or TIFF image",
    }
    assert any("truncated" in reason for reason in bad)


@pytest.mark.parametrize("encoding", ["jpeg", "png"])
def test_encoded_samples_have_the_same_pixels(encoding: str) -> None:
    plain = samples(make("synthetic://?samples=20&size=32"))
    encoded = samples(make(f"synthetic://?samples=20&size=32&encoded={encoding}"))
    assert all(isinstance(sample.image, bytes) for sample in encoded)
    pixels, reasons = decode_batch(encoded, 32, 10_000)
    expected, _ = decode_batch(plain, 32, 10_000)
    assert not any(reasons)
    if encoding == "png":
        assert np.array_equal(pixels, expected)
    else:
        assert np.corrcoef(pixels.ravel(), expected.ravel())[0, 1] > 0.8


def test_one_class_and_sizes_that_do_not_fit_the_grid() -> None:
    for size in (5, 13, 30):
        image, label = make_sample(
            parse_recipe(f"synthetic://?classes=1&size={size}&label_noise=1"), 0
        )
        assert image.shape == (size, size, 3) and label == 0


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("synthetic://?sample=5", "'sample' is not one of samples, classes, size"),
        ("synthetic://?samples=many", "samples = 'many' is not a whole number"),
        ("synthetic://?samples=0", "samples = 0 is not within 1"),
        ("synthetic://?broken=nan", "broken = nan is not within 0 to 1"),
        ("synthetic://?size=5000", "size = 5000 is not within 4 to 1024"),
        ("synthetic://?encoded=gif", "not one of none, jpeg, png"),
        ("synthetic://imagenet", "expected synthetic://"),
    ],
)
def test_a_wrong_recipe_is_refused(uri: str, words: str) -> None:
    with pytest.raises(SourceError, match=words):
        make(uri)


def test_inspect_shows_it() -> None:
    found = raypipe.inspect("synthetic://?samples=5000&classes=3&size=8&broken=0.5")
    assert (found.samples, found.format, found.class_names) == (
        5000,
        "synthetic",
        ("class 0", "class 1", "class 2"),
    )
    assert found.rejects.count > 80 and found.rejects.first[0][0].startswith("synthetic/")
