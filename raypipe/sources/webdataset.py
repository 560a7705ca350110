"""WebDataset: plain or gzip tar files; members with the same key are one sample.

The key is the member's name up to the first dot of its last part. The image is the member with the
extension `image_column` (`auto`: the only one with an image's extension). The label is `.cls`; else
the field `label_column` of `.json` (`auto`: the first with a usual name, if any); else `.txt`.

Normally the members of a sample follow one another. A tar in which they do not is read as a whole
for every fragment, twice: for the labels, then for the images. Only the labels are held.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from raypipe import storage
from raypipe.sources.columns import AUTO, LABEL_NAMES
from raypipe.sources.filesource import FILE_VANISHED, FileSource, no_content
from raypipe.sources.formats import IMAGE_EXTENSIONS
from raypipe.sources.tarfiles import BLOCK, Group, read_groups
from raypipe.sources.tarparts import JoinedSample, KeyHistory, Kind, join_parts
from raypipe.sources.tarplaces import PlaceReader
from raypipe.sources.types import FileScan, Fragment, IdFilter, Preview, RawSample, SourceFile
from raypipe.sources.values import number_or_name, printable, stored_label
from raypipe.storage import Reader

READ_BYTES = 4 << 20
"""Bytes of one request: enough to hide latency, little to discard at a fragment's end."""
MAX_LABEL_BYTES, MAX_IMAGE_BYTES = 1 << 20, 1 << 30
"""A larger member is a reject."""
PREVIEW_BYTES = 1 << 20
"""Approximate bytes read at one place of a preview."""
SCATTERED = -1
"""Offset of the fragments of a tar in which the members of a sample do not follow one another."""
SEVERAL_IMAGES = "several members can be the image"

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
        facts, history = _TarFacts(self), KeyHistory()
        repeats_across_fragments = any_named = scattered = False
        problem = ""
        for group in read_groups(stored, 0, _is_compressed(file.path), _load_label):
            any_named |= bool(group.names)
            problem = group.reason
            if history.kind(group) is Kind.PART:
                scattered = True
                continue
            first = first_of_key.setdefault(group.key, len(offsets))
            repeats_across_fragments |= first // limit != len(offsets) // limit
            offsets.append(group.offset)
            facts.add(group)
        if offsets and not any_named:
            return self.unreadable_file(file, f"not a tar file: {problem}")
        if scattered:
            facts = _TarFacts(self)
            for sample in self._join(stored, file.path):
                facts.add(sample.group)
        if facts.problem:
            return self.unreadable_file(file, facts.problem)
        fragments = self.cut_fragments(file, len(offsets))
        # A reader that begins at a fragment's own offset cannot see that a key occurred before it.
        # If one does, every fragment is read from the start of the file.
        if scattered:
            fragments = tuple(
                dataclasses.replace(fragment, offset=SCATTERED) for fragment in fragments
            )
        elif not _is_compressed(file.path) and not repeats_across_fragments:
            fragments = tuple(
                dataclasses.replace(fragment, offset=offsets[fragment.start])
                for fragment in fragments
            )
        return FileScan(fragments, None, frozenset(facts.labels))

    def read(self, fragment: Fragment, keep_id: IdFilter | None = None) -> Iterator[RawSample]:
        if not fragment.samples:
            return
        if fragment.offset == SCATTERED:
            yield from self._read_scattered(fragment, keep_id)
            return
        position = _Position(fragment, keep_id, self.is_image)
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
        yield from _gone(fragment, position.index, keep_id)

    def _join(self, stored: Reader, path: str) -> list[JoinedSample]:
        """Return all samples of a tar, with their labels and without their images."""
        stored.end_at(1 << 62)  # a preview reads to a limit
        stored.seek(0)
        return join_parts(read_groups(stored, 0, _is_compressed(path), _load_label))

    def _read_scattered(self, fragment: Fragment, keep_id: IdFilter | None) -> Iterator[RawSample]:
        """Yield samples whose members do not follow one another, in the order of their images.

        Rejects come last.
        """
        path = fragment.path
        with self.open(path) as stored:
            joined = self._join(stored, path)
        left = {
            number: sample
            for number, sample in enumerate(joined[: fragment.stop])
            if number >= fragment.start
            and (keep_id is None or keep_id(_sample_id(path, sample.group.key)))
        }
        images = {
            sample.group.key: (number, self.image_of(sample.group)[0])
            for number, sample in left.items()
            if not sample.repeated and not sample.group.reason
        }

        def load(key: str, extension: str, size: int) -> bool:
            is_chosen = key in images and images[key][1] == extension
            return is_chosen and size <= MAX_IMAGE_BYTES

        with self.open(path) as stored:
            for part in read_groups(stored, 0, _is_compressed(path), load):
                if part.contents:
                    number, _ = images.pop(part.key)
                    group = left.pop(number).group
                    whole = dataclasses.replace(group, contents={**group.contents, **part.contents})
                    yield self._sample(_sample_id(path, part.key), whole, False)
                if not images:
                    break
        for sample in left.values():
            yield self._sample(_sample_id(path, sample.group.key), sample.group, sample.repeated)
        yield from _gone(fragment, len(joined), keep_id)

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
        read_place = functools.partial(
            PlaceReader, stored, _is_compressed(file.path), self._load_image, _load_label
        )
        drawn: dict[int, RawSample] = {}  # by the byte of their header: places can overlap
        labels: dict[int, list[int | str | None]] = {}
        samples_read = bytes_read = 0
        problem, apart = "no sample found", _Apart(self)
        for start in starts:
            place = read_place(start, window).read()
            if not place.groups and start:  # no whole group between here and the end
                place = read_place(0, window).read()
            groups = place.groups
            apart.add(groups)
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
        if apart.images != apart.labels and not _is_compressed(file.path):
            # all labels can be before or after all images
            for start in (0, max(0, file.size - window) // BLOCK * BLOCK):
                apart.add(read_place(start, window).read().groups)
        if apart.images and apart.labels:
            return self._preview_whole(stored, file, places * each, draw)
        counts = Counter(label for valid in labels.values() for label in valid)
        estimate = file.size * samples_read / max(1, bytes_read)
        return Preview(tuple(drawn.values()), estimate, False, counts)

    def _preview_whole(
        self, stored: Reader, file: SourceFile, count: int, draw: random.Random
    ) -> Preview:
        scan = self.scan_stored(file, stored)
        error = next((fragment.error for fragment in scan.fragments if fragment.error), "")
        if error:
            return Preview(error=error)
        groups = [sample.group for sample in self._join(stored, file.path)]
        labels = Counter(label for group in groups for label in self._label_if_valid(group))
        indices = draw.sample(range(len(groups)), min(count, len(groups)))
        chosen = {_sample_id(file.path, groups[index].key) for index in indices}
        drawn = [
            sample
            for fragment in scan.fragments
            for sample in self.read(fragment, chosen.__contains__)
        ]
        return Preview(tuple(drawn), len(groups), True, labels)

    def _sample(self, sample_id: str, group: Group, is_repeated: bool) -> RawSample:
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

    def is_image(self, extension: str) -> bool:
        """Return whether a member with this extension can be the image of its sample."""
        column = self.settings.image_column
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
        column = self.settings.image_column
        missing = "" if column == AUTO else f"no .{_extension(column)}, "
        return None, f"no image: {missing}only {_listed(group.names)}"

    def _load_image(self, key: str, extension: str, size: int) -> bool:
        """Load images only; see `LoadMember`."""
        return self.is_image(extension) and size <= MAX_IMAGE_BYTES

    def _label_if_valid(self, group: Group) -> list[int | str | None]:
        """Return [label] of a group, [None] if it has no label, [] if the label is invalid."""
        label, reason = self.label_of(group)
        return [] if reason else [label]

    def label_of(self, group: Group) -> tuple[int | str | None, str]:
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
    is_image: Callable[[str], bool]
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
        return _load_label(key, extension, size) or (
            self.is_image(extension) and size <= MAX_IMAGE_BYTES
        )


class _TarFacts:
    """The labels of a tar, and whether it is clear which members are the images."""

    def __init__(self, source: WebDatasetSource) -> None:
        self.labels: set[int | str] = set()
        self._source, self._any_image, self._ambiguous = source, False, ""

    def add(self, group: Group) -> None:
        """Add a sample."""
        label, _ = self._source.label_of(group)
        self.labels |= {label} - {None}  # type: ignore[arg-type]
        image, reason = self._source.image_of(group)
        self._any_image |= image is not None
        if reason.startswith(SEVERAL_IMAGES):
            self._ambiguous = self._ambiguous or reason

    @property
    def problem(self) -> str:
        """Why no sample has an image although members can be images; "" otherwise."""
        return "" if self._any_image else self._ambiguous


class _Apart:
    """Whether groups in some places of a tar have images without labels, and the reverse."""

    def __init__(self, source: WebDatasetSource) -> None:
        self.images = self.labels = False
        self._source, self._ignored = source, source.settings.label_column is None

    def add(self, groups: Sequence[Group]) -> None:
        """Add the groups of a place."""
        for group in groups:
            has_image = any(map(self._source.is_image, group.names))
            has_label = any(extension in _LABELS for extension in group.names)
            self.images |= has_image and not has_label and not self._ignored
            self.labels |= has_label and not has_image


def _is_compressed(path: str) -> bool:
    return path.lower().endswith((".gz", ".tgz"))


def _extension(column: str) -> str:
    """Return `source.image_column` as `Group.names` has extensions."""
    return column.lower().removeprefix(".")


def _listed(extensions: Iterable[str]) -> str:
    named = (f".{name}" if name else "one without an extension" for name in extensions)
    return ", ".join(islice(named, 5))


def _gone(fragment: Fragment, position: int, keep_id: IdFilter | None) -> Iterator[RawSample]:
    """Yield a reject for each sample of a fragment from number `position` on."""
    for number in range(max(position, fragment.start), fragment.stop):
        sample_id = f"{fragment.path}#sample-{number}"
        if keep_id is None or keep_id(sample_id):
            reason = "the tar has fewer samples than when it was indexed"
            yield RawSample(sample_id, None, None, reason)


def _sample_id(path: str, key: str) -> str:
    return f"{path}#{printable(key)}"


def _load_label(key: str, extension: str, size: int) -> bool:
    """Load label members only; see `LoadMember`."""
    return extension in _LABELS and size <= MAX_LABEL_BYTES
