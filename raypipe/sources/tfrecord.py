"""TFRecord files whose records are `tf.train.Example` messages; TensorFlow is not needed."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice

from raypipe import storage
from raypipe.config import SourceSettings
from raypipe.sources.columns import ColumnError, split_of_rows
from raypipe.sources.example_fields import ExampleFields
from raypipe.sources.examples import NotAnExample, parse_example
from raypipe.sources.filesource import FILE_VANISHED, FileSource, no_content, other_content
from raypipe.sources.table_source import reject_repeated_ids
from raypipe.sources.tfrecords import (
    HEADER_BYTES,
    BrokenFile,
    Record,
    is_compressed,
    read_records,
)
from raypipe.sources.types import FileScan, Fragment, IdFilter, Preview, RawSample, SourceFile
from raypipe.sources.values import damage_reason
from raypipe.storage import Reader

READ_BYTES = 4 << 20
"""Bytes of one request: enough to hide latency, little to discard at a fragment's end."""
ESTIMATE_BYTES = 256 << 20
"""Decompressed bytes from which the records of a compressed file are estimated, at most."""


class TFRecordSource(FileSource):
    """Records of TFRecord files.

    Sample ids are "<relative path>#<record number in the file>", or the id feature's values.
    """

    format = "tfrecord"
    scan_reads = "all"
    fields_in_samples = True

    def __init__(self, settings: SourceSettings) -> None:
        super().__init__(settings)
        self._fields = ExampleFields(settings)

    def open(self, path: str) -> Reader:
        return storage.open_read(self._location.uri(path), READ_BYTES)

    def scan_stored(self, file: SourceFile, stored: Reader) -> FileScan:
        offsets: list[int] = []
        labels: set[int | str] = set()
        problem = no_image = ""
        any_image = False
        splits: set[str] = set()
        try:
            for record in read_records(stored, 0, lambda number: True):
                sample = self._sample(file.path, len(offsets), record, splits)
                offsets.append(record.offset)
                labels |= {sample.label} - {None}  # type: ignore[arg-type]
                any_image |= not sample.reason
                no_image = no_image or sample.reason
        except BrokenFile as error:
            problem = str(error)
        if not offsets or not any_image:
            return self.unreadable_file(
                file, f"not a TFRecord file of images: {problem or no_image}"
            )
        try:
            split = split_of_rows(splits, "feature")
        except ColumnError as error:
            return self.unreadable_file(file, error)
        fragments = self.cut_fragments(file, len(offsets))
        if not _is_compressed(stored):
            fragments = tuple(
                dataclasses.replace(fragment, offset=offsets[fragment.start])
                for fragment in fragments
            )
        if problem:
            fragments = (*fragments, self.unreadable_rest(file, len(offsets), problem))
        return FileScan(fragments, None, frozenset(labels), self.checked_split(split))

    def read(self, fragment: Fragment, keep_id: IdFilter | None = None) -> Iterator[RawSample]:
        if not fragment.samples:
            return
        samples = self._read(fragment, keep_id)
        yield from reject_repeated_ids(samples) if self._fields.ids_are_stored else samples

    def preview(
        self, file: SourceFile, places: int, each: int, draw: random.Random, whole: bool
    ) -> Preview:
        """Read the first samples; see `Source.preview`.

        Their number is estimated from the bytes that those take. Of a compressed file, up to
        `ESTIMATE_BYTES` are decompressed for that.
        """
        if whole:
            return super().preview(file, places, each, draw, whole)
        if reason := no_content(file):
            return Preview(error=reason)
        try:
            opened = self.open(file.path)
        except FileNotFoundError:
            return Preview(error=FILE_VANISHED)
        drawn: list[RawSample] = []
        problem, estimate = "no record", 0.0
        splits: set[str] = set()
        with opened as stored:
            if reason := other_content(file, stored):
                return Preview(error=reason)
            count = places * each
            try:
                compressed = _is_compressed(stored)
                records = read_records(stored, 0, lambda number: number < count)
                for record in islice(records, count):
                    drawn.append(self._sample(file.path, len(drawn), record, splits))
                    estimate = file.size * (len(drawn) - 1) / max(1, record.offset)
                if compressed:
                    estimate = _estimate_compressed(stored, records, len(drawn), file.size)
            except BrokenFile as error:
                problem = str(error)
            except Exception as error:
                problem = damage_reason(stored, error)
        readable = [sample for sample in drawn if not sample.reason]
        if not readable:
            problem = drawn[0].reason if drawn else problem
            return Preview(error=f"not a TFRecord file of images: {problem}")
        try:
            split = self.checked_split(split_of_rows(splits, "feature"))
        except ColumnError as error:
            return Preview(error=str(error))
        labels = Counter(sample.label for sample in readable)
        return Preview(tuple(drawn), max(len(drawn), estimate), False, labels, split=split)

    def _read(self, fragment: Fragment, keep_id: IdFilter | None) -> Iterator[RawSample]:
        first = fragment.start if fragment.offset else 0
        number, reason = first, "the file has fewer records than when it was indexed"
        load = self._loads(fragment, keep_id)
        with self.open(fragment.path) as stored:
            try:
                records = read_records(stored, fragment.offset, load, first)
                for number, record in enumerate(islice(records, fragment.stop - first), first):
                    if load(number):
                        sample = self._sample(fragment.path, number, record)
                        if keep_id is None or keep_id(sample.sample_id):
                            yield sample
                    number += 1
            except BrokenFile as error:
                reason = str(error)
        for row in range(max(number, fragment.start), fragment.stop):
            sample_id = f"{fragment.path}#{row}"
            if keep_id is None or keep_id(sample_id):
                yield RawSample(sample_id, None, None, reason)

    def _loads(self, fragment: Fragment, keep_id: IdFilter | None) -> Callable[[int], bool]:
        """Return the function that chooses the records to load, by their number."""
        if keep_id is None or self._fields.ids_are_stored:
            return lambda number: number >= fragment.start
        return lambda number: number >= fragment.start and keep_id(f"{fragment.path}#{number}")

    def _sample(
        self, path: str, number: int, record: Record, splits: set[str] | None = None
    ) -> RawSample:
        """Return the sample in a record that was loaded; add what names its split to `splits`."""
        sample_id = f"{path}#{number}"
        if record.content is None:
            return RawSample(sample_id, None, None, record.reason)
        try:
            example = parse_example(memoryview(record.content))
        except NotAnExample as error:
            return RawSample(sample_id, None, None, str(error))
        if splits is not None:
            splits.add(self._fields.split_of(example))
        reason = ""
        if self._fields.ids_are_stored:
            stored_id, reason = self._fields.id_of(example)
            sample_id = stored_id if stored_id is not None else sample_id
        image, image_reason = self._fields.image_of(example)
        label, label_reason = self._fields.label_of(example)
        reason = reason or image_reason or label_reason
        return RawSample(sample_id, None if reason else image, label, reason)


def _estimate_compressed(stored: Reader, records: Iterator[Record], count: int, size: int) -> float:
    """Return about how many records a compressed file has, after the first `count` of `records`.

    Exact for a file that ends before `ESTIMATE_BYTES`.
    """
    for record in records:
        count += 1
        packed = stored.tell()
        if (packed >= READ_BYTES and packed < size) or record.offset >= ESTIMATE_BYTES:
            return count * size / packed
    return count


def _is_compressed(stored: Reader) -> bool:
    stored.seek(0)
    return is_compressed(stored.read(HEADER_BYTES))
