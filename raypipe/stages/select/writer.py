"""Write one keep-list."""

from __future__ import annotations

import contextlib
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raypipe import storage
from raypipe.errors import StageError
from raypipe.runs.keep_files import keep_file
from raypipe.runs.run import Run
from raypipe.selection import Chunk, Selection
from raypipe.selection.hashing import string_array

GROUP_ROWS = 1 << 16
"""Rows of a keep-list that are held before they are written."""
SCHEMA = pa.schema([("sample_id", pa.string()), ("label", pa.int32()), ("score", pa.float32())])
WEIGHT = pa.field("weight", pa.float32())
"""One more column, with `select.weights`."""


class KeepListWriter:
    """Context manager that writes one keep-list; the file appears only when it is complete.

    Attributes
    ----------
    selection : Selection
        Which samples are kept.
    file : str
        Name of the file.
    """

    def __init__(self, run: Run, selection: Selection, metadata: dict[str, str]) -> None:
        self.selection, self.file = selection, keep_file(selection.fraction)
        self._uri = run.keep_list(self.file)
        about = {"fraction": repr(selection.fraction), "count": str(selection.count), **metadata}
        schema = SCHEMA if selection.weights is None else SCHEMA.append(WEIGHT)
        self._schema = schema.with_metadata(
            {f"raypipe.{key}": value for key, value in sorted(about.items())}
        )
        self._held: list[pa.Table] = []
        self._held_rows = self._written_rows = 0

    def __enter__(self) -> KeepListWriter:
        self._upload = storage.Upload(self._uri)
        file: IO[bytes] = self._upload.__enter__()
        self._writer = pq.ParquetWriter(file, self._schema, compression="zstd")
        return self

    def add(self, chunk: Chunk) -> None:
        """Write the kept samples of a chunk, which has ids."""
        rows = np.flatnonzero(self.selection.mask(chunk))
        columns = [
            string_array(chunk.sample_id).take(pa.array(rows)),
            pa.array(chunk.label[rows], pa.int32(), mask=chunk.label[rows] < 0),
            pa.array(chunk.score[rows]),
        ]
        weight = self.selection.weight(chunk, rows)
        if weight is not None:
            columns.append(pa.array(weight))
        self._held.append(pa.table(columns, schema=self._schema))
        self._held_rows += len(rows)
        if self._held_rows >= GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._held_rows:
            self._writer.write_table(pa.concat_tables(self._held), row_group_size=GROUP_ROWS)
        self._written_rows += self._held_rows
        self._held, self._held_rows = [], 0

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: object
    ) -> None:
        if kind is not None:
            with contextlib.suppress(Exception):  # the first error is already being raised
                self._writer.close()
            self._upload.__exit__(kind, value, trace)
            return
        try:
            self._flush()
            self._writer.close()
            self._check_rows()
        except BaseException as error:
            self._upload.__exit__(type(error), error, error.__traceback__)
            raise
        self._upload.__exit__(None, None, None)

    def _check_rows(self) -> None:
        """Raise StageError when the list has more or fewer samples than it should."""
        if self._written_rows != self.selection.count:
            raise StageError(
                f"{self._uri}: {self._written_rows} samples instead of {self.selection.count}; "
                "scores/ may have sample_ids that occur twice. Score the source again"
            )
