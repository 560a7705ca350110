"""WebDataset: tar files (plain, or gzip) in which the consecutive members that share a key are one sample.

The key is the member's name up to the first dot of its last part. The image is the member with an image's extension. The label is
`.cls`; else the field `label_column` of `.json` (`auto`: the first with a usual name, if any); else `.txt`.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

from raypipe import storage
from raypipe.sources.base import FileScan, Fragment, IdFilter, Preview, RawSample, SourceFile
from raypipe.sources.columns import AUTO, LABEL_NAMES
from raypipe.sources.common import (
    IMAGE_EXTENSIONS,
    FileSource,
    number_or_name,
    stored_label,
    text,
    without_content,
)
from raypipe.sources.tarfiles import BLOCK, Group, groups
from raypipe.storage import Reader

READ_BYTES = 4 << 20
"""Bytes of one request: enough to hide latency, little to throw away at a fragment's end."""
LARGEST_LABEL, LARGEST_IMAGE = 1 << 20, 1 << 30
"""Bytes; a larger member is a reject."""
PREVIEW_BYTES, MOST_PREVIEW_BYTES = 1 << 20, 16 << 20
"""Bytes read at one place of a preview, about, and at most, where images are large or there is no header to be found."""

_LABELS = ("cls", "json", "txt")
_IMAGES = frozenset(extension.removeprefix(".") for extension in IMAGE_EXTENSIONS)


class WebDatasetSource(FileSource):
    """Samples of tar files. Sample ids are "<relative path of the tar>#<key>"."""

    format = "webdataset"
    scan_reads = "all"

    def open(self, path: str) -> Reader:
        return storage.open_read(self._location.uri(path), READ_BYTES)

    def scan_stored(self, file: SourceFile, stored: Reader) -> FileScan:
        offsets: list[int] = []
        keys: dict[str, int] = {}
        labels: set[int | str] = set()
        distant_duplicate = named = False
        for group in groups(stored, 0, _compressed(file.path), _wants_label):
            first = keys.setdefault(group.key, len(offsets))
            distant_duplicate |= (
                first // self.settings.fragment_samples
                != len(offsets) // self.settings.fragment_samples
            )
            offsets.append(group.offset)
            named |= bool(group.names)
            label, _ = self._label(group)
            if label is not None:
                labels.add(label)
            problem = group.reason
        if offsets and not named:
            return self.broken(file, f"not a tar file: {problem}")
        # Who reads a part from its own offset cannot see a key that occurred before it; then every part is read from the start.
        from_start = _compressed(file.path) or distant_duplicate
        fragments = self.cut(file, len(offsets))
        if not from_start:
            fragments = tuple(
                dataclasses.replace(part, offset=offsets[part.start]) for part in fragments
            )
        return FileScan(fragments, None, frozenset(labels))

    def read(self, fragment: Fragment, wanted: IdFilter | None = None) -> Iterator[RawSample]:
        if not fragment.samples:
            return
        index = fragment.start if fragment.offset else 0
        seen: set[str] = set()

        def identity(key: str) -> str:
            return f"{fragment.path}#{text(key)}"

        def load(key: str, extension: str, size: int) -> bool:
            if index < fragment.start or (wanted is not None and not wanted(identity(key))):
                return False
            return _wants_label(key, extension, size) or (
                extension in _IMAGES and size <= LARGEST_IMAGE
            )

        with self.open(fragment.path) as stored:
            for group in groups(stored, fragment.offset, _compressed(fragment.path), load):
                duplicate = group.key in seen
                seen.add(group.key)
                if index >= fragment.start and (wanted is None or wanted(identity(group.key))):
                    yield self._sample(identity(group.key), group, duplicate)
                index += 1
                if index == fragment.stop:
                    return
        while index < fragment.stop:
            sample_id = f"{fragment.path}#sample-{index}"
            if index >= fragment.start and (wanted is None or wanted(sample_id)):
                yield RawSample(
                    sample_id, None, None, "the tar has fewer samples than when it was indexed"
                )
            index += 1

    def preview(
        self, file: SourceFile, places: int, each: int, draw: random.Random, whole: bool
    ) -> Preview:
        """Samples from random bytes on: the reader finds the next header by itself. How many there are is told from their size.

        A compressed tar can only be read from its start, so there the first samples are taken.
        """
        if reason := without_content(file):
            return Preview(error=reason)
        try:
            opened = storage.open_read(self._location.uri(file.path), PREVIEW_BYTES)
        except FileNotFoundError:
            return Preview(
                error="no such file: deleted since it was listed, or its name is not UTF-8"
            )
        with opened as stored:
            if whole:
                return self._preview_whole(stored, file, places * each, draw)
            window = PREVIEW_BYTES
            if _compressed(file.path):
                starts, window = [0], places * PREVIEW_BYTES
            else:
                room = max(0, file.size - window)
                starts = sorted({int(draw.random() * room) // BLOCK * BLOCK for _ in range(places)})
            most = -(-places * each // len(starts))
            drawn: dict[int, RawSample] = {}  # by the byte of their header: places can overlap
            labels: dict[int, list[int | str | None]] = {}
            taken = looked = 0
            problem = "no sample found"
            for start in starts:
                kept, loaded, span = self._place(stored, file.path, start, window)
                if not kept and start:  # nothing whole between here and the end
                    kept, loaded, span = self._place(stored, file.path, 0, window)
                if not any(group.names for group in kept):
                    problem = kept[-1].reason if kept else problem
                    continue
                taken, looked = taken + len(kept), looked + span
                labels |= {group.offset: self._labels(group) for group in kept}
                for group in draw.sample(kept[:loaded], min(most, loaded)):
                    drawn[group.offset] = self._sample(
                        f"{file.path}#{text(group.key)}", group, False
                    )
        if not taken:
            return Preview(error=f"not a tar file: {problem}")
        found = Counter(label for part in labels.values() for label in part)
        return Preview(tuple(drawn.values()), file.size * taken / max(1, looked), False, found)

    def _preview_whole(
        self, stored: Reader, file: SourceFile, count: int, draw: random.Random
    ) -> Preview:
        everything = list(groups(stored, 0, _compressed(file.path), _wants_label))
        if everything and not any(group.names for group in everything):
            return Preview(error=f"not a tar file: {everything[-1].reason}")
        labels = Counter(label for group in everything for label in self._labels(group))
        chosen = {
            everything[index].key
            for index in draw.sample(range(len(everything)), min(count, len(everything)))
        }
        fragment = Fragment(
            self.fragment_id(file, 0, len(everything)), file.path, 0, len(everything)
        )
        drawn = self.read(fragment, {f"{file.path}#{text(key)}" for key in chosen}.__contains__)
        return Preview(tuple(drawn), len(everything), True, labels)

    def _place(
        self, stored: Reader, path: str, start: int, window: int
    ) -> tuple[list[Group], int, int]:
        """The whole groups from a byte on, of how many of them the images were read, and the bytes of the file they take.

        window  bytes after which it is enough, where there is one group
        """
        kept: list[Group] = []
        compressed, cut = (
            _compressed(path),
            start > 0,
        )  # where reading begins inside a group, that is no damage
        current, wanted, loaded = "", False, 0

        def load(key: str, extension: str, size: int) -> bool:
            nonlocal current, wanted, loaded
            if key != current:
                current, wanted = key, not cut and (not kept or stored.tell() < start + window)
                loaded += wanted
            return _wants_label(key, extension, size) or (
                wanted and extension in _IMAGES and size <= LARGEST_IMAGE
            )

        ends_early = stored.end_at(1 << 62 if compressed else start + MOST_PREVIEW_BYTES)
        # when a group comes, nothing of the one after it has been loaded
        for group in groups(stored, start, compressed, load):
            if cut:
                cut, current = not group.names, ""
                continue
            kept.append(group)
            if len(kept) > 1 and stored.tell() >= start + window:
                break
        else:
            if not ends_early:
                return (
                    kept,
                    min(loaded, len(kept)),
                    stored.tell() - (kept[0].offset if kept and not compressed else 0),
                )
        last = kept.pop() if kept else None
        begin = kept[0].offset if kept else 0
        end = stored.tell() if compressed else last.offset if last is not None else 0
        return kept, min(loaded, len(kept)), end - begin if kept else 0

    def _sample(self, sample_id: str, group: Group, duplicate: bool) -> RawSample:
        label, wrong = self._label(group)
        extension = next((extension for extension in group.names if extension in _IMAGES), None)
        reason = group.reason or (
            "duplicate key: an earlier sample of the tar has it too" if duplicate else ""
        )
        if not reason and extension is None:
            reason = f"no image: only {', '.join(f'.{name}' for name in list(group.names)[:5])}"
        image = group.contents.get(extension) if extension is not None else None
        if not reason and image is None:
            reason = f"the image has more than {LARGEST_IMAGE} bytes"
        reason = text(reason or wrong)
        return RawSample(sample_id, None if reason else image, label, reason)

    def _labels(self, group: Group) -> list[int | str | None]:
        """The label of a group, None where it has none; nothing where it cannot be read."""
        label, wrong = self._label(group)
        return [] if wrong else [label]

    def _label(self, group: Group) -> tuple[int | str | None, str]:
        """The label of a group, or why it cannot be read."""
        if self.settings.label_column is None:
            return None, ""
        for extension in _LABELS:
            if extension not in group.names:
                continue
            content = group.contents.get(extension)
            if content is None:
                return None, f"label: .{extension} has more than {LARGEST_LABEL} bytes"
            try:
                words = content.decode("utf-8")
                value: Any = json.loads(words) if extension == "json" else number_or_name(words)
            except (ValueError, RecursionError) as error:
                return (
                    None,
                    f"label: .{extension} cannot be read: {' '.join(str(error).split())[:200]}",
                )
            if extension == "json":
                if not isinstance(value, dict):
                    return None, f"label: .json holds no fields but {type(value).__name__}"
                field = self._field(value)
                if field is None:
                    continue  # other facts of the sample
                value = value.get(field)
            return stored_label(value)
        return None, ""

    def _field(self, fields: dict[str, Any]) -> str | None:
        """The field of a .json with the label; of `auto`, the first one with a usual name, or None."""
        wanted = self.settings.label_column
        return (
            next((name for name in LABEL_NAMES if name in fields), None)
            if wanted == AUTO
            else wanted
        )


def _compressed(path: str) -> bool:
    return path.lower().endswith((".gz", ".tgz"))


def _wants_label(key: str, extension: str, size: int) -> bool:
    return extension in _LABELS and size <= LARGEST_LABEL
