"""WebDataset: plain or gzip tar files; consecutive members with the same key are one sample.

The key is the member's name up to the first dot of its last part. The image is the member with an
image's extension. The label is `.cls`; else the field `label_column` of `.json` (`auto`: the first
with a usual name, if any); else `.txt`.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from raypipe import storage
from raypipe.sources.base import FileScan, Fragment, IdFilter, Preview, RawSample, SourceFile
from raypipe.sources.columns import AUTO, LABEL_NAMES
from raypipe.sources.filesource import FILE_VANISHED, FileSource, no_content
from raypipe.sources.location import IMAGE_EXTENSIONS
from raypipe.sources.tarfiles import BLOCK, Group, read_groups
from raypipe.sources.values import number_or_name, printable, stored_label
from raypipe.storage import Reader

READ_BYTES = 4 << 20
"""Bytes of one request: enough to hide latency, little to discard at a fragment's end."""
MAX_LABEL_BYTES, MAX_IMAGE_BYTES = 1 << 20, 1 << 30
"""A larger member is a reject."""
PREVIEW_BYTES = 1 << 20
"""Approximate bytes read at one place of a preview."""
MAX_PREVIEW_BYTES = 16 << 20
"""Bytes read at one place at most, if images are large or no header can be found."""

_LABELS = ("cls", "json", "txt")
_IMAGES = frozenset(extension.removeprefix(".") for extension in IMAGE_EXTENSIONS)


class WebDatasetSource(FileSource):
    """Samples of tar files. Sample ids are "<relative path of the tar>#<key>"."""

    format = "webdataset"
    scan_reads = "all"

    def open(self, path: str) -> Reader:
        return storage.open_read(self._location.uri(path), READ_BYTES)

    def scan_stored(self, file: SourceFile, stored: Reader) -> FileScan:
        limit = self.settings.fragment_samples
        offsets: list[int] = []
        first_of_key: dict[str, int] = {}
        labels: set[int | str] = set()
        repeats_across_fragments = any_named = False
        problem = ""
        for group in read_groups(stored, 0, _is_compressed(file.path), _load_label):
            first = first_of_key.setdefault(group.key, len(offsets))
            repeats_across_fragments |= first // limit != len(offsets) // limit
            offsets.append(group.offset)
            any_named |= bool(group.names)
            label, _ = self._label(group)
            if label is not None:
                labels.add(label)
            problem = group.reason
        if offsets and not any_named:
            return self.unreadable_file(file, f"not a tar file: {problem}")
        fragments = self.cut_fragments(file, len(offsets))
        # A reader that begins at a fragment's own offset cannot see that a key occurred before it.
        # If one does, every fragment is read from the start of the file.
        if not _is_compressed(file.path) and not repeats_across_fragments:
            fragments = tuple(
                dataclasses.replace(fragment, offset=offsets[fragment.start])
                for fragment in fragments
            )
        return FileScan(fragments, None, frozenset(labels))

    def read(self, fragment: Fragment, keep_id: IdFilter | None = None) -> Iterator[RawSample]:
        if not fragment.samples:
            return
        position = _Position(fragment, keep_id)
        seen: set[str] = set()
        with self.open(fragment.path) as stored:
            for group in read_groups(
                stored, fragment.offset, _is_compressed(fragment.path), position.load
            ):
                is_repeated = group.key in seen
                seen.add(group.key)
                sample_id = _sample_id(fragment.path, group.key)
                if position.keeps(sample_id):
                    yield self._sample(sample_id, group, is_repeated)
                position.index += 1
                if position.index == fragment.stop:
                    return
        while position.index < fragment.stop:
            sample_id = f"{fragment.path}#sample-{position.index}"
            if position.keeps(sample_id):
                reason = "the tar has fewer samples than when it was indexed"
                yield RawSample(sample_id, None, None, reason)
            position.index += 1

    def preview(
        self, file: SourceFile, places: int, each: int, draw: random.Random, whole: bool
    ) -> Preview:
        """Read samples from random bytes on; see `Source.preview`.

        The reader finds the next header by itself. The number of samples is estimated from the
        bytes that those read take. A compressed tar can only be read from its start, so there the
        first samples are taken.
        """
        if reason := no_content(file):
            return Preview(error=reason)
        try:
            opened = storage.open_read(self._location.uri(file.path), PREVIEW_BYTES)
        except FileNotFoundError:
            return Preview(error=FILE_VANISHED)
        with opened as stored:
            if whole:
                return self._preview_whole(stored, file, places * each, draw)
            return self._preview_places(stored, file, places, each, draw)

    def _preview_places(
        self, stored: Reader, file: SourceFile, places: int, each: int, draw: random.Random
    ) -> Preview:
        window = PREVIEW_BYTES
        if _is_compressed(file.path):
            starts, window = [0], places * PREVIEW_BYTES
        else:
            room = max(0, file.size - window)
            starts = sorted({int(draw.random() * room) // BLOCK * BLOCK for _ in range(places)})
        per_place = -(-places * each // len(starts))
        drawn: dict[int, RawSample] = {}  # by the byte of their header: places can overlap
        labels: dict[int, list[int | str | None]] = {}
        samples_read = bytes_read = 0
        problem = "no sample found"
        for start in starts:
            place = _PlaceReader(stored, file.path, start, window).read()
            if not place.groups and start:  # no whole group between here and the end
                place = _PlaceReader(stored, file.path, 0, window).read()
            groups = place.groups
            if not any(group.names for group in groups):
                problem = groups[-1].reason if groups else problem
                continue
            samples_read, bytes_read = samples_read + len(groups), bytes_read + place.span
            labels |= {group.offset: self._label_if_valid(group) for group in groups}
            with_images = groups[: place.loaded]
            for group in draw.sample(with_images, min(per_place, place.loaded)):
                sample_id = _sample_id(file.path, group.key)
                drawn[group.offset] = self._sample(sample_id, group, False)
        if not samples_read:
            return Preview(error=f"not a tar file: {problem}")
        counts = Counter(label for valid in labels.values() for label in valid)
        estimate = file.size * samples_read / max(1, bytes_read)
        return Preview(tuple(drawn.values()), estimate, False, counts)

    def _preview_whole(
        self, stored: Reader, file: SourceFile, count: int, draw: random.Random
    ) -> Preview:
        groups = list(read_groups(stored, 0, _is_compressed(file.path), _load_label))
        if groups and not any(group.names for group in groups):
            return Preview(error=f"not a tar file: {groups[-1].reason}")
        labels = Counter(label for group in groups for label in self._label_if_valid(group))
        indices = draw.sample(range(len(groups)), min(count, len(groups)))
        chosen = {_sample_id(file.path, groups[index].key) for index in indices}
        fragment_id = self.fragment_id(file, 0, len(groups))
        fragment = Fragment(fragment_id, file.path, 0, len(groups))
        drawn = self.read(fragment, chosen.__contains__)
        return Preview(tuple(drawn), len(groups), True, labels)

    def _sample(self, sample_id: str, group: Group, is_repeated: bool) -> RawSample:
        label, label_reason = self._label(group)
        extension = next((extension for extension in group.names if extension in _IMAGES), None)
        image = group.contents.get(extension) if extension is not None else None
        reason = group.reason
        if not reason and is_repeated:
            reason = "duplicate key: an earlier sample of the tar has it too"
        if not reason and extension is None:
            reason = f"no image: only {', '.join(f'.{name}' for name in list(group.names)[:5])}"
        if not reason and image is None:
            reason = f"the image has more than {MAX_IMAGE_BYTES} bytes"
        reason = printable(reason or label_reason)
        return RawSample(sample_id, None if reason else image, label, reason)

    def _label_if_valid(self, group: Group) -> list[int | str | None]:
        """Return [label] of a group, [None] if it has no label, [] if the label is invalid."""
        label, reason = self._label(group)
        return [] if reason else [label]

    def _label(self, group: Group) -> tuple[int | str | None, str]:
        """Return the label of a group, or why it is invalid."""
        if self.settings.label_column is None:
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
                message = " ".join(str(error).split())[:200]
                return None, f"label: .{extension} cannot be read: {message}"
            if extension == "json":
                if not isinstance(value, dict):
                    return None, f"label: .json holds no fields but {type(value).__name__}"
                name = self._label_field(value)
                if name is None:
                    continue  # the .json describes something else
                value = value.get(name)
            return stored_label(value)
        return None, ""

    def _label_field(self, fields: dict[str, Any]) -> str | None:
        """Return the label field of a .json: for `auto`, the first with a usual name, or None."""
        name = self.settings.label_column
        if name != AUTO:
            return name
        return next((usual for usual in LABEL_NAMES if usual in fields), None)


@dataclass
class _Position:
    """Where in its file the reader of a fragment is: at the sample with number `index`."""

    fragment: Fragment
    keep_id: IdFilter | None
    index: int = field(init=False)

    def __post_init__(self) -> None:
        self.index = self.fragment.start if self.fragment.offset else 0

    def keeps(self, sample_id: str) -> bool:
        """Whether the current sample is in the fragment and passes the filter."""
        if self.index < self.fragment.start:
            return False
        return self.keep_id is None or self.keep_id(sample_id)

    def load(self, key: str, extension: str, size: int) -> bool:
        """Whether to read a member of the current sample; see `LoadMember`."""
        if not self.keeps(_sample_id(self.fragment.path, key)):
            return False
        return _load_label(key, extension, size) or _load_image(extension, size)


@dataclass(frozen=True)
class _Place:
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


class _PlaceReader:
    """Reads the whole groups from byte `start` on, until `window` bytes and one group are read."""

    def __init__(self, stored: Reader, path: str, start: int, window: int) -> None:
        self._stored, self._compressed = stored, _is_compressed(path)
        self._start, self._stop = start, start + window
        self._groups: list[Group] = []
        # Reading that begins within a group first meets its rest, which is no damage.
        self._skip_rest = start > 0
        self._key, self._load_images, self._loaded = "", False, 0

    def read(self) -> _Place:
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
                return _Place(groups, min(self._loaded, len(groups)), stored.tell() - begin)
        last = groups.pop() if groups else None
        if not groups or last is None:
            return _Place(groups, 0, 0)
        end = stored.tell() if self._compressed else last.offset
        return _Place(groups, min(self._loaded, len(groups)), end - groups[0].offset)

    def _load(self, key: str, extension: str, size: int) -> bool:
        """Load labels, and the images of groups that begin within the window."""
        if key != self._key:
            self._key = key
            within = not self._groups or self._stored.tell() < self._stop
            self._load_images = not self._skip_rest and within
            self._loaded += self._load_images
        return _load_label(key, extension, size) or (
            self._load_images and _load_image(extension, size)
        )


def _is_compressed(path: str) -> bool:
    return path.lower().endswith((".gz", ".tgz"))


def _sample_id(path: str, key: str) -> str:
    return f"{path}#{printable(key)}"


def _load_label(key: str, extension: str, size: int) -> bool:
    """Load label members only; see `LoadMember`."""
    return extension in _LABELS and size <= MAX_LABEL_BYTES


def _load_image(extension: str, size: int) -> bool:
    return extension in _IMAGES and size <= MAX_IMAGE_BYTES
