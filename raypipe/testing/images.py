"""Check functions of `source.transform` and `proxy.augment`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from raypipe.errors import RaypipeError
from raypipe.testing.contract import ContractError, Unchanged, failures, require, twice
from raypipe.vision.own_code import Augmentation, Transform

SIDE = 24


def check_transform(
    function: Callable[[Any], np.ndarray], image: Any, channels: int | None = None
) -> None:
    """Check a function of `source.transform` on an image of your own.

    Checked are shape and type of the pixels, that the same image gives the same pixels, and that
    the image stays unchanged.

    Parameters
    ----------
    function : callable
    image : PIL.Image.Image, np.ndarray or bytes
        As the source yields it.
    channels : int, optional
        `proxy.channels`. Default: any number.

    Raises
    ------
    ContractError
        What is broken.
    """
    transform = Transform(getattr(function, "__name__", "transform"), function)
    before = np.array(image) if not isinstance(image, bytes) else None
    with failures(function, "the transform"):
        try:
            twice(function, lambda: transform(image, channels), "pixels")
        except RaypipeError as error:
            raise ContractError(str(error).removeprefix("source.transform: ")) from None
    if before is not None:
        same = np.array_equal(before, np.array(image))
        require(same, function, "changes its input; work on a copy")


def check_augment(
    function: Callable[[np.ndarray, np.random.Generator], np.ndarray], channels: int = 3
) -> None:
    """Check a function of `proxy.augment`.

    Checked are shape and type of the pixels, that the same image and generator give the same
    pixels, that nothing else is drawn from, and that the image stays unchanged.

    Parameters
    ----------
    function : callable
    channels : int
        `proxy.channels`.

    Raises
    ------
    ContractError
        What is broken.
    """
    image = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, channels), np.uint8)
    unchanged = Unchanged(function, {"image": image})

    def augmented(pixels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        return function(image, generator)

    augmentation = Augmentation(getattr(function, "__name__", "augment"), augmented)
    batch = image.transpose(2, 0, 1)[None]
    with failures(function, "the augmentation"):
        try:
            augmentation(batch, [7], 0, 1)
            unchanged.check()
            twice(function, lambda: augmentation(batch, [7], 0, 1), "pixels")
        except RaypipeError as error:
            raise ContractError(str(error).removeprefix("proxy.augment: ")) from None
