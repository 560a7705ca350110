"""The image and the label among the members of a sample in a tar.

The image is the member with the extension `image_column` (`auto`: the only one with an image's
extension). The label is `.cls`; else the field `label_column` of `.json` (`auto`: the first with a
usual name, if any); else `.txt`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from raypipe.config import SourceSettings
from raypipe.sources.columns import AUTO, LABEL_NAMES
from raypipe.sources.formats import IMAGE_EXTENSIONS
from raypipe.sources.splits import SPLIT_COLUMN, split_column
from raypipe.sources.tarfiles import Group
from raypipe.sources.types import RawSample
from raypipe.sources.values import number_or_name, padded_spelling, printable, stored_label
from raypipe.text import error_text

MAX_LABEL_BYTES, MAX_IMAGE_BYTES = 1 << 20, 1 << 30
"""A larger member is a reject."""
SEVERAL_IMAGES = "several members can be the image"

_LABELS = ("cls", "json", "txt")
_IMAGES = frozenset(extension.removeprefix(".") for extension in IMAGE_EXTENSIONS)


class Members:
    """Finds the image and the label of a sample.

    Parameters
    ----------
    settings : SourceSettings
        `image_column` and `label_column` are used.
    """

    def __init__(self, settings: SourceSettings) -> None:
        self._image_column, self._label_column = settings.image_column, settings.label_column

    def sample(self, sample_id: str, group: Group, is_repeated: bool) -> RawSample:
        """Return a sample, with a reason if it has no image or an invalid label."""
        label, label_reason = self.label_of(group)
        extension, no_image = self.image_of(group)
        image = group.contents.get(extension) if extension is not None else None
        reason = group.reason
        if not reason and is_repeated:
            reason = "duplicate key: an earlier sample of the tar has it too"
        if not reason and extension is None:
            reason = no_image
        if not reason and image is None:
            reason = f"the image has more than {MAX_IMAGE_BYTES} bytes"
        reason = printable(reason or label_reason)
        return RawSample(sample_id, None if reason else image, label, reason)

    @property
    def has_labels(self) -> bool:
        """Whether labels are read at all."""
        return self._label_column is not None

    def is_image(self, extension: str) -> bool:
        """Return whether a member with this extension can be the image of its sample."""
        column = self._image_column
        if column != AUTO:
            return extension == _extension(column)
        return extension in _IMAGES or not extension  # without one, the content is an image

    def image_of(self, group: Group) -> tuple[str | None, str]:
        """Return the image's extension; or None, and the reason why the group has no image."""
        images = list(filter(self.is_image, group.names))
        if len(images) == 1:
            return images[0], ""
        if images:
            return None, f"{SEVERAL_IMAGES}: {_listed(images)}; set source.image_column"
        column = self._image_column
        missing = "" if column == AUTO else f"no .{_extension(column)}, "
        likely = [name for name in group.names if name.rpartition(".")[2] in _IMAGES]
        remedy = f"; set source.image_column to {likely[0]}" if column == AUTO and likely else ""
        return None, f"no image: {missing}only {_listed(group.names)}{remedy}"

    def load_image(self, key: str, extension: str, size: int) -> bool:
        """Load images only; see `LoadMember`."""
        return self.is_image(extension) and size <= MAX_IMAGE_BYTES

    def label_if_valid(self, group: Group) -> list[int | str | None]:
        """Return [label] of a group, [None] if it has no label, [] if the label is invalid."""
        label, reason = self.label_of(group)
        return [] if reason else [label]

    def label_of(self, group: Group) -> tuple[int | str | None, str]:
        """Return the label of a group, or why it is invalid."""
        if self._label_column is None:
            return None, ""
        for extension in _LABELS:
            if extension not in group.names:
                continue
            content = group.contents.get(extension)
            if content is None:
                return None, f"label: .{extension} has more than {MAX_LABEL_BYTES} bytes"
            try:
                decoded = content.decode("utf-8")
                value: Any = json.loads(decoded) if extension == "json" else number_or_name(decoded)
            except (ValueError, RecursionError) as error:
                return None, f"label: .{extension} cannot be read: {error_text(error, 200)}"
            if extension == "json":
                if not isinstance(value, dict):
                    return None, f"label: .json holds no fields but {type(value).__name__}"
                name = self._label_field(value)
                if name is None:
                    continue  # the .json describes something else
                value = value.get(name)
            return stored_label(value)
        return None, ""

    def split_of(self, group: Group) -> str:
        """Return the field of a .json that names the split of a sample; "" without one."""
        content = group.contents.get("json", b"")
        if SPLIT_COLUMN.encode() not in content.lower():
            return ""
        try:
            fields = json.loads(content)
        except (ValueError, RecursionError):
            return ""
        name = split_column([*fields], {self._label_column}) if isinstance(fields, dict) else None
        return str(fields[name]) if name is not None else ""

    def padded_label(self, group: Group) -> str:
        """Return a label that is text and an unusual spelling of a number, or ""."""
        for extension in _LABELS:
            if extension in group.names and extension != "json":  # a .json says text or number
                content = group.contents.get(extension) or b""
                return padded_spelling(content.decode("utf-8", "replace"))
        return ""

    def _label_field(self, fields: dict[str, Any]) -> str | None:
        """Return the label field of a .json: for `auto`, the first with a usual name, or None."""
        name = self._label_column
        if name != AUTO:
            return name
        return next((usual for usual in LABEL_NAMES if usual in fields), None)


class TarFacts:
    """The labels of a tar, and whether it is clear which members are the images."""

    def __init__(self, members: Members) -> None:
        self.labels: set[int | str] = set()
        self.splits: set[str] = set()
        self._spellings: dict[int, set[str]] = {}
        self._members, self._any_image, self._ambiguous = members, False, ""
        self._first: Group | None = None

    def add(self, group: Group) -> None:
        """Add a sample."""
        label, _ = self._members.label_of(group)
        self.labels |= {label} - {None}  # type: ignore[arg-type]
        if isinstance(label, int):
            spelling = self._members.padded_label(group) or str(label)
            self._spellings.setdefault(label, set()).add(spelling)
        self.splits.add(self._members.split_of(group))
        image, reason = self._members.image_of(group)
        self._any_image |= image is not None
        self._first = self._first or group
        if reason.startswith(SEVERAL_IMAGES):
            self._ambiguous = self._ambiguous or reason

    @property
    def padded(self) -> frozenset[str]:
        """All spellings of the numbers that have an unusual one; see `FileScan.padded`."""
        return frozenset().union(
            *(
                spellings
                for number, spellings in self._spellings.items()
                if spellings != {str(number)}
            )
        )

    @property
    def problem(self) -> str:
        """Why no sample has an image although members can be or hold images; "" otherwise."""
        if self._any_image or self._first is None:
            return ""
        if "tar" in self._first.names:
            return (
                f"a tar of tars, such as {self._first.names['tar']}; unpack it and set source.uri "
                "to the folder of these"
            )
        return self._ambiguous


class Apart:
    """Whether groups in some places of a tar have images without labels, and the reverse."""

    def __init__(self, members: Members) -> None:
        self.images = self.labels = False
        self._members, self._ignored = members, not members.has_labels

    def add(self, groups: Sequence[Group]) -> None:
        """Add the groups of a place."""
        for group in groups:
            has_image = any(map(self._members.is_image, group.names))
            has_label = any(extension in _LABELS for extension in group.names)
            self.images |= has_image and not has_label and not self._ignored
            self.labels |= has_label and not has_image


def _extension(column: str) -> str:
    """Return `source.image_column` as `Group.names` has extensions."""
    return column.lower().removeprefix(".")


def _listed(extensions: Iterable[str]) -> str:
    named = (f".{name}" if name else "one without an extension" for name in extensions)
    return ", ".join(islice(named, 5))


def load_label(key: str, extension: str, size: int) -> bool:
    """Load label members only; see `LoadMember`."""
    return extension in _LABELS and size <= MAX_LABEL_BYTES
