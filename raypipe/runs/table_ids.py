"""Compare the ids of `embed.from` with some samples of the source, before anything is trained.

Only the id column is read, and of a very large table only some row groups.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raypipe.config import SourceSettings
from raypipe.errors import ConfigError
from raypipe.runs.embedding_table import ID, SHOWN_IDS, opened, table_files
from raypipe.runs.rejects import ERROR_PROBABILITY, MIN_REJECTS
from raypipe.sources import Source, SourceFile, open_source
from raypipe.sources.arrow_types import id_texts
from raypipe.text import percent

FILES, PLACES, EACH = 8, 32, 8
"""Files of the source that are looked into, places in all of them, and samples at each place."""
MAX_FIRST = 10_000
"""Samples that are looked up if `source.limit` takes the first ones."""
MAX_ROWS = 5_000_000
"""Rows after which no more row groups are read."""


@dataclass(frozen=True)
class IdComparison:
    """Which samples have a row in a table.

    Attributes
    ----------
    table : str
        URI of the table.
    drawn : int
        Samples of the source that were looked up.
    missing : tuple of str
        Ids of those without a row.
    own : tuple of str
        A few ids of the table.
    rows : int
        Rows whose ids were read.
    share : float
        What share of all rows that is, about; 1 for every row.
    """

    table: str
    drawn: int
    missing: tuple[str, ...]
    own: tuple[str, ...]
    rows: int
    share: float

    def foreign(self, samples: int) -> int:
        """Return the number of rows without a sample, estimated for a source of `samples`."""
        if self.share < 1 or not self.drawn:
            return 0
        matched = round(samples * (1 - len(self.missing) / self.drawn))
        return max(0, self.rows - matched)

    def note(self, fraction: float, places: int) -> tuple[str, bool]:
        """Return a sentence on samples without a row, and whether it is clear that a run stops.

        The sentence is "" if nothing is missing, or if that cannot be known from a part of the
        table.

        Parameters
        ----------
        fraction : float
            `source.max_reject_fraction`.
        places : int
            Places of the source that the samples are from. Samples of one place resemble one
            another.
        """
        count = len(self.missing)
        if not count:
            return "", False
        if self.share < 1 and (
            count < self.drawn or (1 - self.share) ** places > ERROR_PROBABILITY
        ):
            return "", False  # the rows can be in the part that was not read
        share = count / self.drawn
        stops = count >= MIN_REJECTS and _lower_bound(share, places) > fraction
        text = (
            f"embed.from: {self.table} has no row for {count:,} of {self.drawn:,} samples drawn "
            f"from the source ({percent(share)}), such as {', '.join(self.missing[:SHOWN_IDS])}; "
            f"its ids are such as {', '.join(self.own) or 'none'}. "
        )
        if self.share < 1:
            text += f"{self.rows:,} of its rows were read. "
        if share <= fraction:
            return text + "Samples without an embedding are rejected", False
        text += f"source.max_reject_fraction allows {100 * fraction:g} %. Fix the ids of the table"
        if count < self.drawn:
            text += f", or set source.max_reject_fraction to more than {share:.2g}"
        return text, stops


def some_ids(settings: SourceSettings) -> list[str]:
    """Return ids of samples from random places of a few files; with a limit, the first ones.

    Raises
    ------
    SourceError
        If the source cannot be read.
    """
    source, draw = open_source(settings), random.Random(0)
    files = list(source.files())
    if settings.limit is not None:
        return _first_ids(source, files, min(settings.limit, MAX_FIRST))
    chosen = draw.sample(files, min(FILES, len(files)))
    return [
        sample.sample_id
        for file in chosen
        for sample in source.preview(file, PLACES // len(chosen), EACH, draw, False).drawn
    ]


def _first_ids(source: Source, files: Sequence[SourceFile], count: int) -> list[str]:
    """Return the ids of the first samples, without their images."""
    result: list[str] = []

    def skip(sample_id: str) -> bool:
        result.append(sample_id)
        return False

    for file in files:
        for fragment in source.scan(file).fragments:
            if len(result) >= count:
                return result[:count]
            deque(source.read(fragment, skip), maxlen=0)
    return result[:count]


def compare_ids(uri: str, ids: Sequence[str]) -> IdComparison:
    """Look up the ids of some samples in a table.

    Raises
    ------
    ConfigError
        If a file of the table is not readable, or one of the ids occurs twice.
    """
    drawn = pa.array(dict.fromkeys(ids), pa.string())
    counts, rows = np.zeros(len(drawn), np.int64), 0
    own: list[str] = []
    order, files = random.Random(0), table_files(uri)
    opened_rows = opened_bytes = 0
    for file, info in order.sample(files, len(files)):
        if rows >= MAX_ROWS:
            break
        with opened(file) as parquet:
            field, groups = parquet.schema_arrow.field(ID), parquet.metadata.num_row_groups
            opened_rows += parquet.metadata.num_rows
            opened_bytes += info.size
            for group in order.sample(range(groups), groups):
                if rows >= MAX_ROWS:
                    break
                column = parquet.read_row_group(group, [ID], use_threads=False)[ID]
                found = id_texts(column.combine_chunks(), field).drop_null()
                own = own or found[:SHOWN_IDS].to_pylist()
                places = pc.index_in(found, value_set=drawn).drop_null()
                counts += np.bincount(places.to_numpy(), minlength=len(drawn))
                rows += len(column)
    # files that were not opened are assumed to have as many rows per byte as the others
    total = opened_rows * sum(info.size for _, info in files) / max(1, opened_bytes)
    names = drawn.to_pylist()
    if twice := [name for name, count in zip(names, counts, strict=True) if count > 1]:
        raise ConfigError(
            f"embed.from: {len(twice):,} of {len(names):,} ids drawn from the source occur more "
            f"than once, such as {', '.join(twice[:SHOWN_IDS])}; remove one of the rows of each"
        )
    missing = tuple(name for name, count in zip(names, counts, strict=True) if not count)
    return IdComparison(uri, len(names), missing, tuple(own), rows, rows / total if rows else 1.0)


def _lower_bound(share: float, places: int) -> float:
    """Return the lower confidence bound (Clopper and Pearson) of a share of independent places."""
    from scipy.special import betaincinv

    return float(betaincinv(share * places, places * (1 - share) + 1, ERROR_PROBABILITY))
