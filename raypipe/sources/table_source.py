"""`TableSource`, the base class of formats whose samples are rows of Arrow tables."""

from __future__ import annotations

import abc
import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, Protocol

import pyarrow as pa

from raypipe.config import SourceSettings
from raypipe.sources.arrow_images import ImageOrReason
from raypipe.sources.columns import AUTO, Features, TableColumns, choose_columns
from raypipe.sources.filesource import FileSource, no_content
from raypipe.sources.types import IdFilter, RawSample, SourceFile
from raypipe.sources.values import damage_reason, printable, stored_label
from raypipe.storage import Reader

VOTING_FILES = 16
"""Files, evenly spread, whose majority decides what `auto` stands for."""
MAX_FILES_TRIED = 100
"""Files opened to find one in which the columns are clear, if none of the voting files is."""
READERS = 16
"""Files opened at the same time."""


class TableSource(FileSource):
    """A source whose samples are rows of tables.

    Which columns `auto` stands for is decided once, by the majority of a few files, and then holds
    for all. A subclass defines

    `format`, `scan_stored`, `read`
        As for `FileSource`. Use `self.resolved_settings()` and `choose_columns` to find the
        columns, `read_rows` to build the samples, and `reject_repeated_ids` for ids that come
        from a column.
    `schema`
        The columns of one open file.
    """

    labels_by_name = True

    @abc.abstractmethod
    def schema(self, path: str, stored: Reader) -> tuple[pa.Schema, Features]:
        """Return the columns of a file and Hugging Face's description of them.

        The description can be empty. Raises any exception if the file is damaged.
        """

    def resolved_settings(self, image_size: int = 0) -> SourceSettings:
        """Return the settings with the columns that `auto` stands for.

        `auto` remains if no file makes clear what it stands for. Tables store one size of each
        image, so `image_size` does not matter.
        """
        return self._resolved

    @functools.cached_property
    def _resolved(self) -> SourceSettings:
        settings = super().resolved_settings()
        if AUTO not in (settings.image_column, settings.label_column):
            return settings
        files = list(self.files())
        voting = files[:: max(1, len(files) // VOTING_FILES)]
        votes = Counter(
            (columns.image, columns.label) for columns in self._clear_columns(voting, settings)
        )
        if not votes:
            tried = self._clear_columns(files[:MAX_FILES_TRIED], settings)
            votes.update((columns.image, columns.label) for columns in islice(tried, 1))
        for (image, label), _ in votes.most_common(1):
            return settings.model_copy(update={"image_column": image, "label_column": label})
        return settings  # the scan of every file will report what is wrong with it

    def _clear_columns(
        self, files: Sequence[SourceFile], settings: SourceSettings
    ) -> Iterator[TableColumns]:
        """Yield the columns of every file in which they are unambiguous."""
        with ThreadPoolExecutor(READERS, thread_name_prefix="raypipe-columns") as threads:
            yield from filter(
                None, threads.map(lambda file: self._columns_of(file, settings), files)
            )

    def _columns_of(self, file: SourceFile, settings: SourceSettings) -> TableColumns | None:
        if no_content(file):
            return None
        try:
            stored = self.open(file.path)
        except FileNotFoundError:
            return None
        with stored:
            try:
                return choose_columns(*self.schema(file.path, stored), settings)
            except Exception as error:
                damage_reason(stored, error)
                return None


class RowReader(Protocol):
    """Access to a range of rows, such as a row group or a record batch."""

    def values(self, column: str) -> list[Any]:
        """Return a small column, one value per row. Can raise anything."""

    def ids(self, column: str) -> list[str | None]:
        """Return a column of ids as text; None for a missing id. Can raise anything."""

    def images(self, rows: list[int]) -> Iterator[ImageOrReason]:
        """Yield the images of some rows, counted from 0, in ascending order."""

    def damage(self, error: Exception) -> str:
        """Return an exception of `values` as a reject reason. Raises storage faults."""


def row_ids(path: str, rows: range) -> list[str]:
    """Return the ids of rows of a file that have none of their own."""
    return [f"{path}#{row}" for row in rows]


def read_rows(
    reader: RowReader,
    columns: TableColumns,
    row_ids: Sequence[str],
    keep_id: IdFilter | None,
) -> Iterator[RawSample]:
    """Yield the samples of a range of rows.

    Parameters
    ----------
    reader : RowReader
        Access to the rows.
    columns : TableColumns
    row_ids : sequence of str
        The id of each row, unless a column holds ids.
    keep_id : callable, optional
        Yield only samples whose id passes; images of others are not read.
    """
    ids, id_reasons = _read_ids(reader, columns, row_ids)
    count = len(ids)
    chosen = [row for row in range(count) if keep_id is None or keep_id(ids[row])]
    if not chosen:
        return
    labels: list[Any] = [None] * count
    labels_reason = ""
    if columns.label is not None:
        try:
            labels = reader.values(columns.label)
        except Exception as error:
            labels_reason = f"label: {reader.damage(error)}"
    for row, (image, image_reason) in zip(chosen, reader.images(chosen), strict=True):
        label, label_reason = stored_label(labels[row])
        label = class_of(label, columns)
        reason = id_reasons[row] or image_reason or labels_reason or label_reason
        yield RawSample(ids[row], None if reason else image, label, reason)


def _read_ids(
    reader: RowReader, columns: TableColumns, row_ids: Sequence[str]
) -> tuple[Sequence[str], list[str]]:
    """Return the id of each row, and for a row without its own id the reason."""
    count = len(row_ids)
    reasons = [""] * count
    if columns.identity is None:
        return row_ids, reasons
    try:
        stored = reader.ids(columns.identity)
        reasons = [
            "" if value is not None else f"no id: {columns.identity} is null" for value in stored
        ]
        ids = [
            printable(value) if value is not None else row_ids[row]
            for row, value in enumerate(stored)
        ]
    except Exception as error:
        return row_ids, [f"no id: {reader.damage(error)}"] * count
    return ids, reasons


def class_of(label: int | str | None, columns: TableColumns) -> int | str | None:
    """Return a label as the name of its class, if the table names its classes.

    Files can number the same classes differently, so only names identify them. A number remains
    if names repeat, or if it has no name. The negative number that Hugging Face writes for an
    unknown class becomes None.
    """
    names = columns.class_names
    if names is None or not isinstance(label, int):
        return label
    if label < 0:
        return None
    return names[label] if label < len(names) and columns.has_distinct_names else label


def reject_repeated_ids(samples: Iterator[RawSample]) -> Iterator[RawSample]:
    """Yield the samples; one whose id occurred before becomes a reject."""
    seen: set[str] = set()
    for sample in samples:
        repeated = sample.sample_id in seen
        seen.add(sample.sample_id)
        if repeated:
            yield sample._replace(image=None, reason="duplicate id: an earlier row has it too")
        else:
            yield sample
