"""Preview one Parquet file: the first rows of random row groups, and label counts.

Labels are counted from their column alone.
"""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import pyarrow.parquet as pq

from raypipe.config import SourceSettings
from raypipe.sources.arrow_images import image_reader
from raypipe.sources.arrow_types import encoded_array, storage_array
from raypipe.sources.columns import ColumnError, TableColumns
from raypipe.sources.filesource import FILE_VANISHED, no_content, other_content
from raypipe.sources.hive import partition_values
from raypipe.sources.parquet.reader import (
    RowGroup,
    columns_of,
    open_parquet,
    row_counts,
    split_of_file,
)
from raypipe.sources.table_source import class_of
from raypipe.sources.types import Preview, RawSample, SourceFile
from raypipe.sources.values import damage_reason, printable, stored_label
from raypipe.storage import Reader, open_read

REQUEST_BYTES = 1 << 20
"""Approximate bytes of one request, and of the images read at one place."""
LABEL_GROUPS = 8
"""Row groups whose labels are counted, in a file that is not read whole."""


def preview(
    uri: str,
    settings: SourceSettings,
    file: SourceFile,
    places: int,
    each: int,
    draw: random.Random,
    complete: Preview | None,
) -> Preview:
    """Return the preview of a file; see `Source.preview`.

    Parameters
    ----------
    uri : str
        URI of the file.
    settings : SourceSettings
        With resolved columns.
    file, places, each, draw
        As for `Source.preview`.
    complete : Preview or None
        What `Source.preview` returned for a file that is read whole. Only its labels are counted
        here.
    """
    reason = no_content(file)
    if reason or (complete is not None and complete.error):
        return complete or Preview(error=reason)
    try:
        opened = open_read(uri, REQUEST_BYTES)
    except FileNotFoundError:
        return Preview(error=FILE_VANISHED)
    with opened as stored:
        if reason := other_content(file, stored):
            return Preview(error=reason)
        try:
            parquet = open_parquet(stored, REQUEST_BYTES)
            counts = row_counts(parquet, file.size)
            columns = columns_of(parquet, settings, file.path)
            used = (columns.label, columns.identity)
            split = split_of_file(parquet, used, functools.partial(damage_reason, stored))
        except ColumnError as error:
            return Preview(error=str(error))
        except Exception as error:
            return Preview(error=f"not a readable Parquet file: {damage_reason(stored, error)}")
        groups = [group for group, count in enumerate(counts) if count]
        if complete is not None:
            labels = _label_counts(stored, parquet, columns, file.path, groups)
            return replace(complete, labels=labels)
        labelled = draw.sample(groups, min(len(groups), LABEL_GROUPS))
        labels = _label_counts(stored, parquet, columns, file.path, labelled)
        drawn: list[RawSample] = []
        starts = list(accumulate(counts, initial=0))
        for number in draw.sample(groups, min(len(groups), places)):
            group = RowGroup(stored, parquet, columns, file.path, number, starts[number])
            limit = REQUEST_BYTES / max(1.0, group.row_bytes)
            drawn += _first_rows(group, int(max(1, min(each, counts[number], limit))))
    return Preview(tuple(drawn), sum(counts), True, labels, columns.class_names, split=split)


def _first_rows(group: RowGroup, count: int) -> list[RawSample]:
    """Return the first `count` rows of a row group. Reads fewer rows at a time than a run does."""
    columns = group.columns
    reader = image_reader(group.parquet.schema_arrow.field(columns.image))
    assert reader is not None  # choose_columns has checked the type
    try:
        batches = group.parquet.iter_batches(
            count, [group.number], [columns.image], use_threads=False
        )
        array = encoded_array(next(batches).column(columns.image))
        images = [reader(array[row]) for row in range(count)]
        stored_labels = (
            group.values(columns.label, 0, count) if columns.label is not None else [None] * count
        )
        labels = [stored_label(value) for value in stored_labels]
        ids = [f"{group.path}#{group.first + row}" for row in range(count)]
        if columns.identity is not None:
            values = group.ids(columns.identity, 0, count)
            if None in values:
                return list(group.samples(0, count, None))
            ids = [printable(value) for value in values if value is not None]
    except Exception as error:
        damage_reason(group.stored, error)
        # read as in a run, which finds out what is wrong with which row
        return list(group.samples(0, count, None))
    return [
        RawSample(
            sample_id,
            None if image_reason or label_reason else image,
            class_of(label, columns),
            image_reason or label_reason,
        )
        for sample_id, (image, image_reason), (label, label_reason) in zip(
            ids, images, labels, strict=True
        )
    ]


def _label_counts(
    stored: Reader,
    parquet: pq.ParquetFile,
    columns: TableColumns,
    path: str,
    groups: Sequence[int],
) -> Counter[int | str | None]:
    """Count the samples by label in some row groups.

    Row groups in which the labels are damaged do not count: their samples become rejects.
    """
    result = Counter[int | str | None]()
    rows = sum(parquet.metadata.row_group(group).num_rows for group in groups)
    if columns.label is None:
        return Counter({None: rows})
    if columns.label not in parquet.schema_arrow.names:
        label, _ = stored_label(partition_values(path)[columns.label])
        return Counter({label: rows})
    for group in groups:
        counts = Counter[int | str | None]()
        try:
            for batch in parquet.iter_batches(65_536, [group], [columns.label], use_threads=False):
                column = storage_array(batch.column(columns.label))
                for item in column.value_counts().to_pylist():
                    label, reason = stored_label(item["values"])
                    counts[class_of(label, columns)] += 0 if reason else item["counts"]
        except Exception as error:
            damage_reason(stored, error)
            continue
        result += counts
    return result
