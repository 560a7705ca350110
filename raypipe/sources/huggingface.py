"""Hugging Face datasets: a folder written by `save_to_disk`, local or on S3, or a dataset of the hub (`huggingface://user/name`).

The Arrow files of both are read by pyarrow alone, a record batch at a time; only the hub needs the package `datasets`.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import pyarrow as pa

from raypipe import storage
from raypipe.config import SourceSettings
from raypipe.errors import RaypipeError, SourceError
from raypipe.sources.arrowstream import ArrowStream, Message
from raypipe.sources.base import FileScan, Fragment, IdFilter, RawSample, SourceFile
from raypipe.sources.columns import (
    ColumnError,
    Columns,
    Image,
    TableSource,
    choose,
    distinct_labels,
    features_of,
    image_reader,
    once,
    plain,
    rows,
)
from raypipe.sources.common import MISSING, damage
from raypipe.sources.hub import DICT, INFO, SCHEME, STATE, Prepared, choose_split, prepared
from raypipe.storage import FileInfo, Reader


class HuggingFaceSource(TableSource):
    """Rows of Arrow files. Sample ids are "<relative path>#<row number in the file>", or the id column's values."""

    format = "huggingface"

    def __init__(self, settings: SourceSettings) -> None:
        super().__init__(settings)
        self._features: dict[str, dict[str, Any]] = {}

    def files(self) -> Iterator[SourceFile]:
        if self._hub is not None:
            sizes = {name: storage.info(path).size for name, path in self._hub.files.items()}
            found = [FileInfo(name, size, self._hub.revision) for name, size in sizes.items()]
        else:
            found = _saved(self.settings.uri, self.settings.split)
        kept = [file for file in found if fnmatch.fnmatchcase(file.path, self.settings.include)]
        if not kept:
            reason = (
                f"none of {len(found)} files matches source.include"
                if found
                else "the dataset has no rows"
            )
            raise SourceError(f"{self.settings.uri}: {reason}")
        for file in sorted(kept, key=lambda file: file.path):
            yield SourceFile(file.path, file.size, file.stamp)

    def open(self, path: str) -> Reader:
        return storage.open_read(self._uri(path))

    def schema(self, path: str, stored: Reader) -> tuple[pa.Schema, dict[str, Any]]:
        return self._described(path, ArrowStream(stored))

    def scan_stored(self, file: SourceFile, stored: Reader) -> FileScan:
        settings = self.settled()
        try:
            stream = ArrowStream(stored)
            columns = choose(*self._described(file.path, stream), settings)
        except ColumnError as error:
            return self.broken(file, error)
        except Exception as error:
            return self.broken(file, f"not a readable Arrow file: {damage(stored, error)}")
        batches: list[Message] = []
        labels: set[int | str] = set()
        problem = ""
        try:
            for batch in stream.batches():
                batches.append(batch)
                if columns.class_names is None and columns.label is not None:
                    labels |= _labels(stored, stream, batch, columns.label)
        except Exception as error:
            problem = damage(stored, error)
        stops = list(accumulate(batch.rows for batch in batches))
        fragments = self.cut(file, stops[-1] if stops else 0, stops)
        if not stream.has_dictionaries:  # which come before the batches that need them
            starts = {
                stop - batch.rows: batch.offset
                for stop, batch in zip(stops, batches, strict=True)
                if batch.rows
            }
            fragments = tuple(
                dataclasses.replace(part, offset=starts.get(part.start, 0)) for part in fragments
            )
        if problem:
            end = stops[-1] if stops else 0
            (rest,) = self.broken(file, f"from row {end} on: {problem}").fragments
            rest = dataclasses.replace(
                rest, fragment_id=self.fragment_id(file, end, end), start=end, stop=end
            )
            fragments = (*fragments, rest)
        return FileScan(fragments, columns.class_names, frozenset(labels))

    def read(self, fragment: Fragment, wanted: IdFilter | None = None) -> Iterator[RawSample]:
        if not fragment.samples:
            return
        with self.open(fragment.path) as stored:
            yield from once(self._read(stored, fragment, wanted))

    def _read(
        self, stored: Reader, fragment: Fragment, wanted: IdFilter | None
    ) -> Iterator[RawSample]:
        settings, reason = self.settled(), "the file has fewer rows than when it was indexed"
        position, first = fragment.start, fragment.start if fragment.offset else 0
        batches: Iterator[Message] = iter(())
        try:
            stream = ArrowStream(stored)
            columns = choose(*self._described(fragment.path, stream), settings)
            batches = stream.batches(fragment.offset)
        except ColumnError as error:
            reason = str(error)
        except Exception as error:
            reason = f"not a readable Arrow file: {damage(stored, error)}"
        while position < fragment.stop:
            try:
                batch = next(batches)
            except StopIteration:
                break
            except Exception as error:
                reason = damage(stored, error)
                break
            begin, end = (
                max(fragment.start, first) - first,
                min(fragment.stop, first + batch.rows) - first,
            )
            if begin < end:
                yield from self._batch(
                    stored, stream, columns, fragment.path, batch, first, begin, end, wanted
                )
                position = first + end
            first += batch.rows
        for row in range(position, fragment.stop):
            sample_id = f"{fragment.path}#{row}"
            if wanted is None or wanted(sample_id):
                yield RawSample(sample_id, None, None, reason)

    def _batch(
        self,
        stored: Reader,
        stream: ArrowStream,
        columns: Columns,
        path: str,
        batch: Message,
        first: int,
        begin: int,
        end: int,
        wanted: IdFilter | None,
    ) -> Iterator[RawSample]:
        """Samples of rows `begin` to `end` of one record batch, whose first row is row `first` of the file."""

        def values(name: str) -> list[Any]:
            return plain(stream.column(batch, name)).slice(begin, end - begin).to_pylist()

        def images(chosen: list[int]) -> Iterator[Image]:
            reader = image_reader(
                stream.schema.field(columns.image).type,
                self._hub.content if self._hub is not None else None,
            )
            assert reader is not None  # the schema has been checked
            try:
                array, reason = plain(stream.load(batch).column(columns.image)), ""
            except Exception as error:
                array, reason = None, damage(stored, error)
            for row in chosen:
                yield (None, reason) if array is None else reader(array[begin + row])

        return rows(
            columns,
            path,
            first + begin,
            end - begin,
            values=values,
            images=images,
            damaged=lambda error: damage(stored, error),
            wanted=wanted,
        )

    @property
    def _hub(self) -> Prepared | None:
        """The dataset of the hub, downloaded by the first who asks on a machine; None for a folder."""
        settings = self.settings
        return (
            prepared(settings.uri, settings.config_name, settings.split)
            if settings.uri.startswith(SCHEME)
            else None
        )

    def _uri(self, path: str) -> str:
        if self._hub is None:
            return storage.join(self.settings.uri, path)
        if path not in self._hub.files:
            raise FileNotFoundError(path)
        return self._hub.files[path]

    def _described(self, path: str, stream: ArrowStream) -> tuple[pa.Schema, dict[str, Any]]:
        """Schema, and the description of its columns: that of the folder, which `datasets` goes by, else the schema's."""
        folder = self._uri(path).rpartition("/")[0]
        if folder not in self._features:
            try:
                features = storage.read_json(storage.join(folder, INFO))["features"]
            except (FileNotFoundError, RaypipeError, KeyError, TypeError):
                features = None
            self._features[folder] = features if isinstance(features, dict) else {}
        return stream.schema, self._features[folder] or features_of(stream.schema)


def _saved(uri: str, split: str | None) -> list[FileInfo]:
    """The Arrow files of a folder written by `save_to_disk`; one that is not there has the stamp `MISSING`. Raises SourceError."""
    try:
        prefix, entries = "", storage.entries(uri)
        if DICT in entries:
            prefix = choose_split(uri, _strings(uri, DICT, "splits"), split) + "/"
            entries = storage.entries(storage.join(uri, prefix))
        folder = storage.join(uri, prefix)
        if STATE not in entries:
            raise SourceError(f"{folder}: no folder written by save_to_disk: there is no {STATE}")
        state = storage.read_json(storage.join(folder, STATE))
        names = _strings(folder, STATE, "_data_files", "filename")
    except OSError as error:
        raise SourceError(f"{uri}: cannot be read: {error}") from None
    if not prefix and split is not None and state.get("_split") != split:
        raise SourceError(
            f"{uri}: no split {split!r}: this is one dataset, of split {state.get('_split')!r}; leave out source.split"
        )
    if state.get("_indices_data_files"):
        raise SourceError(
            f"{uri}: a selection of rows that is stored apart from the rows; load it and save it again"
        )
    found = [entries.get(name) or FileInfo(name, 0, MISSING) for name in names]
    if found and all(file.stamp == MISSING for file in found):
        raise SourceError(
            f"{folder}: none of the {len(found)} files in {STATE} is there, such as {names[0]}"
        )
    return [FileInfo(prefix + file.path, file.size, file.stamp) for file in found]


def _strings(folder: str, file: str, key: str, inner: str | None = None) -> list[str]:
    """A list of names in a JSON file. Raises SourceError when it is none, or has names that lead out of the folder."""
    try:
        found = [
            item if inner is None else item[inner]
            for item in storage.read_json(storage.join(folder, file))[key]
        ]
    except (KeyError, TypeError) as error:
        raise SourceError(f"{folder}/{file}: not as save_to_disk writes it: {error}") from None
    wrong = [
        name
        for name in found
        if not isinstance(name, str) or not name or "/" in name or name in {".", ".."}
    ]
    if wrong:
        raise SourceError(
            f"{folder}/{file}: {wrong[0]!r} is not the name of anything in this folder"
        )
    return found


def _labels(stored: Reader, stream: ArrowStream, batch: Message, column: str) -> set[int | str]:
    """The labels that occur in a batch; none where it is damaged, since its samples become rejects."""
    try:
        return distinct_labels(stream.column(batch, column))
    except Exception as error:
        damage(stored, error)
        return set()
