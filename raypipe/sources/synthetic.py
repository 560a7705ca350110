"""Procedural images, for rehearsals of cost, of scale and of broken samples.

`synthetic://?samples=1000000&classes=100&size=64&seed=0`. A sample is a function of the seed and
its index and of nothing else. There is nothing to list, store or download, and a larger dataset
begins with the same samples as a smaller one.

An image is a coarse pattern of its class, mixed with that of another class and with noise. The
strength of both is the sample's difficulty, which has a long-tailed distribution: a network learns
most samples early, some late and a few never. Everything before the encoding is integer
arithmetic, so the pixels are the same on every machine and with every version of NumPy.
"""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple
from urllib.parse import parse_qsl, urlsplit

import numpy as np
from PIL import Image

from raypipe.config import SourceSettings
from raypipe.errors import SourceError
from raypipe.sources.base import Source
from raypipe.sources.classes import MAX_CLASSES
from raypipe.sources.types import FileScan, Fragment, IdFilter, RawSample, SourceFile

SHARD_SAMPLES = 1 << 17
"""Samples of one shard: what stands for a file, and is divided into fragments in one go."""
GRID, STEPS = 8, 16
"""A pattern has GRID x GRID colour cells, interpolated between centres in steps of 1 / STEPS."""
HEADER_WORDS = 8
"""Random 64-bit numbers of a sample before its noise; see `_traits` for what each decides."""
MAX_SIZE = 1024
LIMITS = {
    "samples": (1, 10**10),
    "classes": (1, MAX_CLASSES),
    "size": (4, MAX_SIZE),
    "seed": (0, 2**63 - 1),
    "label_noise": (0, 1),
    "broken": (0, 1),
}
"""Smallest and largest value of each number in the query."""


@dataclass(frozen=True)
class Recipe:
    """What the query of the URI can set.

    Attributes
    ----------
    samples : int
        Number of samples.
    classes : int
        Number of classes.
    size : int
        Width and height in pixels.
    seed : int
        Another seed gives other patterns and other samples.
    label_noise : float
        Share of samples that have another class's label.
    broken : float
        Share of samples that cannot be decoded.
    encoded : {"none", "jpeg", "png"}
        "none": images are arrays.
    """

    samples: int = 10_000
    classes: int = 10
    size: int = 64
    seed: int = 0
    label_noise: float = 0.0
    broken: float = 0.0
    encoded: str = "none"

    @property
    def image_bytes(self) -> int:
        """Bytes of the pixels of one image."""
        return self.size**2 * 3


class SyntheticSource(Source):
    """Seeded images. Sample ids are "synthetic/<index, ten digits>"."""

    format = "synthetic"

    def __init__(self, settings: SourceSettings) -> None:
        super().__init__(settings)
        self._recipe = parse_recipe(settings.uri)

    def files(self) -> Iterator[SourceFile]:
        recipe = self._recipe
        # without `samples`, so that added samples leave the shards before them unchanged
        stamp = "&".join(
            f"{field.name}={getattr(recipe, field.name)}"
            for field in fields(recipe)
            if field.name != "samples"
        )
        for shard, start in enumerate(range(0, recipe.samples, SHARD_SAMPLES)):
            count = min(SHARD_SAMPLES, recipe.samples - start)
            yield SourceFile(f"shard-{shard:06d}", count * recipe.image_bytes, stamp)

    def scan(self, file: SourceFile) -> FileScan:
        count = file.size // self._recipe.image_bytes
        names = tuple(f"class {index}" for index in range(self._recipe.classes))
        return FileScan(self.cut_fragments(file, count), names)

    def fragment_id(self, file: SourceFile, start: int, stop: int) -> str:
        """Return a name that does not depend on the shard's size.

        Samples added to the last shard therefore leave its full fragments unchanged.
        """
        return super().fragment_id(SourceFile(file.path, 0, file.stamp), start, stop)

    def read(self, fragment: Fragment, keep_id: IdFilter | None = None) -> Iterator[RawSample]:
        first = int(fragment.path.removeprefix("shard-")) * SHARD_SAMPLES
        for index in range(first + fragment.start, first + fragment.stop):
            sample_id = f"synthetic/{index:010d}"
            if keep_id is None or keep_id(sample_id):
                image, label = make_sample(self._recipe, index)
                yield RawSample(sample_id, image, label)


def parse_recipe(uri: str) -> Recipe:
    """Return the recipe that a URI describes.

    Raises
    ------
    SourceError
        If a value is not allowed; the message names it and what is.
    """
    parts = urlsplit(uri)
    if parts.scheme != "synthetic" or parts.netloc or parts.path.strip("/"):
        raise SourceError(f"{uri}: expected synthetic://?samples=10000&classes=10&size=64&seed=0")
    types = {name: type(value) for name, value in vars(Recipe()).items()}
    values: dict[str, int | float | str] = {}
    for name, text in parse_qsl(parts.query, keep_blank_values=True):
        if name not in types:
            raise SourceError(f"{uri}: {name!r} is not one of {', '.join(types)}")
        try:
            values[name] = types[name](text)
        except ValueError:
            kind = "a whole number" if types[name] is int else "a number"
            raise SourceError(f"{uri}: {name} = {text!r} is not {kind}") from None
    recipe = Recipe(**values)  # type: ignore[arg-type]
    for name, (least, most) in LIMITS.items():
        value = getattr(recipe, name)
        if not least <= value <= most:
            raise SourceError(f"{uri}: {name} = {value} is not within {least} to {most}")
    if recipe.encoded not in {"none", "jpeg", "png"}:
        raise SourceError(f"{uri}: encoded = {recipe.encoded!r} is not one of none, jpeg, png")
    return recipe


class _Traits(NamedTuple):
    """What is drawn for a sample before its pixels.

    Attributes
    ----------
    target : int
        Class of the pattern.
    label : int
        The sample's label: `target`, or another class if the label is wrong.
    other : int
        Class of the pattern that is mixed in.
    difficulty : int
        0..255, mostly low.
    dx, dy : int
        Shift of the pattern in cells.
    damage : int
        0, or the kind of damage: 1 no bytes, 2 not an image, 3 cut off.
    """

    target: int
    label: int
    other: int
    difficulty: int
    dx: int
    dy: int
    damage: int


def make_sample(recipe: Recipe, index: int) -> tuple[np.ndarray | bytes, int]:
    """Return image (uint8 [size, size, 3], or encoded bytes) and label of one sample."""
    words = _random_words(recipe, index)
    traits = _traits(recipe, words[:HEADER_WORDS].tolist())
    if traits.damage == 1:
        return b"", traits.label
    if traits.damage == 2:
        return f"sample {index} is not an image".encode(), traits.label
    noise = words[HEADER_WORDS:].view(np.uint8)[: recipe.image_bytes]
    pixels = _pixels(recipe, traits, noise)
    if recipe.encoded == "none" and not traits.damage:
        return pixels, traits.label
    content = _encode(pixels, recipe.encoded)
    return (content[: len(content) // 2] if traits.damage else content), traits.label


def _random_words(recipe: Recipe, index: int) -> np.ndarray:
    """Random numbers of a sample: HEADER_WORDS, then a byte for every value of the image.

    Little-endian uint64. NumPy keeps the raw output of a bit generator stable across versions,
    but not its distributions.
    """
    key = hashlib.blake2b(f"{recipe.seed}/{index}".encode(), digest_size=16).digest()
    count = HEADER_WORDS + -(-recipe.image_bytes // 8)
    generator = np.random.PCG64(int.from_bytes(key, "little"))
    return generator.random_raw(count).astype("<u8", copy=False)


def _traits(recipe: Recipe, words: list[int]) -> _Traits:
    """Traits from the HEADER_WORDS random numbers of a sample."""
    pick_target, pick_other, difficulty, shift, is_wrong, pick_label, is_broken, pick_damage = words
    classes = recipe.classes
    target = pick_target % classes
    other = (target + 1 + pick_other % (classes - 1)) % classes if classes > 1 else 0
    wrong = classes > 1 and is_wrong < recipe.label_noise * 2**64
    label = (target + 1 + pick_label % (classes - 1)) % classes if wrong else target
    uniform = difficulty & 255
    damage = 1 + pick_damage % 3 if is_broken < recipe.broken * 2**64 else 0
    return _Traits(
        target,
        label,
        other,
        difficulty=uniform * uniform >> 8,
        dx=shift % 3 - 1,
        dy=(shift >> 8) % 3 - 1,
        damage=damage,
    )


def _pixels(recipe: Recipe, traits: _Traits, noise: np.ndarray) -> np.ndarray:
    """Return uint8 [size, size, 3].

    The other class has at most half the weight, and at difficulty 255 the noise is +-64.
    """
    weight = traits.difficulty >> 1
    mixed = (
        _pattern(recipe.seed, traits.target) * (256 - weight)
        + _pattern(recipe.seed, traits.other) * weight
    )
    cells = np.roll(mixed >> 8, (traits.dy, traits.dx), (0, 1)).astype(np.float32)
    up = _interpolation(recipe.size)  # float32 is exact here: whole numbers below 2^24
    rows = (up @ cells.reshape(GRID, GRID * 3)).reshape(recipe.size, GRID, 3)
    smooth = np.matmul(up, rows).astype(np.int32) // STEPS**2
    amplitude = 16 + (traits.difficulty * 48 >> 8)
    shifted = (noise.reshape(smooth.shape).astype(np.int32) - 128) * amplitude >> 7
    return np.clip(smooth + shifted, 0, 255).astype(np.uint8)


@functools.lru_cache(maxsize=100_000)
def _pattern(seed: int, label: int) -> np.ndarray:
    """Colours of a class, int32 [GRID, GRID, 3] within 0..255."""
    content = hashlib.shake_128(f"{seed}/class {label}".encode()).digest(GRID * GRID * 3)
    return np.frombuffer(content, np.uint8).reshape(GRID, GRID, 3).astype(np.int32)


@functools.cache
def _interpolation(size: int) -> np.ndarray:
    """Weights of the GRID cells at each of `size` positions, float32 [size, GRID].

    They are whole numbers and sum to STEPS at each position.
    """
    result = np.zeros((size, GRID), np.float32)
    for position in range(size):
        offset = max(0, (2 * position + 1) * GRID * STEPS // (2 * size) - STEPS // 2)
        cell, part = min(offset // STEPS, GRID - 1), offset % STEPS
        result[position, cell] += STEPS - part
        result[position, min(cell + 1, GRID - 1)] += part
    return result


def _encode(pixels: np.ndarray, encoding: str) -> bytes:
    buffer = io.BytesIO()
    if encoding == "png":
        Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    else:
        Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
