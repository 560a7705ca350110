"""Find the image, the label and the id of a sample among the features of an Example."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from raypipe.config import SourceSettings
from raypipe.sources.arrow_images import ImageOrReason, checked_pixels
from raypipe.sources.columns import AUTO, IMAGE_NAMES, LABEL_NAMES
from raypipe.sources.examples import Values
from raypipe.sources.formats import format_of
from raypipe.sources.splits import split_column
from raypipe.sources.values import printable, stored_label

Example = Mapping[str, Values]

IMAGES = ("image/encoded", *IMAGE_NAMES, "image_raw", "image/image_raw")
LABELS = ("image/class/label", *LABEL_NAMES, "image/class/text")
"""Names of features that `auto` looks for, in this order."""
SHAPES = (
    ("image/height", "image/width", ("image/channels", "image/depth")),
    ("height", "width", ("channels", "depth")),
)
"""Names of the features that hold the shape of an image stored as pixels."""


class ExampleFields:
    """The features that the settings name or `auto` finds."""

    def __init__(self, settings: SourceSettings) -> None:
        self._image, self._label = settings.image_column, settings.label_column
        self._id = settings.id_column

    @property
    def ids_are_stored(self) -> bool:
        return self._id is not None

    def id_of(self, example: Example) -> tuple[str | None, str]:
        """Return the stored id and "", or None and the problem."""
        values = example.get(self._id or "", [])
        if len(values) != 1 or isinstance(values[0], float):
            return None, f"no id: {self._id} has {len(values)} values, not one text or whole number"
        return _text(values[0]), ""

    def image_of(self, example: Example) -> ImageOrReason:
        """Return the image and "", or None and the problem."""
        name, reason = self._image_name(example)
        if reason:
            return None, reason
        values = example[name]
        if len(values) != 1 or not isinstance(values[0], bytes):
            return None, f"feature {name!r} holds {_described(values)}, not one image"
        return _pixels_or_bytes(values[0], example)

    def label_of(self, example: Example) -> tuple[int | str | None, str]:
        """Return the label (None: unlabelled) and "", or None and the problem."""
        name = self._label
        if name == AUTO:
            name = next((usual for usual in LABELS if example.get(usual)), None)
        values = example.get(name, []) if name is not None else []
        if len(values) > 1:
            return None, f"label: feature {name!r} has {len(values)} values"
        if not values:
            return None, ""
        value = values[0]
        return stored_label(_text(value) if isinstance(value, bytes) else value)

    def split_of(self, example: Example) -> str:
        """Return the value of the feature that names the split of a sample; "" without one."""
        name = split_column([*example], {self._label, self._id})
        values = example[name] if name is not None else []
        return _text(values[0]) if len(values) == 1 else ""

    def _image_name(self, example: Example) -> tuple[str, str]:
        """Return the name of the feature that holds the image; or "", and why none does."""
        if self._image != AUTO:
            missing = "" if self._image in example else f"no feature {self._image!r}"
            return self._image, missing and f"{missing}; features are {_listed(example)}"
        for name in IMAGES:
            if any(isinstance(value, bytes) for value in example.get(name, [])[:1]):
                return name, ""
        encoded = [name for name, values in example.items() if _is_image(values)]
        if len(encoded) == 1:
            return encoded[0], ""
        problem = "several features hold images" if encoded else "no feature holds an image"
        return "", f"{problem}; features are {_listed(example)}; set source.image_column"


def _is_image(values: Values) -> bool:
    value = values[0] if len(values) == 1 else None
    return isinstance(value, bytes) and format_of(value[:512]) == "imagefolder"


def _pixels_or_bytes(content: bytes, example: Example) -> ImageOrReason:
    """Return encoded bytes, or the pixels of an image that other features state the shape of."""
    for height, width, channels in SHAPES if not _is_image([content]) else ():
        depth = next((name for name in channels if name in example), None)
        sizes = [example.get(name, []) for name in (height, width)]
        sizes += [example[depth]] if depth is not None else []
        shape = [values[0] for values in sizes if len(values) == 1 and isinstance(values[0], int)]
        if len(shape) == len(sizes) and math.prod(shape) == len(content):
            return checked_pixels(np.frombuffer(content, np.uint8).reshape(shape))
    return content, ""


def _text(value: bytes | float) -> str:
    if isinstance(value, bytes):
        return printable(value.decode("utf-8", "surrogateescape"))
    return str(value)


def _described(values: Values) -> str:
    kinds = {bytes: "bytes", float: "fractions", int: "whole numbers"}
    return f"{len(values)} values of {kinds[type(values[0])]}" if values else "no value"


def _listed(example: Example) -> str:
    names = [printable(name) for name in sorted(example)]
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "") if names else "none"
