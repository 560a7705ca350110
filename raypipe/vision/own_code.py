"""Functions of the user's own for pixels: `source.transform` and `proxy.augment`.

What raises is a defect of the image. What returns something else than pixels is a defect of the
function, which ends the run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raypipe.config import ProxySettings, SourceSettings
from raypipe.errors import ConfigError
from raypipe.plugins import allows_code, failure, load


@dataclass(frozen=True)
class Transform:
    """A function that turns an image, as it is stored, into pixels.

    Attributes
    ----------
    name : str
        The value of `source.transform`.
    function : callable
        Takes a PIL image, an array as the source yields it, or bytes that Pillow cannot open.
        Returns uint8 [height, width] or [height, width, channels].
    """

    name: str
    function: Callable[[Any], Any]

    def __call__(self, image: Any, channels: int | None) -> np.ndarray:
        """Return pixels, uint8 [height, width] or [height, width, channels].

        With `channels` None, there can be any number of them.

        Raises
        ------
        ConfigError
            If the function returns anything else.
        """
        pixels = self.function(image)
        problem = _problem(pixels)
        if not problem and not _fits(pixels, channels):
            problem = f"shape {list(pixels.shape)}"
        if problem:
            grey = "[height, width] or " if channels in (None, 1, 3) else ""
            raise ConfigError(
                f"source.transform: {self.name} returned {problem}; expected uint8 {grey}[height, "
                f"width, {channels or 'channels'}] (proxy.channels)"
            )
        return pixels


def _fits(pixels: np.ndarray, channels: int | None) -> bool:
    """Return whether pixels have a number of channels; one is repeated where there are three."""
    if pixels.ndim not in (2, 3):
        return False
    found = 1 if pixels.ndim == 2 else pixels.shape[2]
    return channels is None or found == channels or (found, channels) == (1, 3)


@dataclass(frozen=True)
class Augmentation:
    """A function that changes an image at random in each epoch of a training.

    Attributes
    ----------
    name : str
        The value of `proxy.augment`.
    function : callable
        Takes uint8 [height, width, channels] and a `numpy.random.Generator`. Returns the same
        shape and type.
    """

    name: str
    function: Callable[[np.ndarray, np.random.Generator], Any]

    def __call__(
        self, images: np.ndarray, keys: Sequence[int] | np.ndarray, seed: int, epoch: int
    ) -> np.ndarray:
        """Return augmented images, uint8 [n, channels, size, size].

        Parameters
        ----------
        images : np.ndarray
            uint8 [n, channels, size, size].
        keys : sequence of int
            A hash of the id of each image. With `seed` and `epoch` it determines the random draws.
        seed, epoch : int

        Raises
        ------
        ConfigError
            If the function fails, or returns another shape or type.
        """
        result = np.empty_like(images)
        for row, key in enumerate(keys):
            image = np.ascontiguousarray(images[row].transpose(1, 2, 0))
            generator = np.random.default_rng([seed, epoch, int(key)])
            try:
                pixels = self.function(image, generator)
            except Exception as error:
                raise ConfigError(
                    f"proxy.augment: {self.name} failed ({failure(error)})"
                ) from error
            problem = _problem(pixels)
            if not problem and pixels.shape != image.shape:
                problem = f"shape {list(pixels.shape)}"
            if problem:
                raise ConfigError(
                    f"proxy.augment: {self.name} returned {problem}; expected uint8 "
                    f"{list(image.shape)}"
                )
            result[row] = pixels.transpose(2, 0, 1)
        return result


def _problem(pixels: Any) -> str:
    """Return what pixels are instead of an array of uint8; "" if they are one."""
    if not isinstance(pixels, np.ndarray):
        return type(pixels).__name__
    if pixels.dtype != np.uint8:
        nan = pixels.dtype.kind == "f" and bool(np.isnan(pixels).any())
        return f"{pixels.dtype}{' with NaN' if nan else ''}"
    return f"shape {list(pixels.shape)}" if pixels.size == 0 else ""


def transform_of(settings: SourceSettings) -> Transform | None:
    """Return `source.transform`; None without one. Raises ConfigError if it cannot be imported."""
    name = settings.transform
    return None if name is None else Transform(name, load(name, "source.transform"))


def transform_to_show(settings: SourceSettings) -> Transform | None:
    """Return `source.transform` for images that people see; None where it must not be imported."""
    return transform_of(settings) if allows_code() else None


def augmentation_of(settings: ProxySettings) -> Augmentation | None:
    """Return `proxy.augment`; None without one. Raises ConfigError if it cannot be imported."""
    name = settings.augment
    return None if name is None else Augmentation(name, load(name, "proxy.augment"))


def displayed(pixels: np.ndarray) -> np.ndarray:
    """Return an image, uint8 [channels, height, width], as red, green and blue, for people.

    One channel is grey; of more than three, the first three are shown.
    """
    if len(pixels) >= 3:
        return pixels[:3]
    return np.stack([pixels[0], pixels[-1], pixels[0]])
