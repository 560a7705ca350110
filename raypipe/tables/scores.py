"""Read tables of scores: Parquet files with one row per scored sample."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from raypipe.errors import SourceError
from raypipe.sources.arrow_types import id_texts, storage_array, value_type
from raypipe.tables.files import ID, check_id, column_field, opened, stored_files
from raypipe.tables.problems import ProblemCounts, shortened


def read_scores(uri: str, column: str, problems: ProblemCounts) -> pa.Table:
    """Read the scores of all scored samples.

    A score that is null, NaN, infinite or too large for float32 counts as missing.

    Parameters
    ----------
    uri : str
        File or folder.
    column : str
        Column of the scores.
    problems : ProblemCounts
        Receives the problems.

    Returns
    -------
    pyarrow.Table
        `sample_id` string and `score` float32, one row per sample, sorted by id.

    Raises
    ------
    SourceError
        If a column is missing or of a wrong type, a sample has two different scores, or no score is
        left.
    """
    parts = [pa.table({ID: pa.array([], pa.string()), "score": pa.array([], pa.float64())})]
    for file, info in stored_files(uri):
        parts += _valid_scores(file, info.path, column, problems)
    table = pa.concat_tables(parts)
    if not len(table):
        raise SourceError(f"{uri}: no sample has a finite score in column {column!r}")
    table = table.group_by(ID, use_threads=False).aggregate(
        [("score", "min"), ("score", "max"), ("score", "count")]
    )
    table = table.sort_by(ID)
    conflicting = table.filter(pc.not_equal(table["score_min"], table["score_max"]))[ID].to_pylist()
    if conflicting:
        count = len(conflicting)
        raise SourceError(
            f"{uri}: samples with conflicting scores: {count:,} ({shortened(conflicting, count)}); "
            "keep one score per sample"
        )
    repeated = table.filter(pc.greater(table["score_count"], 1))[ID].to_pylist()
    problems.add("score_repeated", repeated)
    return pa.table(
        {
            ID: table[ID].combine_chunks(),
            "score": pc.cast(table["score_min"], pa.float32()).combine_chunks(),
        }
    )


def _valid_scores(uri: str, path: str, column: str, problems: ProblemCounts) -> Iterator[pa.Table]:
    """Read ids and scores, float64, of the rows of one file that have both."""
    first = 0
    with opened(uri) as parquet:
        schema = parquet.schema_arrow
        check_id(uri, schema)
        kind = column_field(uri, schema, column).type
        plain = value_type(kind)
        if not (pt.is_floating(plain) or pt.is_integer(plain) or pt.is_decimal(plain)):
            raise SourceError(f"{uri}: column {column!r} is {kind}; expected numbers")
        for batch in parquet.iter_batches(1 << 16, columns=sorted({ID, column}), use_threads=False):
            ids = id_texts(batch.column(ID), schema.field(ID))
            has_id = ids.is_valid().to_numpy(zero_copy_only=False)
            with np.errstate(over="ignore"):
                score = pc.cast(
                    storage_array(batch.column(column)), pa.float64(), safe=False
                ).to_numpy(zero_copy_only=False)
                finite = np.isfinite(score.astype(np.float32))
            rows_without_id = np.flatnonzero(~has_id)
            problems.add("score_without_id", (f"{path}#{first + row}" for row in rows_without_id))
            problems.add("score_not_finite", ids.filter(pa.array(has_id & ~finite)).to_pylist())
            valid = pa.array(has_id & finite)
            yield pa.table({ID: ids.filter(valid), "score": pa.array(score).filter(valid)})
            first += len(batch)
