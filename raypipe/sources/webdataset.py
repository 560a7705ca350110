"""WebDataset: plain or gzip tar files; members with the same key are one sample.

The key is the member's name up to the first dot of its last part. `raypipe.sources.tarmembers` says
which members are the image and the label.

Normally the members of a sample follow one another. A tar in which they do not is read as a whole
for every fragment, twice: for the labels, then for the images. Only the labels are held.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from raypipe import storage
from raypipe.config import SourceSettings
from raypipe.sources.columns import ColumnError, split_of_rows
from raypipe.sources.filesource import FILE_VANISHED, FileSource, no_content, other_content
from raypipe.sources.formats import HEAD_BYTES, compression_of
from raypipe.sources.tarfiles import BLOCK, LoadMember, read_groups
from raypipe.sources.tarmembers import Apart, Members, TarFacts, load_label
from raypipe.sources.tarparts import JoinedSample, KeyHistory, Kind, join_parts
from raypipe.sources.tarplaces import PlaceReader
from raypipe.sources.types import FileScan, Fragment, IdFilter, Preview, RawSample, SourceFile
from raypipe.sources.values import printable
from raypipe.storage import Reader

READ_BYTES = 4 << 20
"""Bytes of one request: enough to hide latency, little to discard at a fragment's end."""
PREVIEW_BYTES = 1 << 20
"""Approximate bytes read at one place of a preview."""
SCATTERED = -1
"""Offset of the fragments of a tar in which the members of a sample do not follow one another."""


class WebDatasetSource(FileSource):
    """Samples of tar files. Sample ids are "<relative path of the tar>#<key>"."""

    format = "webdataset"
    scan_reads = "all"
    fields_in_samples = True

    def __init__(self, settings: SourceSettings) -> None:
        super().__init__(settings)
        self._members = Members(settings)

    def open(self, path: str) -> Reader:
        return storage.open_read(self._location.uri(path), READ_BYTES)

    def scan_stored(self, file: SourceFile, stored: Reader) -> FileScan:
        limit = self.settings.fragment_samples
        offsets: list[int] = []
        first_of_key: dict[str, int] = {}
        facts, history = TarFacts(self._members), KeyHistory()
        repeats_across_fragments = any_named = scattered = False
        problem = ""
        for group in read_groups(stored, 0, _is_compressed(file.path), load_label):
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
            return self.unreadable_file(file, f"not a tar file: {_compression(stored) or problem}")
        if scattered:
            facts = TarFacts(self._members)
            for sample in self._join(stored, file.path):
                facts.add(sample.group)
        if facts.problem:
            return self.unreadable_file(file, facts.problem)
        try:
            split = split_of_rows(facts.splits, "field")
        except ColumnError as error:
            return self.unreadable_file(file, error)
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
        labels = frozenset(facts.labels)
        return FileScan(fragments, None, labels, self.checked_split(split), facts.padded)

    def read(self, fragment: Fragment, keep_id: IdFilter | None = None) -> Iterator[RawSample]:
        if not fragment.samples:
            return
        if fragment.offset == SCATTERED:
            yield from self._read_scattered(fragment, keep_id)
            return
        position = _Position(fragment, keep_id, self._members.load_image)
        seen: set[str] = set()
        with self.open(fragment.path) as stored:
            for group in read_groups(
                stored, fragment.offset, _is_compressed(fragment.path), position.load
            ):
                is_repeated = group.key in seen
                seen.add(group.key)
                sample_id = _sample_id(fragment.path, group.key)
                if position.keeps(sample_id):
                    yield self._members.sample(sample_id, group, is_repeated)
                position.index += 1
                if position.index == fragment.stop:
                    return
        yield from _gone(fragment, position.index, keep_id)

    def _join(self, stored: Reader, path: str) -> list[JoinedSample]:
        """Return all samples of a tar, with their labels and without their images."""
        stored.end_at(1 << 62)  # a preview reads to a limit
        stored.seek(0)
        return join_parts(read_groups(stored, 0, _is_compressed(path), load_label))

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
            sample.group.key: (number, self._members.image_of(sample.group)[0])
            for number, sample in left.items()
            if not sample.repeated and not sample.group.reason
        }

        def load(key: str, extension: str, size: int) -> bool:
            is_chosen = key in images and images[key][1] == extension
            return is_chosen and self._members.load_image(key, extension, size)

        with self.open(path) as stored:
            for part in read_groups(stored, 0, _is_compressed(path), load):
                if part.contents:
                    number, _ = images.pop(part.key)
                    group = left.pop(number).group
                    whole = dataclasses.replace(group, contents={**group.contents, **part.contents})
                    yield self._members.sample(_sample_id(path, part.key), whole, False)
                if not images:
                    break
        for sample in left.values():
            yield self._members.sample(
                _sample_id(path, sample.group.key), sample.group, sample.repeated
            )
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
            if reason := other_content(file, stored):
                return Preview(error=reason)
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
            PlaceReader, stored, _is_compressed(file.path), self._members.load_image, load_label
        )
        facts = TarFacts(self._members)
        drawn: dict[int, RawSample] = {}  # by the byte of their header: places can overlap
        labels: dict[int, list[int | str | None]] = {}
        samples_read = bytes_read = 0
        problem, apart = "no sample found", Apart(self._members)
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
            labels |= {group.offset: self._members.label_if_valid(group) for group in groups}
            for group in groups:
                facts.add(group)
            with_images = groups[: place.loaded]
            for group in draw.sample(with_images, min(per_place, place.loaded)):
                sample_id = _sample_id(file.path, group.key)
                drawn[group.offset] = self._members.sample(sample_id, group, False)
        if not samples_read:
            return Preview(error=f"not a tar file: {_compression(stored) or problem}")
        if apart.images != apart.labels and not _is_compressed(file.path):
            # all labels can be before or after all images
            for start in (0, max(0, file.size - window) // BLOCK * BLOCK):
                apart.add(read_place(start, window).read().groups)
        if apart.images and apart.labels:
            return self._preview_whole(stored, file, places * each, draw)
        counts = Counter(label for valid in labels.values() for label in valid)
        estimate = file.size * samples_read / max(1, bytes_read)
        try:
            split = self.checked_split(split_of_rows(facts.splits, "field"))
        except ColumnError as error:
            return Preview(error=str(error))
        return Preview(
            tuple(drawn.values()), estimate, False, counts, split=split, padded=facts.padded
        )

    def _preview_whole(
        self, stored: Reader, file: SourceFile, count: int, draw: random.Random
    ) -> Preview:
        scan = self.scan_stored(file, stored)
        error = next((fragment.error for fragment in scan.fragments if fragment.error), "")
        if error:
            return Preview(error=error)
        groups = [sample.group for sample in self._join(stored, file.path)]
        labels = Counter(label for group in groups for label in self._members.label_if_valid(group))
        indices = draw.sample(range(len(groups)), min(count, len(groups)))
        chosen = {_sample_id(file.path, groups[index].key) for index in indices}
        drawn = [
            sample
            for fragment in scan.fragments
            for sample in self.read(fragment, chosen.__contains__)
        ]
        return Preview(
            tuple(drawn), len(groups), True, labels, split=scan.split, padded=scan.padded
        )


@dataclass
class _Position:
    """Where in its file the reader of a fragment is: at the sample with number `index`."""

    fragment: Fragment
    keep_id: IdFilter | None
    load_image: LoadMember
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
        return load_label(key, extension, size) or self.load_image(key, extension, size)


def _is_compressed(path: str) -> bool:
    return path.lower().endswith((".gz", ".tgz"))


def _compression(stored: Reader) -> str:
    """Return how a file is compressed that is not called so, and what to do; "" if it is not."""
    stored.end_at(HEAD_BYTES)
    stored.seek(0)
    name = compression_of(stored.read(HEAD_BYTES))
    if name == "gzip":
        return "it is compressed with gzip; name it .tar.gz"
    return name and f"it is compressed with {name}, which is not read; unpack it, or use gzip"


def _gone(fragment: Fragment, position: int, keep_id: IdFilter | None) -> Iterator[RawSample]:
    """Yield a reject for each sample of a fragment from number `position` on."""
    for number in range(max(position, fragment.start), fragment.stop):
        sample_id = f"{fragment.path}#sample-{number}"
        if keep_id is None or keep_id(sample_id):
            reason = "the tar has fewer samples than when it was indexed"
            yield RawSample(sample_id, None, None, reason)


def _sample_id(path: str, key: str) -> str:
    return f"{path}#{printable(key)}"
