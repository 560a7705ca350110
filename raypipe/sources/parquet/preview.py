"""A look into one Parquet file: the beginnings of random row groups, and labels counted from their column alone."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import pyarrow.parquet as pq

from raypipe.config import SourceSettings
from raypipe.sources.base import Preview, RawSample, SourceFile
from raypipe.sources.columns import ColumnError, Columns, image_reader, plain
from raypipe.sources.common import damage, stored_label, text, without_content
from raypipe.sources.parquet.reader import (
    columns_of,
    open_parquet,
    read_group,
    read_values,
    row_groups,
)
from raypipe.storage import Reader, open_read

REQUEST_BYTES = 1 << 20
"""Bytes of one request, and of the images read at one place, about."""
LABEL_GROUPS = 8
"""Row groups of a file whose labels are counted, where it is not looked at whole."""


def preview(
    uri: str,
    settings: SourceSettings,
    file: SourceFile,
    places: int,
    each: int,
    draw: random.Random,
    found: Preview | None,
) -> Preview:
    """See `Source.preview`; `found` is what that gives for a file that is read whole, whose labels are counted here."""
    reason = without_content(file)
    if reason or (found is not None and found.error):
        return found or Preview(error=reason)
    try:
        opened = open_read(uri, REQUEST_BYTES)
    except FileNotFoundError:
        return Preview(error="no such file: deleted since it was listed, or its name is not UTF-8")
    with opened as stored:
        try:
            parquet = open_parquet(stored, REQUEST_BYTES)
            rows, columns = row_groups(parquet, file.size), columns_of(parquet, settings)
        except ColumnError as error:
            return Preview(error=str(error))
        except Exception as error:
            return Preview(error=f"not a readable Parquet file: {damage(stored, error)}")
        groups = [group for group, count in enumerate(rows) if count]
        counted = (
            groups if found is not None else draw.sample(groups, min(len(groups), LABEL_GROUPS))
        )
        labels = _labels(stored, parquet, columns, counted)
        if found is not None:
            return replace(found, labels=labels)
        drawn: list[RawSample] = []
        starts = list(accumulate(rows, initial=0))
        for group in draw.sample(groups, min(len(groups), places)):
            row_bytes = parquet.metadata.row_group(group).total_byte_size / rows[group]
            count = int(max(1, min(each, rows[group], REQUEST_BYTES / max(1.0, row_bytes))))
            drawn += _first(stored, parquet, columns, file.path, group, starts[group], count)
    return Preview(tuple(drawn), sum(rows), True, labels, columns.class_names)


def _first(
    stored: Reader,
    parquet: pq.ParquetFile,
    columns: Columns,
    path: str,
    group: int,
    first: int,
    count: int,
) -> list[RawSample]:
    """The first rows of a row group, whose first is row `first` of the file. A run reads more rows at a time than are wanted here."""
    reader = image_reader(parquet.schema_arrow.field(columns.image).type)
    assert reader is not None  # the schema has been checked
    try:
        batch = plain(
            next(parquet.iter_batches(count, [group], [columns.image], use_threads=False)).column(
                columns.image
            )
        )
        images = [reader(batch[row]) for row in range(count)]
        told = (
            read_values(parquet, group, columns.label, 0, count)
            if columns.label is not None
            else [None] * count
        )
        labels = [stored_label(value) for value in told]
        ids = [f"{path}#{first + row}" for row in range(count)]
        if columns.identity is not None:
            ids = [
                text(str(value))
                for value in read_values(parquet, group, columns.identity, 0, count)
            ]
    except Exception as error:
        damage(stored, error)
        return list(
            read_group(stored, parquet, columns, path, group, first, 0, count, None)
        )  # says what is wrong with which row
    if columns.class_names is not None:
        labels = [
            (None if isinstance(label, int) and label < 0 else label, wrong)
            for label, wrong in labels
        ]
    return [
        RawSample(sample_id, None if reason or wrong else image, label, reason or wrong)
        for sample_id, (image, reason), (label, wrong) in zip(ids, images, labels, strict=True)
    ]


def _labels(
    stored: Reader, parquet: pq.ParquetFile, columns: Columns, groups: Sequence[int]
) -> Counter[int | str | None]:
    """How often each label occurs in some row groups, but for those whose labels are damaged: their samples become rejects."""
    result = Counter[int | str | None]()
    if columns.label is None:
        return Counter({None: sum(parquet.metadata.row_group(group).num_rows for group in groups)})
    negative_is_missing = columns.class_names is not None
    for group in groups:
        found = Counter[int | str | None]()
        try:
            for batch in parquet.iter_batches(65_536, [group], [columns.label], use_threads=False):
                for item in plain(batch.column(columns.label)).value_counts().to_pylist():
                    label, wrong = stored_label(item["values"])
                    missing = negative_is_missing and isinstance(label, int) and label < 0
                    found[None if missing else label] += 0 if wrong else item["counts"]
        except Exception as error:
            damage(stored, error)
            continue
        result += found
    return result
