"""Parquet files: one row per sample; images are encoded bytes, Hugging Face's struct<bytes, path>, or nested lists of pixels.

Only the row groups and columns that are needed are read, a few megabytes (or one page, where that is more) at a time.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raypipe.sources.base import FileScan, Fragment, IdFilter, Preview, RawSample, SourceFile
from raypipe.sources.columns import (
    ColumnError,
    TableSource,
    distinct_labels,
    features_of,
    once,
)
from raypipe.sources.common import damage
from raypipe.sources.parquet.reader import columns_of, open_parquet, read_group, row_groups
from raypipe.storage import Reader


class ParquetSource(TableSource):
    """Rows of Parquet files. Sample ids are "<relative path>#<row number in the file>", or the id column's values."""

    format = "parquet"

    def schema(self, path: str, stored: Reader) -> tuple[pa.Schema, dict[str, Any]]:
        schema = open_parquet(stored).schema_arrow
        return schema, features_of(schema)

    def scan_stored(self, file: SourceFile, stored: Reader) -> FileScan:
        settings = self.settled()
        try:
            parquet = open_parquet(stored)
            groups, columns = row_groups(parquet, file.size), columns_of(parquet, settings)
        except ColumnError as error:
            # a file without rows loses nothing, whatever its columns
            return self.broken(file, error) if parquet.metadata.num_rows else FileScan(())
        except Exception as error:
            return self.broken(file, f"not a readable Parquet file: {damage(stored, error)}")
        names = columns.class_names
        labels = frozenset[int | str]()
        if names is None and columns.label is not None:
            labels = self._labels(stored, parquet, columns.label)
        return FileScan(self.cut(file, sum(groups), list(accumulate(groups))), names, labels)

    def read(self, fragment: Fragment, wanted: IdFilter | None = None) -> Iterator[RawSample]:
        if not fragment.samples:
            return
        with self.open(fragment.path) as stored:
            yield from once(self._read(stored, fragment, wanted))

    def preview(
        self, file: SourceFile, places: int, each: int, draw: random.Random, whole: bool
    ) -> Preview:
        from raypipe.sources.parquet.preview import preview

        found = super().preview(file, places, each, draw, True) if whole else None
        return preview(
            self._location.uri(file.path), self.settled(), file, places, each, draw, found
        )

    def _read(
        self, stored: Reader, fragment: Fragment, wanted: IdFilter | None
    ) -> Iterator[RawSample]:
        settings, reason = self.settled(), "the file has fewer rows than when it was indexed"
        groups: list[int] = []
        try:
            parquet = open_parquet(stored)
            columns, groups = columns_of(parquet, settings), row_groups(parquet, None)
        except ColumnError as error:
            reason = str(error)
        except Exception as error:
            reason = f"not a readable Parquet file: {damage(stored, error)}"
        first, position = 0, fragment.start
        for group, count in enumerate(groups):
            begin, end = (
                max(fragment.start, first) - first,
                min(fragment.stop, first + count) - first,
            )
            if begin < end:
                yield from read_group(
                    stored, parquet, columns, fragment.path, group, first, begin, end, wanted
                )
                position = first + end
            first += count
        for row in range(position, fragment.stop):
            sample_id = f"{fragment.path}#{row}"
            if wanted is None or wanted(sample_id):
                yield RawSample(sample_id, None, None, reason)

    @staticmethod
    def _labels(stored: Reader, parquet: pq.ParquetFile, column: str) -> frozenset[int | str]:
        """The distinct labels. Row groups whose labels are damaged are left out; their samples become rejects."""
        result: set[int | str] = set()
        for group in range(parquet.metadata.num_row_groups):
            try:
                for batch in parquet.iter_batches(65_536, [group], [column], use_threads=False):
                    result |= distinct_labels(batch.column(column))
            except Exception as error:
                damage(stored, error)
        return frozenset(result)
