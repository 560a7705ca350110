"""Parquet files: one row per sample.

Images are encoded bytes, Hugging Face's struct<bytes, path>, or nested lists of pixels. Only the
required row groups and columns are read, a few megabytes (or one page, if that is more) at a time.
Folders named `key=value` are partition columns.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Iterator
from itertools import accumulate

import pyarrow as pa
import pyarrow.parquet as pq

from raypipe.sources.columns import ColumnError, Features, distinct_labels, features_of
from raypipe.sources.hive import padded_partition, partition_values, with_partitions
from raypipe.sources.parquet.reader import (
    RowGroup,
    columns_of,
    open_parquet,
    row_counts,
    split_of_file,
)
from raypipe.sources.table_source import TableSource, reject_repeated_ids
from raypipe.sources.types import FileScan, Fragment, IdFilter, Preview, RawSample, SourceFile
from raypipe.sources.values import damage_reason, stored_label
from raypipe.sources.versioned import refuse_versioned_table
from raypipe.storage import Reader


class ParquetSource(TableSource):
    """Rows of Parquet files.

    Sample ids are "<relative path>#<row number in the file>", or the id column's values.
    """

    format = "parquet"

    def files(self) -> Iterator[SourceFile]:
        remedy = "pass ray.data.read_{}(...) to raypipe.run"
        refuse_versioned_table(self.settings.uri, self._location, remedy)
        yield from super().files()

    def schema(self, path: str, stored: Reader) -> tuple[pa.Schema, Features]:
        schema = open_parquet(stored).schema_arrow
        return with_partitions(schema, path), features_of(schema)

    def scan_stored(self, file: SourceFile, stored: Reader) -> FileScan:
        settings = self.resolved_settings()
        try:
            parquet = open_parquet(stored)
            counts = row_counts(parquet, file.size)
            columns = columns_of(parquet, settings, file.path)
            used = (columns.label, columns.identity)
            split = split_of_file(parquet, used, functools.partial(damage_reason, stored))
        except ColumnError as error:
            # a file without rows loses no sample, whatever its columns
            if not parquet.metadata.num_rows:
                return FileScan(())
            return self.unreadable_file(file, error)
        except Exception as error:
            reason = f"not a readable Parquet file: {damage_reason(stored, error)}"
            return self.unreadable_file(file, reason)
        names = columns.class_names
        labels, padded = frozenset[int | str](), frozenset[str]()
        if names is None and columns.label is not None:
            labels = self._labels(stored, parquet, columns.label, file.path)
            if columns.label not in parquet.schema_arrow.names:
                padded = padded_partition(file.path, columns.label)
        fragments = self.cut_fragments(file, sum(counts), list(accumulate(counts)))
        return FileScan(fragments, names, labels, self.checked_split(split), padded)

    def read(self, fragment: Fragment, keep_id: IdFilter | None = None) -> Iterator[RawSample]:
        if not fragment.samples:
            return
        with self.open(fragment.path) as stored:
            yield from reject_repeated_ids(self._read(stored, fragment, keep_id))

    def preview(
        self, file: SourceFile, places: int, each: int, draw: random.Random, whole: bool
    ) -> Preview:
        from raypipe.sources.parquet.preview import preview

        complete = super().preview(file, places, each, draw, True) if whole else None
        uri, settings = self._location.uri(file.path), self.resolved_settings()
        found = preview(uri, settings, file, places, each, draw, complete)
        return dataclasses.replace(found, split=self.checked_split(found.split))

    def _read(
        self, stored: Reader, fragment: Fragment, keep_id: IdFilter | None
    ) -> Iterator[RawSample]:
        settings = self.resolved_settings()
        reason = "the file has fewer rows than when it was indexed"
        counts: list[int] = []
        try:
            parquet = open_parquet(stored)
            columns = columns_of(parquet, settings, fragment.path)
            counts = row_counts(parquet, None)
        except ColumnError as error:
            reason = str(error)
        except Exception as error:
            reason = f"not a readable Parquet file: {damage_reason(stored, error)}"
        first, position = 0, fragment.start
        for number, count in enumerate(counts):
            begin = max(fragment.start, first) - first
            end = min(fragment.stop, first + count) - first
            if begin < end:
                row_group = RowGroup(stored, parquet, columns, fragment.path, number, first)
                yield from row_group.samples(begin, end, keep_id)
                position = first + end
            first += count
        for row in range(position, fragment.stop):
            sample_id = f"{fragment.path}#{row}"
            if keep_id is None or keep_id(sample_id):
                yield RawSample(sample_id, None, None, reason)

    @staticmethod
    def _labels(
        stored: Reader, parquet: pq.ParquetFile, column: str, path: str
    ) -> frozenset[int | str]:
        """Return the distinct labels, without row groups in which they are damaged.

        Samples of such a row group become rejects.
        """
        if column not in parquet.schema_arrow.names:
            label, _ = stored_label(partition_values(path)[column])
            return frozenset() if label is None else frozenset({label})
        result: set[int | str] = set()
        for group in range(parquet.metadata.num_row_groups):
            try:
                for batch in parquet.iter_batches(65_536, [group], [column], use_threads=False):
                    result |= distinct_labels(batch.column(column))
            except Exception as error:
                damage_reason(stored, error)
        return frozenset(result)
