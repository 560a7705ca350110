"""Read the samples at one place of a tar, for a preview."""

from __future__ import annotations

from dataclasses import dataclass

from raypipe.sources.tarfiles import Group, LoadMember, read_groups
from raypipe.storage import Reader

MAX_PREVIEW_BYTES = 16 << 20
"""Bytes read at one place at most, if images are large or no header can be found."""


@dataclass(frozen=True)
class Place:
    """What was read at one place of a tar for a preview.

    Attributes
    ----------
    groups : list of Group
        The whole groups.
    loaded : int
        Number of groups, from the first on, whose images were read.
    span : int
        Bytes of the file that the groups take.
    """

    groups: list[Group]
    loaded: int
    span: int


class PlaceReader:
    """Reads the whole groups from byte `start` on, until `window` bytes and one group are read."""

    def __init__(
        self,
        stored: Reader,
        compressed: bool,
        load_image: LoadMember,
        load_label: LoadMember,
        start: int,
        window: int,
    ) -> None:
        self._stored, self._compressed = stored, compressed
        self._load_image, self._load_label = load_image, load_label
        self._start, self._stop = start, start + window
        self._groups: list[Group] = []
        # Reading that begins within a group first meets its rest, which is no damage.
        self._skip_rest = start > 0
        self._key, self._load_images, self._loaded = "", False, 0

    def read(self) -> Place:
        groups, stored = self._groups, self._stored
        limit = 1 << 62 if self._compressed else self._start + MAX_PREVIEW_BYTES
        is_limited = stored.end_at(limit)
        # when a group is yielded, nothing of the one after it has been loaded
        for group in read_groups(stored, self._start, self._compressed, self._load):
            if self._skip_rest:
                self._skip_rest, self._key = not group.names, ""
                continue
            groups.append(group)
            if len(groups) > 1 and stored.tell() >= self._stop:
                break
        else:
            if not is_limited:  # read to the end of the file: the last group is whole
                begin = groups[0].offset if groups and not self._compressed else 0
                return Place(groups, min(self._loaded, len(groups)), stored.tell() - begin)
        last = groups.pop() if groups else None
        if not groups or last is None:
            return Place(groups, 0, 0)
        end = stored.tell() if self._compressed else last.offset
        return Place(groups, min(self._loaded, len(groups)), end - groups[0].offset)

    def _load(self, key: str, extension: str, size: int) -> bool:
        """Load labels, and the images of groups that begin within the window."""
        if key != self._key:
            self._key = key
            within = not self._groups or self._stored.tell() < self._stop
            self._load_images = not self._skip_rest and within
            self._loaded += self._load_images
        return self._load_label(key, extension, size) or (
            self._load_images and self._load_image(key, extension, size)
        )
