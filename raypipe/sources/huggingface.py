"""Hugging Face datasets: a `save_to_disk` folder, or a dataset of the hub.

The folder is local or on S3; `huggingface://user/name` is a dataset of the hub. pyarrow alone reads
the Arrow files of both, one record batch at a time; only the hub needs the package `datasets`.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pyarrow as pa

from raypipe import storage
from raypipe.config import SourceSettings
from raypipe.errors import RaypipeError, SourceError
from raypipe.sources.arrow_images import ImageOrReason, ReadByPath, image_reader
from raypipe.sources.arrow_types import encoded_array, id_texts, storage_array
from raypipe.sources.arrowstream import ArrowStream, Message
from raypipe.sources.columns import (
    ColumnError,
    Features,
    TableColumns,
    choose_columns,
    distinct_labels,
    features_of,
    split_of_rows,
)
from raypipe.sources.hub import (
    INFO_FILE,
    SCHEME,
    SPLITS_FILE,
    STATE_FILE,
    CachedDataset,
    choose_split,
    download_dataset,
)
from raypipe.sources.location import MISSING
from raypipe.sources.splits import split_column
from raypipe.sources.table_source import TableSource, read_rows, reject_repeated_ids, row_ids
from raypipe.sources.types import FileScan, Fragment, IdFilter, RawSample, SourceFile
from raypipe.sources.values import damage_reason, printable
from raypipe.storage import FileInfo, Reader


class HuggingFaceSource(TableSource):
    """Rows of Arrow files.

    Sample ids are "<relative path>#<row number in the file>", or the id column's values.
    """

    format = "huggingface"

    def __init__(self, settings: SourceSettings) -> None:
        super().__init__(settings)
        self._features: dict[str, dict[str, Any]] = {}

    def files(self) -> Iterator[SourceFile]:
        if self._hub is not None:
            sizes = {name: storage.info(path).size for name, path in self._hub.files.items()}
            files = [FileInfo(name, size, self._hub.revision) for name, size in sizes.items()]
        else:
            files = _saved_files(self.settings.uri, self.settings.split)
        included = [file for file in files if fnmatch.fnmatchcase(file.path, self.settings.include)]
        if not included:
            reason = (
                f"none of {len(files)} files matches source.include = "
                f"{self.settings.include!r}, such as {printable(files[0].path)}; correct it"
                if files
                else "the dataset has no rows"
            )
            raise SourceError(f"{self.settings.uri}: {reason}")
        for file in sorted(included, key=lambda file: file.path):
            yield SourceFile(file.path, file.size, file.stamp)

    def open(self, path: str) -> Reader:
        return storage.open_read(self._uri(path))

    def schema(self, path: str, stored: Reader) -> tuple[pa.Schema, Features]:
        return self._describe(path, ArrowStream(stored))

    def scan_stored(self, file: SourceFile, stored: Reader) -> FileScan:
        settings = self.resolved_settings()
        try:
            stream = ArrowStream(stored)
            columns = choose_columns(*self._describe(file.path, stream), settings)
        except ColumnError as error:
            return self.unreadable_file(file, error)
        except Exception as error:
            reason = f"not a readable Arrow file: {damage_reason(stored, error)}"
            return self.unreadable_file(file, reason)
        batches: list[Message] = []
        labels: set[int | str] = set()
        split = split_column(stream.schema.names, (columns.label, columns.identity))
        splits: set[object] = set()
        problem = ""
        try:
            for batch in stream.batches():
                batches.append(batch)
                if split is not None:
                    splits |= _batch_values(stored, stream, batch, split)
                if columns.class_names is None and columns.label is not None:
                    labels |= _batch_labels(stored, stream, batch, columns.label)
        except Exception as error:
            problem = damage_reason(stored, error)
        try:
            split_name = split_of_rows(splits)
        except ColumnError as error:
            return self.unreadable_file(file, error)
        fragments = self._cut_at_batches(file, stream, batches)
        if problem:
            rows = sum(batch.rows for batch in batches)
            fragments = (*fragments, self.unreadable_rest(file, rows, problem))
        return FileScan(
            fragments, columns.class_names, frozenset(labels), self.checked_split(split_name)
        )

    def read(self, fragment: Fragment, keep_id: IdFilter | None = None) -> Iterator[RawSample]:
        if not fragment.samples:
            return
        with self.open(fragment.path) as stored:
            yield from reject_repeated_ids(self._read(stored, fragment, keep_id))

    def _cut_at_batches(
        self, file: SourceFile, stream: ArrowStream, batches: list[Message]
    ) -> tuple[Fragment, ...]:
        """Fragments that end with record batches if possible, with the offsets of these."""
        stops = list(accumulate(batch.rows for batch in batches))
        fragments = self.cut_fragments(file, stops[-1] if stops else 0, stops)
        if stream.has_dictionaries:  # they precede the batches that need them: read from the start
            return fragments
        offsets = {
            stop - batch.rows: batch.offset
            for stop, batch in zip(stops, batches, strict=True)
            if batch.rows
        }
        return tuple(
            dataclasses.replace(fragment, offset=offsets.get(fragment.start, 0))
            for fragment in fragments
        )

    def _read(
        self, stored: Reader, fragment: Fragment, keep_id: IdFilter | None
    ) -> Iterator[RawSample]:
        settings = self.resolved_settings()
        reason = "the file has fewer rows than when it was indexed"
        position, first = fragment.start, fragment.start if fragment.offset else 0
        batches: Iterator[Message] = iter(())
        try:
            stream = ArrowStream(stored)
            columns = choose_columns(*self._describe(fragment.path, stream), settings)
            batches = stream.batches(fragment.offset)
        except ColumnError as error:
            reason = str(error)
        except Exception as error:
            reason = f"not a readable Arrow file: {damage_reason(stored, error)}"
        while position < fragment.stop:
            try:
                batch = next(batches)
            except StopIteration:
                break
            except Exception as error:
                reason = damage_reason(stored, error)
                break
            begin = max(fragment.start, first) - first
            end = min(fragment.stop, first + batch.rows) - first
            if begin < end:
                by_path = self._hub.content if self._hub is not None else None
                rows = _BatchRows(stored, stream, columns, batch, begin, end, by_path)
                own = row_ids(fragment.path, range(first + begin, first + end))
                yield from read_rows(rows, columns, own, keep_id)
                position = first + end
            first += batch.rows
        for row in range(position, fragment.stop):
            sample_id = f"{fragment.path}#{row}"
            if keep_id is None or keep_id(sample_id):
                yield RawSample(sample_id, None, None, reason)

    @property
    def _hub(self) -> CachedDataset | None:
        """The dataset of the hub, downloaded on the first use on a machine; None for a folder."""
        settings = self.settings
        if not settings.uri.startswith(SCHEME):
            return None
        return download_dataset(settings.uri, settings.config_name, settings.split)

    def _uri(self, path: str) -> str:
        if self._hub is None:
            return storage.join(self.settings.uri, path)
        if path not in self._hub.files:
            raise FileNotFoundError(path)
        return self._hub.files[path]

    def _describe(self, path: str, stream: ArrowStream) -> tuple[pa.Schema, Features]:
        """Return the schema, and the description of its columns.

        The description next to the file comes first, as in `datasets`; then that in the schema.
        """
        folder = self._uri(path).rpartition("/")[0]
        if folder not in self._features:
            try:
                features = storage.read_json(storage.join(folder, INFO_FILE))["features"]
            except (FileNotFoundError, RaypipeError, KeyError, TypeError):
                features = None
            self._features[folder] = features if isinstance(features, dict) else {}
        return stream.schema, self._features[folder] or features_of(stream.schema)


@dataclass(frozen=True)
class _BatchRows:
    """Rows `begin` to `end` of one record batch; a `RowReader`."""

    stored: Reader
    stream: ArrowStream
    columns: TableColumns
    batch: Message
    begin: int
    end: int
    by_path: ReadByPath | None

    def values(self, column: str) -> list[Any]:
        return storage_array(self._column(column)).to_pylist()

    def ids(self, column: str) -> list[str | None]:
        return id_texts(self._column(column), self.stream.schema.field(column)).to_pylist()

    def _column(self, column: str) -> pa.Array:
        array = self.stream.column(self.batch, column)
        return array.slice(self.begin, self.end - self.begin)

    def images(self, rows: list[int]) -> Iterator[ImageOrReason]:
        reader = image_reader(
            self.stream.schema.field(self.columns.image),
            self.by_path,
        )
        assert reader is not None  # choose_columns has checked the type
        try:
            array = encoded_array(self.stream.load(self.batch).column(self.columns.image))
        except Exception as error:
            reason = damage_reason(self.stored, error)
            yield from ((None, reason) for _ in rows)
            return
        for row in rows:
            yield reader(array[self.begin + row])

    def damage(self, error: Exception) -> str:
        return damage_reason(self.stored, error)


def _saved_files(uri: str, split: str | None) -> list[FileInfo]:
    """Return the Arrow files of a folder written by `save_to_disk`.

    One that does not exist has the stamp `MISSING`. Raises SourceError.
    """
    try:
        prefix, entries = "", storage.entries(uri)
        if SPLITS_FILE in entries:
            prefix = choose_split(uri, _read_names(uri, SPLITS_FILE, "splits"), split) + "/"
            entries = storage.entries(storage.join(uri, prefix))
        folder = storage.join(uri, prefix)
        if STATE_FILE not in entries:
            raise SourceError(
                f"{folder}: not a folder written by save_to_disk: it has no {STATE_FILE}"
            )
        state = storage.read_json(storage.join(folder, STATE_FILE))
        names = _read_names(folder, STATE_FILE, "_data_files", "filename")
    except OSError as error:
        raise SourceError(f"{uri}: cannot be read: {error}") from None
    if not prefix and split is not None and state.get("_split") != split:
        raise SourceError(
            f"{uri}: no split {split!r}: this is one dataset, of split {state.get('_split')!r}; "
            "leave out source.split"
        )
    if state.get("_indices_data_files"):
        raise SourceError(
            f"{uri}: a selection of rows that is stored separately from the rows; load it with "
            "datasets and save it again"
        )
    # a file counts once, however often it is named
    files = [entries.get(name) or FileInfo(name, 0, MISSING) for name in dict.fromkeys(names)]
    if files and all(file.stamp == MISSING for file in files):
        raise SourceError(
            f"{folder}: none of the {len(files)} files in {STATE_FILE} exists, such as {names[0]}"
        )
    return [FileInfo(prefix + file.path, file.size, file.stamp) for file in files]


def _read_names(folder: str, file: str, key: str, inner: str | None = None) -> list[str]:
    """Return a list of names in a JSON file: `file[key]`, or `item[inner]` of each item in it.

    Raises SourceError if it is something else, or a name leads out of the folder.
    """
    try:
        names = [
            item if inner is None else item[inner]
            for item in storage.read_json(storage.join(folder, file))[key]
        ]
    except (KeyError, TypeError) as error:
        raise SourceError(f"{folder}/{file}: not as save_to_disk writes it: {error}") from None
    for name in names:
        if not isinstance(name, str) or not name or "/" in name or name in {".", ".."}:
            raise SourceError(f"{folder}/{file}: {name!r} is not a name in this folder")
    return names


def _batch_values(stored: Reader, stream: ArrowStream, batch: Message, column: str) -> set[object]:
    """Return the distinct values of a small column in a batch; none if it is damaged."""
    try:
        return set(storage_array(stream.column(batch, column)).unique().to_pylist())
    except Exception as error:
        damage_reason(stored, error)
        return set()


def _batch_labels(
    stored: Reader, stream: ArrowStream, batch: Message, column: str
) -> set[int | str]:
    """Return the labels in a batch: an empty list if it is damaged, as its samples are rejects."""
    try:
        return distinct_labels(stream.column(batch, column))
    except Exception as error:
        damage_reason(stored, error)
        return set()
