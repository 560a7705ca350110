"""Embeddings that the user already has: `embed.from`, Parquet with sample_id and embedding.

The table is never loaded. An index of it has a hash, file, row group and row of each id, 16 bytes a
row; a worker holds the index, and reads only the row groups that have samples of its fragment, one
at a time. Row groups are therefore small (`MAX_GROUP_BYTES`), and reading is fast where the rows
are roughly in the order of the source.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raypipe import storage
from raypipe.config import SourceSettings
from raypipe.errors import ConfigError, SourceError
from raypipe.runs.run import Run
from raypipe.selection.hashing import hash_ids
from raypipe.sources.arrow_types import ID_TYPES, described, holds_ids, holds_vectors, id_texts
from raypipe.sources.arrow_types import vectors as vectors_of
from raypipe.sources.location import Location
from raypipe.sources.versioned import refuse_versioned_table

ID, EMBEDDING = "sample_id", "embedding"
MAX_GROUP_BYTES = 1 << 30
"""Largest uncompressed row group: a worker holds one."""
NO_EMBEDDING = "no usable embedding in embed.from"
"""Reject reason of a sample that the table lacks, or whose embedding is empty or damaged."""
SHOWN_IDS = 3
"""Ids that a message names."""


def table_files(uri: str) -> list[tuple[str, storage.FileInfo]]:
    """List URI and file information of the Parquet files of a table.

    Raises
    ------
    ConfigError
        If there are none.
    """
    location = Location(SourceSettings(uri=uri))
    try:
        refuse_versioned_table(uri, location, "write its current version as Parquet")
        files = location.files("parquet")
    except SourceError as error:
        text = str(error).removesuffix("; check source.uri")
        raise ConfigError(f"embed.from: {text}") from None
    return [(location.uri(file.path), file) for file in sorted(files)]


def identity_of_table(uri: str) -> str:
    """Return a hash of paths, sizes and stamps of the files of a table."""
    lines = [f"{info.path}\0{info.size}\0{info.stamp}" for _, info in table_files(uri)]
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=8).hexdigest()


@contextmanager
def opened(uri: str) -> Iterator[pq.ParquetFile]:
    """Open a file of a table. Raises ConfigError unless it is readable and has the columns."""
    try:
        with storage.open_read(uri) as stored:
            parquet = pq.ParquetFile(stored)
            schema = parquet.schema_arrow
            for name, fits, expected in (
                (ID, holds_ids, ID_TYPES),
                (EMBEDDING, holds_vectors, "lists of floating-point numbers"),
            ):
                if schema.names.count(name) != 1:
                    raise ConfigError(
                        f"embed.from: {uri} has no column {name!r}; the columns are "
                        f"{', '.join(schema.names)}"
                    )
                if not fits(schema.field(name)):
                    raise ConfigError(
                        f"embed.from: column {name!r} of {uri} is {described(schema.field(name))}; "
                        f"expected {expected}"
                    )
            yield parquet
    except FileNotFoundError:
        raise ConfigError(f"embed.from: {uri}: no such file") from None
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"embed.from: {uri} is not readable Parquet ({error})") from None


def check_table(uri: str) -> None:
    """Raise ConfigError for what is wrong with the first file of a table, or if it is empty."""
    files = [file for file, _ in table_files(uri)]
    with opened(files[0]) as parquet:
        _check_groups(files[0], parquet)
    _width(files)


def _check_groups(uri: str, parquet: pq.ParquetFile) -> None:
    for number in range(parquet.metadata.num_row_groups):
        group = parquet.metadata.row_group(number)
        if group.total_byte_size > MAX_GROUP_BYTES:
            raise ConfigError(
                f"embed.from: row group {number} of {uri} has {group.num_rows:,} rows and "
                f"{group.total_byte_size / 2**30:.1f} GiB, which a worker would have to hold; "
                "write the file again with row groups of about 4,096 rows (row_group_size)"
            )


def index_file(uri: str, number: int) -> pa.Table:
    """Return hash, file, row group and row of each id in a file of a table.

    A row without an id is left out.
    """
    parts = []
    with opened(uri) as parquet:
        _check_groups(uri, parquet)
        field = parquet.schema_arrow.field(ID)
        for group in range(parquet.metadata.num_row_groups):
            column = parquet.read_row_group(group, [ID], use_threads=False)[ID].combine_chunks()
            ids = id_texts(column, field)
            rows = np.flatnonzero(ids.is_valid().to_numpy(zero_copy_only=False))
            hashes = hash_ids(ids.take(pa.array(rows)))
            count = len(rows)
            parts.append(
                {
                    "hash": hashes.astype(np.uint64),
                    "file": np.full(count, number, np.int32),
                    "group": np.full(count, group, np.int32),
                    "row": rows.astype(np.int32),
                }
            )
    names = {"hash": np.uint64, "file": np.int32, "group": np.int32, "row": np.int32}
    return pa.table(
        {
            name: np.concatenate([part[name] for part in parts] or [np.zeros(0, kind)])
            for name, kind in names.items()
        }
    )


@dataclass(frozen=True)
class EmbeddingTable:
    """A table with its index, sorted by hash.

    Attributes
    ----------
    files : list of str
        URIs of its files.
    hashes : np.ndarray
        uint64 [n].
    places : np.ndarray
        File, row group and row, int32 [n, 3].
    """

    files: list[str]
    hashes: np.ndarray
    places: np.ndarray

    @classmethod
    def of(cls, run: Run, uri: str) -> EmbeddingTable:
        """Open the table of a run; a process reads its index once."""
        return _loaded(run.uri, uri, identity_of_table(uri))

    def read(self, ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Read the embeddings of some samples.

        Returns
        -------
        embedding : np.ndarray
            float32 [n, d]; zero where there is none.
        usable : np.ndarray
            Which samples have a finite embedding, bool [n].

        Raises
        ------
        ConfigError
            If an id occurs twice, or embeddings differ in length.
        """
        wanted = pa.array(list(ids), pa.string())
        hashes = hash_ids(wanted)
        low = np.searchsorted(self.hashes, hashes, "left")
        counts = np.searchsorted(self.hashes, hashes, "right") - low
        # ids are compared below, because different ids can have the same hash
        sample = np.repeat(np.arange(len(hashes)), counts)
        within = np.arange(len(sample)) - np.repeat(np.cumsum(counts) - counts, counts)
        places = self.places[np.repeat(low, counts) + within]
        usable, met = np.zeros(len(hashes), bool), np.zeros(len(hashes), np.int64)
        embedding = np.zeros((len(hashes), self.width), np.float32)
        for file in np.unique(places[:, 0]):
            of_file = places[:, 0] == file
            with opened(self.files[file]) as parquet:
                schema = parquet.schema_arrow
                for group in np.unique(places[of_file, 1]):
                    chosen = np.flatnonzero(of_file & (places[:, 1] == group))
                    table = parquet.read_row_group(int(group), [ID, EMBEDDING], use_threads=False)
                    table = table.take(pa.array(places[chosen, 2]))
                    found = id_texts(table[ID].combine_chunks(), schema.field(ID))
                    own = sample[chosen]
                    same = np.asarray(pc.equal(found, wanted.take(pa.array(own))))
                    np.add.at(met, own[same], 1)
                    values, good = self._values(
                        vectors_of(table[EMBEDDING].combine_chunks(), schema.field(EMBEDDING)),
                        self.files[file],
                    )
                    embedding[own[same & good]] = values[same & good]
                    usable[own[same & good]] = True
        twice = np.flatnonzero(met > 1)
        if len(twice):
            shown = ", ".join(str(ids[row]) for row in twice[:SHOWN_IDS])
            raise ConfigError(
                f"embed.from: {len(twice):,} ids occur more than once, such as {shown}; remove one "
                "of the rows of each"
            )
        return embedding, usable

    @functools.cached_property
    def width(self) -> int:
        """Length of the embeddings."""
        return _width(self.files)

    def _values(self, column: pa.Array, uri: str) -> tuple[np.ndarray, np.ndarray]:
        """Return embeddings, float32 [n, d], zero where one is unusable; and which are usable."""
        sizes = pc.fill_null(pc.list_value_length(column), -1).to_numpy(zero_copy_only=False)
        good = sizes == self.width
        if ((sizes > 0) & ~good).any():
            other = int(sizes[(sizes > 0) & ~good][0])
            raise ConfigError(
                f"embed.from: {uri} has embeddings of length {other} and {self.width}; all must "
                "have one length"
            )
        values = np.zeros((len(sizes), self.width), np.float32)
        flat = column.filter(pa.array(good)).flatten()
        with np.errstate(over="ignore"):
            flat = pc.cast(flat, pa.float32(), safe=False).to_numpy(zero_copy_only=False)
        values[good] = flat.reshape(-1, self.width)
        good &= np.isfinite(values).all(1)
        return values, good


def _width(files: Sequence[str]) -> int:
    """Return the length of the first embedding that is not empty."""
    for file in files:
        with opened(file) as parquet:
            field = parquet.schema_arrow.field(EMBEDDING)
            for batch in parquet.iter_batches(256, columns=[EMBEDDING], use_threads=False):
                sizes = pc.list_value_length(vectors_of(batch.column(0), field))
                filled = sizes.filter(pc.greater(sizes, 0))
                if len(filled):
                    return int(filled[0].as_py())
    raise ConfigError("embed.from: no row has an embedding")


@functools.lru_cache(maxsize=1)
def _loaded(run_uri: str, uri: str, _identity: str) -> EmbeddingTable:
    run = Run(run_uri)
    parts = [
        storage.read_table(run.feature_index(number)) for number in range(len(table_files(uri)))
    ]
    table = pa.concat_tables(parts)
    order = np.argsort(table["hash"].to_numpy(), kind="stable")
    places = np.stack([table[name].to_numpy()[order] for name in ("file", "group", "row")], 1)
    files = [file for file, _ in table_files(uri)]
    return EmbeddingTable(files, table["hash"].to_numpy()[order], places)
