"""Stream the score shards of a run, with the proxy's statistics and marks, to cut keep-lists."""

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
from raypipe.runs.run import Run
from raypipe.selection import ALWAYS, NEVER, Chunk, IdSet
from raypipe.selection.hashing import Ids, string_array

CHUNK_ROWS = 1 << 16
"""Minimal rows of a chunk, except the last: work per chunk costs the same for a few rows as for
thousands."""
CACHE_BYTES = 128 << 20
"""Chunks stay in memory between passes if all of them fit into this: about three million samples
with their ids."""
EXPANSION = 4
"""Bytes in memory per byte of a score shard, with the loss: 0.9 to 4 (benchmarks/selecting.py, on
runs on CIFAR-10 and tar files)."""
SHOWN_IDS = 5
"""Ids that a message names."""


class Marks:
    """Samples that belong in every keep-list, and in none.

    Stores rows and marks by shard: 5 bytes per marked sample.
    """

    def __init__(self) -> None:
        self._by_shard: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def __bool__(self) -> bool:
        return bool(self._by_shard)

    def add(self, shard: str, rows: np.ndarray, mark: int) -> None:
        """Set the mark of some rows of a shard; see `raypipe.selection` for the marks."""
        if not len(rows):
            return
        old_rows, old_marks = self._by_shard.get(
            shard, (np.zeros(0, np.int32), np.zeros(0, np.uint8))
        )
        self._by_shard[shard] = (
            np.concatenate([old_rows, rows.astype(np.int32)]),
            np.concatenate([old_marks, np.full(len(rows), mark, np.uint8)]),
        )

    def of(self, shard: str, samples: int) -> np.ndarray | None:
        """Return the marks of a shard, uint8 [samples]; None without marks in any shard."""
        if not self._by_shard:
            return None
        result = np.zeros(samples, np.uint8)
        if shard in self._by_shard:
            rows, marks = self._by_shard[shard]
            result[rows] = marks
        return result


class ScoreStream:
    """The score shards of a run as a stream that can be read repeatedly.

    Parameters
    ----------
    run : Run
        The run.
    with_loss, with_margin : bool
        Whether to read the proxy's loss and margin of each sample as well, from `embeddings/`.

    Attributes
    ----------
    marks : Marks
        Marks that the chunks carry.
    samples : int
        Number of samples, after the first pass.
    digest : str
        Hash of scores and labels, after the first pass.
    """

    def __init__(self, run: Run, with_loss: bool = False, with_margin: bool = False) -> None:
        self._run = run
        self._statistics = ["loss"] * with_loss + ["margin"] * with_margin
        self._uri = run.scores_folder
        self.marks = Marks()
        self.samples = 0
        self.digest = ""
        self._cache: list[_JoinedChunk] | None = None
        self._cache_has_ids = self._too_large = False

    def shards(self) -> list[str]:
        """Return the file names, sorted."""
        return sorted(file for file in storage.names(self._uri) if file.endswith(".parquet"))

    @functools.cached_property
    def _expected_to_fit(self) -> bool:
        """Whether all chunks with ids will fit into CACHE_BYTES, judging by the file sizes.

        Stops listing files once the answer is no.
        """
        sizes = itertools.accumulate(file.size for file in storage.walk(self._uri))
        return all(size * EXPANSION <= CACHE_BYTES for size in sizes)

    def chunks(self, with_ids: bool) -> Iterator[Chunk]:
        """Read chunks of several shards each, with the current marks.

        Nothing is read if an earlier pass left everything in memory. Keep-lists need the ids in the
        end. If everything is expected to fit into memory, the first pass therefore reads the ids
        as well, even without `with_ids`.
        """
        if self._cache is not None and (self._cache_has_ids or not with_ids):
            yield from map(self._marked, self._cache)
            return
        with_ids = with_ids or self._expected_to_fit
        cache, size = list[_JoinedChunk](), 0
        for joined in _joined(self.named_chunks(with_ids)):
            size += joined.bytes
            self._too_large |= size > CACHE_BYTES
            if self._too_large:
                cache.clear()
            else:
                cache.append(joined)
            yield self._marked(joined)
        self._cache, self._cache_has_ids = (None if self._too_large else cache), with_ids

    def _marked(self, joined: _JoinedChunk) -> Chunk:
        marks = [
            mark
            for name, samples in joined.shards
            if (mark := self.marks.of(name, samples)) is not None
        ]
        return joined.chunk._replace(mark=np.concatenate(marks) if marks else None)

    def named_chunks(self, with_ids: bool) -> Iterator[tuple[str, Chunk]]:
        """Read one chunk per shard, with the name of the shard.

        Raises
        ------
        StageError
            If scores or labels have changed since the last pass.
        """
        digest, samples = hashlib.blake2b(digest_size=8), 0
        for name, (table, statistics) in storage.ahead(
            lambda file: self._read(file, with_ids), self.shards(), self._uri
        ):
            score = table["score"].to_numpy()
            label = table["label"].fill_null(-1).to_numpy()
            samples += len(score)
            digest.update(
                name.encode() + score.astype("<f4").tobytes() + label.astype("<i4").tobytes()
            )
            ids: Ids = string_array(table["sample_id"]) if with_ids else ()
            yield (
                name,
                Chunk(
                    score,
                    label,
                    ids,
                    statistics.get("loss"),
                    self.marks.of(name, len(score)),
                    position=samples - len(score),
                    margin=statistics.get("margin"),
                ),
            )
        if self.digest and self.digest != digest.hexdigest():
            raise StageError(
                f"{self._uri}: scores changed while the keep-lists were being cut; "
                "rerun the command"
            )
        self.digest, self.samples = digest.hexdigest(), samples

    def embedded(self) -> Iterator[tuple[Chunk, np.ndarray]]:
        """Read one chunk per shard, with ids, and the embeddings of its samples as they are stored.

        Embeddings are [n, d].

        Raises
        ------
        RunError
            If `embeddings/` does not hold the same samples.
        """
        tables = storage.ahead(
            lambda file: read_embedding_columns(self._run, file, ["sample_id", "embedding"]),
            self.shards(),
            self._run.uri,
        )
        for (shard, table), (_, chunk) in zip(tables, self.named_chunks(True), strict=True):
            ids = string_array(table["sample_id"])
            if len(table) != len(chunk.score) or not ids.equals(chunk.sample_id):
                raise RunError(
                    f"{self._run.uri}: embeddings/{shard} and scores/{shard} hold different "
                    "samples; rerun `raypipe run`"
                )
            yield chunk, storage.matrix_of(table["embedding"])

    def _read(self, file: str, with_ids: bool) -> tuple[pa.Table, dict[str, np.ndarray]]:
        """Read the scores of a shard, and the proxy's statistics by name."""
        table = storage.read_table(
            storage.join(self._uri, file), ["score", "label"] + ["sample_id"] * with_ids
        )
        if not self._statistics:
            return table, {}
        columns = self._statistics + ["sample_id"] * with_ids
        statistics = read_embedding_columns(self._run, file, columns)
        same_ids = not with_ids or statistics["sample_id"].equals(table["sample_id"])
        if len(statistics) != len(table) or not same_ids:
            raise RunError(
                f"{self._run.uri}: embeddings/{file} and scores/{file} hold different samples; "
                "rerun `raypipe run`"
            )
        return table, {name: statistics[name].to_numpy() for name in self._statistics}


class _JoinedChunk(NamedTuple):
    """A chunk without marks, with name and samples of the shards that it consists of."""

    chunk: Chunk
    shards: list[tuple[str, int]]

    @property
    def bytes(self) -> int:
        """Memory of the chunk."""
        chunk = self.chunk
        return sum(
            values.nbytes
            for values in (chunk.score, chunk.label, chunk.sample_id, chunk.loss, chunk.margin)
            if isinstance(values, np.ndarray | pa.Array)
        )


def _joined(chunks: Iterator[tuple[str, Chunk]]) -> Iterator[_JoinedChunk]:
    """Join the chunks of consecutive shards to chunks of at least `CHUNK_ROWS` rows."""
    parts: list[Chunk] = []
    shards: list[tuple[str, int]] = []
    rows = 0
    for name, chunk in chunks:
        parts.append(chunk)
        shards.append((name, len(chunk.score)))
        rows += len(chunk.score)
        if rows >= CHUNK_ROWS:
            yield _JoinedChunk(_concatenated(parts), shards)
            parts, shards, rows = [], [], 0
    if parts:
        yield _JoinedChunk(_concatenated(parts), shards)


def _concatenated(parts: list[Chunk]) -> Chunk:
    score, label, ids, loss, _, position, margin = zip(*parts, strict=True)
    return Chunk(
        np.concatenate(score),
        np.concatenate(label),
        pa.concat_arrays([string_array(part) for part in ids])
        if isinstance(ids[0], pa.Array)
        else (),
        None if loss[0] is None else np.concatenate(loss),
        position=position[0],
        margin=None if margin[0] is None else np.concatenate(margin),
    )


def read_embedding_columns(run: Run, file: str, columns: list[str]) -> pa.Table:
    """Read some columns of a shard of embeddings. Raises RunError if they cannot be read."""
    uri = storage.join(run.embeddings_folder, file)
    try:
        with storage.open_read(uri) as stored:
            return pq.ParquetFile(stored).read(columns=columns)
    except (FileNotFoundError, pa.ArrowException) as error:
        raise RunError(
            f"{uri}: {', '.join(columns)} cannot be read ({error}); rerun `raypipe run`"
        ) from None


def read_ids(uri: str, setting: str) -> pa.Array:
    """Read the ids in a file.

    Parameters
    ----------
    uri : str
        UTF-8 text with one id per line, or Parquet with a column `sample_id`, such as a keep-list.
        Blank lines and nulls are ignored.
    setting : str
        The setting that names the file, for error messages.

    Raises
    ------
    ConfigError
        If the file is missing, or neither text nor such Parquet.
    """
    try:
        data = storage.read_bytes(uri)
        if data[:4] == b"PAR1":
            table = storage.read_table(uri)
            if "sample_id" not in table.column_names:
                columns = ", ".join(table.column_names) or "none"
                raise ConfigError(
                    f"{setting}: {uri} has no column sample_id; the columns are: {columns}"
                )
            ids = table["sample_id"].combine_chunks().cast(pa.string())
        else:
            ids = pa.array(
                [line for line in data.decode("utf-8-sig").splitlines() if line.strip()],
                pa.string(),
            )
    except FileNotFoundError:
        raise ConfigError(f"{setting}: {uri}: no such file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{setting}: {uri} is neither UTF-8 text with one id per line nor Parquet ({error})"
        ) from None
    except (pa.ArrowException, RaypipeError) as error:
        raise (
            error if isinstance(error, ConfigError) else ConfigError(f"{setting}: {uri}: {error}")
        ) from None
    return ids.drop_null()


def mark_listed_ids(scores: ScoreStream, always: str | None, never: str | None) -> dict[str, Any]:
    """Mark listed samples in one pass over the ids.

    Parameters
    ----------
    scores : ScoreStream
        Receives the marks.
    always, never : str, optional
        URIs of lists of ids, as in `read_ids`.

    Returns
    -------
    dict
        For each list, its number of marked samples, of unknown ids, and the first unknown ids.

    Raises
    ------
    ConfigError
        For ids in both lists, and files that `read_ids` cannot read.
    """
    settings = {"always_keep": (always, ALWAYS), "never_keep": (never, NEVER)}
    lists = {
        name: (IdSet(read_ids(uri, f"select.{name}")), mark)
        for name, (uri, mark) in settings.items()
        if uri is not None
    }
    if not lists:
        return {}
    if len(lists) == 2:
        first, second = (ids.ids for ids, _ in lists.values())
        both = first.filter(pc.is_in(first, second)).to_pylist()
        if both:
            raise ConfigError(
                f"select: {len(both):,} ids are in both always_keep and never_keep "
                f"({_shortened(both)}); remove each from one of them"
            )
    marked = dict.fromkeys(lists, 0)
    for shard, chunk in scores.named_chunks(True):
        for name, (ids, mark) in lists.items():
            rows = ids.find(chunk.sample_id)
            scores.marks.add(shard, rows, mark)
            marked[name] += len(rows)
    result: dict[str, Any] = {}
    for name, (ids, _) in lists.items():
        unknown = ids.ids.filter(pa.array(~ids.met))
        if len(unknown) and not marked[name]:
            _refuse_other_text(scores, unknown.to_pylist(), f"select.{name}: {settings[name][0]}")
        result[name] = marked[name]
        result[f"{name}_unknown"] = len(unknown)
        result[f"{name}_unknown_ids"] = sorted(unknown.to_pylist())[:SHOWN_IDS]
    return result


def _refuse_other_text(scores: ScoreStream, lines: list[str], what: str) -> None:
    """Raise ConfigError if ids stand in lines that hold something else, such as quotes."""
    cells = {line: line.strip(" \t[{").partition(",")[0].strip(" \t\"'") for line in lines}
    ids = IdSet(pa.array(cells.values(), pa.string()))
    for _, chunk in scores.named_chunks(True):
        rows = ids.find(chunk.sample_id)
        if len(rows):
            known = string_array(chunk.sample_id)[int(rows[0])].as_py()
            line = next(line for line, cell in cells.items() if cell == known)
            raise ConfigError(
                f"{what}: no line is an id, but {_cut(line)!r} contains {known!r}; write one id a "
                "line, without quotes and other columns"
            )


def _cut(text: str) -> str:
    return text if len(text) <= 60 else text[:60] + "..."


def unknown_id_notes(marked: dict[str, Any]) -> list[str]:
    """Return a line per list with unknown ids, given the result of `mark_listed_ids`."""
    notes = []
    for name in ("always_keep", "never_keep"):
        count, ids = marked.get(f"{name}_unknown"), marked.get(f"{name}_unknown_ids", [])
        if count:
            shown = ", ".join(ids) + (", ..." if count > SHOWN_IDS else "")
            notes.append(f"select.{name}: {count:,} of its ids are not among the scores ({shown})")
    return notes


def _shortened(ids: list[str]) -> str:
    return ", ".join(ids[:SHOWN_IDS]) + (", ..." if len(ids) > SHOWN_IDS else "")
