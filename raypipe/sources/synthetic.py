"""Procedural images of any number and any number of classes, for rehearsals: of cost, of scale, of what broken samples do.

`synthetic://?samples=1000000&classes=100&size=64&seed=0`. A sample is a function of the seed and its index and of nothing else,
so there is nothing to list, to store or to download, and more samples leave those before them as they are.

An image is a coarse pattern of its class, mixed with that of another class and with noise; how much of both is the sample's
difficulty, drawn with a long tail: a network learns most samples soon, some late and a few never.
Everything before the encoding is arithmetic on integers: the pixels are the same on every machine and under every version of NumPy.
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
from raypipe.sources.base import (
    MOST_CLASSES,
    FileScan,
    Fragment,
    IdFilter,
    RawSample,
    Source,
    SourceFile,
)

SHARD_SAMPLES = 1 << 17
"""Samples of one shard: what stands for a file, and is cut into fragments in one go."""
GRID, PARTS = 8, 16
"""A pattern has GRID x GRID cells of colour; between their centres it is interpolated in steps of 1 / PARTS."""
WORDS = 8
"""Random 64-bit numbers that decide on a sample before its noise: class, other class, difficulty, shift, wrong label, damage."""
LARGEST_SIZE = 1024


@dataclass(frozen=True)
class Recipe:
    """What the query of the URI can set.

    samples      how many there are
    classes      how many classes
    size         pixels, square
    seed         another seed gives other patterns and other samples
    label_noise  share of samples that have another class's label
    broken       share of samples that cannot be decoded
    encoded      none (arrays), jpeg or png
    """

    samples: int = 10_000
    classes: int = 10
    size: int = 64
    seed: int = 0
    label_noise: float = 0.0
    broken: float = 0.0
    encoded: str = "none"


class SyntheticSource(Source):
    """Seeded images. Sample ids are "synthetic/<index, ten digits>"."""

    format = "synthetic"

    def __init__(self, settings: SourceSettings) -> None:
        super().__init__(settings)
        self._recipe = parse_recipe(settings.uri)

    def files(self) -> Iterator[SourceFile]:
        recipe = self._recipe
        stamp = "&".join(
            f"{field.name}={getattr(recipe, field.name)}"
            for field in fields(recipe)
            if field.name != "samples"
        )
        for shard, start in enumerate(range(0, recipe.samples, SHARD_SAMPLES)):
            count = min(SHARD_SAMPLES, recipe.samples - start)
            yield SourceFile(f"shard-{shard:06d}", count * recipe.size**2 * 3, stamp)

    def scan(self, file: SourceFile) -> FileScan:
        count = file.size // (self._recipe.size**2 * 3)
        return FileScan(
            self.cut(file, count), tuple(f"class {index}" for index in range(self._recipe.classes))
        )

    def fragment_id(self, file: SourceFile, start: int, stop: int) -> str:
        """As of any file, but without the shard's size: samples added to the last shard change none of its whole fragments."""
        return super().fragment_id(SourceFile(file.path, 0, file.stamp), start, stop)

    def read(self, fragment: Fragment, wanted: IdFilter | None = None) -> Iterator[RawSample]:
        first = int(fragment.path.removeprefix("shard-")) * SHARD_SAMPLES
        for index in range(first + fragment.start, first + fragment.stop):
            sample_id = f"synthetic/{index:010d}"
            if wanted is None or wanted(sample_id):
                image, label = make_sample(self._recipe, index)
                yield RawSample(sample_id, image, label)


def parse_recipe(uri: str) -> Recipe:
    """The recipe that a URI describes. Raises SourceError, naming the setting and what is allowed."""
    parts = urlsplit(uri)
    if parts.scheme != "synthetic" or parts.netloc or parts.path.strip("/"):
        raise SourceError(f"{uri}: expected synthetic://?samples=10000&classes=10&size=64&seed=0")
    known = {name: type(value) for name, value in vars(Recipe()).items()}
    values: dict[str, int | float | str] = {}
    for name, text in parse_qsl(parts.query, keep_blank_values=True):
        if name not in known:
            raise SourceError(f"{uri}: {name!r} is not one of {', '.join(known)}")
        try:
            values[name] = known[name](text)
        except ValueError:
            kind = "a whole number" if known[name] is int else "a number"
            raise SourceError(f"{uri}: {name} = {text!r} is not {kind}") from None
    recipe = Recipe(**values)  # type: ignore[arg-type]
    for name, least, most in (
        ("samples", 1, 10**10),
        ("classes", 1, MOST_CLASSES),
        ("size", 4, LARGEST_SIZE),
        ("seed", 0, 2**63 - 1),
        ("label_noise", 0, 1),
        ("broken", 0, 1),
    ):
        if not least <= getattr(recipe, name) <= most:
            raise SourceError(
                f"{uri}: {name} = {getattr(recipe, name)} is not within {least} to {most}"
            )
    if recipe.encoded not in {"none", "jpeg", "png"}:
        raise SourceError(f"{uri}: encoded = {recipe.encoded!r} is not one of none, jpeg, png")
    return recipe


class Draw(NamedTuple):
    """What is drawn of a sample before its pixels.

    target      class of the pattern
    label       the label it has: `target`, or another class where the label is wrong
    other       class of the pattern that is mixed in
    difficulty  0..255, mostly low
    dx, dy      shift of the pattern in cells
    damage      0, or which kind of damage: 1 nothing there, 2 no image, 3 cut off
    """

    target: int
    label: int
    other: int
    difficulty: int
    dx: int
    dy: int
    damage: int


def make_sample(recipe: Recipe, index: int) -> tuple[np.ndarray | bytes, int]:
    """Image (uint8 [size, size, 3], or encoded bytes) and label of one sample."""
    words = _words(recipe, index)
    draw = _draw(recipe, words[:WORDS].tolist())
    if draw.damage == 1:
        return b"", draw.label
    if draw.damage == 2:
        return f"sample {index} is not an image".encode(), draw.label
    pixels = _pixels(recipe, draw, words[WORDS:].view(np.uint8)[: recipe.size**2 * 3])
    if recipe.encoded == "none" and not draw.damage:
        return pixels, draw.label
    content = _encode(pixels, recipe.encoded)
    return (content[: len(content) // 2] if draw.damage else content), draw.label


def _words(recipe: Recipe, index: int) -> np.ndarray:
    """Random numbers of a sample, little-endian uint64: those that decide, then a byte for every value of the image.

    The output of the bit generator for a seed is what NumPy keeps the same over versions; its distributions are not.
    """
    key = hashlib.blake2b(f"{recipe.seed}/{index}".encode(), digest_size=16).digest()
    count = WORDS + -(-(recipe.size**2 * 3) // 8)
    return (
        np.random.PCG64(int.from_bytes(key, "little")).random_raw(count).astype("<u8", copy=False)
    )


def _draw(recipe: Recipe, words: list[int]) -> Draw:
    classes = recipe.classes
    target = words[0] % classes
    other = (target + 1 + words[1] % (classes - 1)) % classes if classes > 1 else 0
    wrong = classes > 1 and words[4] < recipe.label_noise * 2**64
    label = (target + 1 + words[5] % (classes - 1)) % classes if wrong else target
    even = words[2] & 255
    damage = 1 + words[7] % 3 if words[6] < recipe.broken * 2**64 else 0
    return Draw(
        target, label, other, even * even >> 8, words[3] % 3 - 1, (words[3] >> 8) % 3 - 1, damage
    )


def _pixels(recipe: Recipe, draw: Draw, noise: np.ndarray) -> np.ndarray:
    """uint8 [size, size, 3]. The other class has at most half the weight, and at difficulty 255 the noise is +-64."""
    weight = draw.difficulty >> 1
    mixed = (
        _pattern(recipe.seed, draw.target) * (256 - weight)
        + _pattern(recipe.seed, draw.other) * weight
    )
    cells = np.roll(mixed >> 8, (draw.dy, draw.dx), (0, 1)).astype(np.float32)
    up = _interpolation(recipe.size)  # float32 is exact here: whole numbers below 2^24
    rows = (up @ cells.reshape(GRID, GRID * 3)).reshape(recipe.size, GRID, 3)
    smooth = np.matmul(up, rows).astype(np.int32) // PARTS**2
    amplitude = 16 + (draw.difficulty * 48 >> 8)
    shifted = (noise.reshape(smooth.shape).astype(np.int32) - 128) * amplitude >> 7
    return np.clip(smooth + shifted, 0, 255).astype(np.uint8)


@functools.lru_cache(maxsize=100_000)
def _pattern(seed: int, label: int) -> np.ndarray:
    """Colours of a class, int32 [GRID, GRID, 3] within 0..255."""
    content = hashlib.shake_128(f"{seed}/class {label}".encode()).digest(GRID * GRID * 3)
    return np.frombuffer(content, np.uint8).reshape(GRID, GRID, 3).astype(np.int32)


@functools.cache
def _interpolation(size: int) -> np.ndarray:
    """Weights of GRID cells at each of `size` positions, float32 [size, GRID], whole numbers that sum to PARTS."""
    result = np.zeros((size, GRID), np.float32)
    for position in range(size):
        place = max(0, (2 * position + 1) * GRID * PARTS // (2 * size) - PARTS // 2)
        cell, part = min(place // PARTS, GRID - 1), place % PARTS
        result[position, cell] += PARTS - part
        result[position, min(cell + 1, GRID - 1)] += part
    return result


def _encode(pixels: np.ndarray, encoding: str) -> bytes:
    buffer = io.BytesIO()
    if encoding == "png":
        Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    else:
        Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
