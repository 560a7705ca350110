"""What keep-lists are made from: the score shards of a run as a stream, beside the proxy's losses, with the marks of samples."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raypipe import storage
from raypipe.errors import ConfigError, RaypipeError, RunError, StageError
from raypipe.runs.layout import Run
from raypipe.selection import ALWAYS, NEVER, Chunk, IdSet
from raypipe.selection.hashing import text_array

CHUNK_ROWS = 1 << 16
"""Rows that a chunk has at least, but for the last: what is done to each chunk takes as long for few rows as for thousands."""
CACHE_BYTES = 128 << 20
"""Chunks that stay in memory from one pass to the next, if all of them are no more: about three million samples with their ids."""
COMPRESSED = 4
"""Bytes in memory for each byte of a score shard, with the loss: 0.9 to 4 (benchmarks/selecting.py, runs on CIFAR-10 and tars)."""
SHOWN = 5
"""Ids that are named where there are more."""


class Marks:
    """Which samples are in every keep-list and in none: per shard their rows and marks. Memory: 5 bytes for each of them."""

    def __init__(self) -> None:
        self._of: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def __bool__(self) -> bool:
        return bool(self._of)

    def add(self, shard: str, rows: np.ndarray, mark: int) -> None:
        if not len(rows):
            return
        known = self._of.get(shard, (np.zeros(0, np.int32), np.zeros(0, np.uint8)))
        new = (rows.astype(np.int32), np.full(len(rows), mark, np.uint8))
        self._of[shard] = (np.concatenate([known[0], new[0]]), np.concatenate([known[1], new[1]]))

    def of(self, shard: str, samples: int) -> np.ndarray | None:
        """uint8 [samples]; None where no sample of any shard is marked."""
        if not self._of:
            return None
        mark = np.zeros(samples, np.uint8)
        if shard in self._of:
            rows, marks = self._of[shard]
            mark[rows] = marks
        return mark


class Scores:
    """The score shards of a run as a stream that can be started anew; the first pass also counts and hashes it.

    `with_loss`: the proxy's loss of each sample comes along, from `embeddings/`.
    """

    def __init__(self, run: Run, with_loss: bool = False) -> None:
        self._run, self._with_loss = run, with_loss
        self._uri = run.path("scores")
        self.marks = Marks()
        self.samples = 0
        self.digest = ""
        self._held: list[_Piece] | None = None
        self._held_ids = self._too_large = False

    def shards(self) -> list[str]:
        """File names, sorted."""
        return sorted(file for file in storage.names(self._uri) if file.endswith(".parquet"))

    @functools.cached_property
    def _few(self) -> bool:
        """Whether all chunks with their ids will be no more than HELD_BYTES, going by the size of the files. Lists no more than it must."""
        sizes = itertools.accumulate(file.size for file in storage.walk(self._uri))
        return all(size * COMPRESSED <= CACHE_BYTES for size in sizes)

    def chunks(self, with_ids: bool) -> Iterator[Chunk]:
        """Chunks of several shards each, as they are marked now. A pass reads nothing where one before it left all in memory.

        The lists need the ids in the end: where all is likely to stay, they are read with the rest in the first pass.
        """
        if self._held is not None and (self._held_ids or not with_ids):
            yield from map(self._marked, self._held)
            return
        with_ids = with_ids or self._few
        held, size = list[_Piece](), 0
        for piece in _pieces(self.named_chunks(with_ids)):
            size += piece.bytes
            self._too_large |= size > CACHE_BYTES
            if self._too_large:
                held.clear()
            else:
                held.append(piece)
            yield self._marked(piece)
        self._held, self._held_ids = (None if self._too_large else held), with_ids

    def _marked(self, piece: _Piece) -> Chunk:
        marks = [
            mark
            for name, samples in piece.shards
            if (mark := self.marks.of(name, samples)) is not None
        ]
        return piece.chunk._replace(mark=np.concatenate(marks) if marks else None)

    def named_chunks(self, with_ids: bool) -> Iterator[tuple[str, Chunk]]:
        """Chunks with the names of their shards."""
        digest, samples = hashlib.blake2b(digest_size=8), 0
        for name, (table, beside) in storage.ahead(
            lambda file: self._read(file, with_ids), self.shards(), self._uri
        ):
            score = table["score"].to_numpy()
            label = table["label"].fill_null(-1).to_numpy()
            samples += len(score)
            digest.update(
                name.encode() + score.astype("<f4").tobytes() + label.astype("<i4").tobytes()
            )
            ids: Any = table["sample_id"].combine_chunks() if with_ids else ()
            ids = ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids
            loss = None if beside is None else beside["loss"].to_numpy()
            yield name, Chunk(score, label, ids, loss, self.marks.of(name, len(score)))
        if self.digest and self.digest != digest.hexdigest():
            raise StageError(
                f"{self._uri}: changed while the keep-lists were being made; run it again"
            )
        self.digest, self.samples = digest.hexdigest(), samples

    def _read(self, file: str, with_ids: bool) -> tuple[pa.Table, pa.Table | None]:
        table = storage.read_table(
            storage.join(self._uri, file), ["score", "label"] + ["sample_id"] * with_ids
        )
        if not self._with_loss:
            return table, None
        beside = read_embeddings(self._run, file, ["loss"] + ["sample_id"] * with_ids)
        if len(beside) != len(table) or (
            with_ids and not beside["sample_id"].equals(table["sample_id"])
        ):
            raise RunError(
                f"{self._run.uri}: embeddings/ and scores/ of {file} are not of the same samples; run it again"
            )
        return table, beside


class _Piece(NamedTuple):
    """A chunk without marks, and the shards that it is made of with their samples."""

    chunk: Chunk
    shards: list[tuple[str, int]]

    @property
    def bytes(self) -> int:
        score, label, ids, loss, _ = self.chunk
        return sum(
            values.nbytes
            for values in (score, label, ids, loss)
            if isinstance(values, np.ndarray | pa.Array)
        )


def _pieces(chunks: Iterator[tuple[str, Chunk]]) -> Iterator[_Piece]:
    """Shards joined to pieces of at least `CHUNK_ROWS` rows."""
    parts: list[Chunk] = []
    shards: list[tuple[str, int]] = []
    rows = 0
    for name, chunk in chunks:
        parts.append(chunk)
        shards.append((name, len(chunk.score)))
        rows += len(chunk.score)
        if rows >= CHUNK_ROWS:
            yield _Piece(_joined(parts), shards)
            parts, shards, rows = [], [], 0
    if parts:
        yield _Piece(_joined(parts), shards)


def _joined(parts: list[Chunk]) -> Chunk:
    score, label, ids, loss, _ = zip(*parts, strict=True)
    return Chunk(
        np.concatenate(score),
        np.concatenate(label),
        pa.concat_arrays([text_array(part) for part in ids])
        if isinstance(ids[0], pa.Array)
        else (),
        None if loss[0] is None else np.concatenate(loss),
    )


def read_embeddings(run: Run, file: str, columns: list[str]) -> pa.Table:
    """Some columns of a shard of embeddings, without reading the others. Raises RunError where they are not there."""
    try:
        with storage.open_read(run.path("embeddings", file)) as stored:
            return pq.ParquetFile(stored).read(columns=columns)
    except (FileNotFoundError, pa.ArrowException) as error:
        raise RunError(
            f"{run.path('embeddings', file)}: {', '.join(columns)} cannot be read ({error}); run it again"
        ) from None


def read_ids(uri: str, setting: str) -> pa.Array:
    """The ids in a file: text in UTF-8, one a line, or Parquet with a column `sample_id`, such as a keep-list.

    Blank lines and nulls are left out. Raises ConfigError for a file that is not there or is neither.
    """
    try:
        data = storage.read_bytes(uri)
        if data[:4] == b"PAR1":
            table = storage.read_table(uri)
            if "sample_id" not in table.column_names:
                raise ConfigError(
                    f"{setting}: {uri} has no column sample_id, but {', '.join(table.column_names) or 'none'}"
                )
            found = table["sample_id"].combine_chunks().cast(pa.string())
        else:
            found = pa.array(
                [line for line in data.decode("utf-8-sig").splitlines() if line.strip()],
                pa.string(),
            )
    except FileNotFoundError:
        raise ConfigError(f"{setting}: {uri}: no such file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{setting}: {uri} is neither UTF-8 text with an id in each line nor Parquet ({error})"
        ) from None
    except (pa.ArrowException, RaypipeError) as error:
        raise (
            error if isinstance(error, ConfigError) else ConfigError(f"{setting}: {uri}: {error}")
        ) from None
    return found.drop_null()


def mark_listed_ids(scores: Scores, always: str | None, never: str | None) -> dict[str, Any]:
    """Mark the samples listed at the URIs, by one pass over the ids. Returns how many were found and how many are not known.

    Raises ConfigError for ids in both lists, and for what `read_ids` does not read.
    """
    given = {"always_keep": (always, ALWAYS), "never_keep": (never, NEVER)}
    lists = {
        name: (IdSet(read_ids(uri, f"select.{name}")), mark)
        for name, (uri, mark) in given.items()
        if uri is not None
    }
    if not lists:
        return {}
    if len(lists) == 2:
        first, second = (ids.ids for ids, _ in lists.values())
        both = first.filter(pc.is_in(first, second)).to_pylist()
        if both:
            raise ConfigError(
                f"select: {len(both):,} ids are in always_keep and in never_keep ({_named(both)}); leave each in one"
            )
    found = dict.fromkeys(lists, 0)
    for shard, chunk in scores.named_chunks(True):
        for name, (ids, mark) in lists.items():
            rows = ids.find(chunk.sample_id)
            scores.marks.add(shard, rows, mark)
            found[name] += len(rows)
    result: dict[str, Any] = {}
    for name, (ids, _) in lists.items():
        unknown = ids.ids.filter(pa.array(~ids.met))
        result[name] = found[name]
        result[f"{name}_unknown"] = len(unknown)
        result[f"{name}_unknown_ids"] = sorted(unknown.to_pylist())[:SHOWN]
    return result


def notes(marked: dict[str, Any]) -> list[str]:
    """What there is to say of the lists of ids, in lines."""
    return [
        f"select.{name}: {marked[f'{name}_unknown']:,} of its ids are not among the scores ({_named(marked[f'{name}_unknown_ids'])}"
        + (", ...)" if marked[f"{name}_unknown"] > SHOWN else ")")
        for name in ("always_keep", "never_keep")
        if marked.get(f"{name}_unknown")
    ]


def _named(ids: list[str]) -> str:
    return ", ".join(ids[:SHOWN]) + (", ..." if len(ids) > SHOWN else "")
