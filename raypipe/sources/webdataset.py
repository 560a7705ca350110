"""WebDataset: tar files (plain, or gzip) in which the consecutive members that share a key are one sample.

The key is the member's name up to the first dot of its last part. The image is the member with an image's extension. The label is
`.cls`; else the field `label_column` of `.json` (`auto`: the first with a usual name, if any); else `.txt`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any

from raypipe import storage
from raypipe.sources.base import FileScan, Fragment, RawSample, SourceFile, Wanted
from raypipe.sources.columns import AUTO, LABEL_NAMES
from raypipe.sources.common import IMAGE_EXTENSIONS, FileSource, stored_label, text
from raypipe.sources.tarfiles import Group, groups
from raypipe.storage import Reader

READ_BYTES = 4 << 20
"""Bytes of one request: enough to hide latency, little to throw away at a fragment's end."""
LARGEST_LABEL, LARGEST_IMAGE = 1 << 20, 1 << 30
"""Bytes; a larger member is a reject."""

_LABELS = ("cls", "json", "txt")
_WHOLE = re.compile(r"([+-]?[0-9]{1,18})(\.0*)?")
_IMAGES = frozenset(extension.removeprefix(".") for extension in IMAGE_EXTENSIONS)


class WebDatasetSource(FileSource):
    """Samples of tar files. Sample ids are "<relative path of the tar>#<key>"."""

    format = "webdataset"

    def open(self, path: str) -> Reader:
        return storage.open_read(self._location.uri(path), READ_BYTES)

    def scan_stored(self, file: SourceFile, stored: Reader) -> FileScan:
        offsets: list[int] = []
        keys: dict[str, int] = {}
        labels: set[int | str] = set()
        distant_duplicate = named = False
        for group in groups(stored, 0, _compressed(file.path), _wants_label):
            first = keys.setdefault(group.key, len(offsets))
            distant_duplicate |= first // self.settings.fragment_samples != len(offsets) // self.settings.fragment_samples
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
            fragments = tuple(dataclasses.replace(part, offset=offsets[part.start]) for part in fragments)
        return FileScan(fragments, None, frozenset(labels))

    def read(self, fragment: Fragment, wanted: Wanted | None = None) -> Iterator[RawSample]:
        if not fragment.samples:
            return
        index = fragment.start if fragment.offset else 0
        seen: set[str] = set()

        def identity(key: str) -> str:
            return f"{fragment.path}#{text(key)}"

        def load(key: str, extension: str, size: int) -> bool:
            if index < fragment.start or (wanted is not None and not wanted(identity(key))):
                return False
            return _wants_label(key, extension, size) or (extension in _IMAGES and size <= LARGEST_IMAGE)

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
                yield RawSample(sample_id, None, None, "the tar has fewer samples than when it was indexed")
            index += 1

    def _sample(self, sample_id: str, group: Group, duplicate: bool) -> RawSample:
        label, wrong = self._label(group)
        extension = next((extension for extension in group.names if extension in _IMAGES), None)
        reason = group.reason or ("duplicate key: an earlier sample of the tar has it too" if duplicate else "")
        if not reason and extension is None:
            reason = f"no image: only {', '.join(f'.{name}' for name in list(group.names)[:5])}"
        image = group.contents.get(extension) if extension is not None else None
        if not reason and image is None:
            reason = f"the image has more than {LARGEST_IMAGE} bytes"
        reason = text(reason or wrong)
        return RawSample(sample_id, None if reason else image, label, reason)

    def _label(self, group: Group) -> tuple[int | str | None, str]:
        """The label of a group, or why it cannot be read."""
        for extension in _LABELS:
            if extension not in group.names:
                continue
            content = group.contents.get(extension)
            if content is None:
                return None, f"label: .{extension} has more than {LARGEST_LABEL} bytes"
            try:
                words = content.decode("utf-8")
                value: Any = json.loads(words) if extension == "json" else _number(words.strip())
            except (ValueError, RecursionError) as error:
                return None, f"label: .{extension} cannot be read: {' '.join(str(error).split())[:200]}"
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
        return next((name for name in LABEL_NAMES if name in fields), None) if wanted == AUTO else wanted


def _compressed(path: str) -> bool:
    return path.lower().endswith((".gz", ".tgz"))


def _wants_label(key: str, extension: str, size: int) -> bool:
    return extension in _LABELS and size <= LARGEST_LABEL


def _number(words: str) -> int | str:
    """A number where the text is a whole one (the usual content of .cls), else the text."""
    found = _WHOLE.fullmatch(words)
    return int(found[1]) if found is not None else words
