"""Check tables of embeddings against tables of scores: scored samples, classes, repeated ids.

Every fragment is read in a Ray task: all ids and labels, and embeddings only of row groups with a
scored sample. The driver holds the scored samples and no others.

Repeated ids show as repeated 64-bit hashes, which are held `HASHED_ROWS` at a time: for larger
tables, the ids are read once more for every further share of the hashes. The ids behind equal
hashes are then compared.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raypipe.distributed.context import RunTasks
from raypipe.errors import SourceError
from raypipe.progress import Meter, Progress
from raypipe.selection.hashing import hash_ids
from raypipe.sources.classes import MAX_CLASSES, ClassMap, class_map
from raypipe.tables.embeddings import EmbeddingBatch, matrix, read_batches, read_ids, widths
from raypipe.tables.files import EMBEDDING, ID, LABEL
from raypipe.tables.fragments import TableFragment
from raypipe.tables.problems import ProblemCounts, shortened

HASHED_ROWS = 1 << 25
"""Hashes held at once in search of repeated ids: 256 MiB."""
MAX_CONFIRMED = 100
"""Equal hashes per round whose ids are compared. More cannot be a coincidence."""


@dataclass(frozen=True)
class ScoredRows:
    """Scored samples of one fragment whose embeddings have the same width d.

    Attributes
    ----------
    ids : pyarrow.Array
        Text [n].
    label : pyarrow.Array
        As in `EmbeddingBatch` [n].
    embedding : numpy.ndarray
        float32 [n, d], finite.
    """

    ids: pa.Array
    label: pa.Array
    embedding: np.ndarray

    @classmethod
    def concat(cls, parts: Sequence[ScoredRows]) -> ScoredRows:
        """Join rows of the same width."""
        return cls(
            pa.concat_arrays([part.ids for part in parts]),
            pa.concat_arrays([part.label for part in parts]),
            np.concatenate([part.embedding for part in parts]),
        )


@dataclass(frozen=True)
class FragmentScan:
    """Result of the scan of one fragment.

    Attributes
    ----------
    name, rows : str, int
        Name and rows of the fragment.
    hashes : numpy.ndarray
        Hashes of all ids that belong to round 0, uint64.
    labels : set of int or str
        Labels that occur.
    scored_ids : pyarrow.Array
        Ids in the fragment that have a score.
    scored : dict of int to ScoredRows
        The scored samples with a usable embedding, by its width.
    """

    name: str
    rows: int
    hashes: np.ndarray
    labels: set[int | str]
    scored_ids: pa.Array
    scored: dict[int, ScoredRows]


@dataclass
class _Scans:
    """Collects the scans of all fragments."""

    meter: Meter
    hashes: list[np.ndarray] = field(default_factory=list)
    labels: set[int | str] = field(default_factory=set)
    scored_ids: dict[str, pa.Array] = field(default_factory=dict)
    scored: dict[str, dict[int, ScoredRows]] = field(default_factory=dict)

    def add(self, scan: FragmentScan) -> None:
        """Add one scan. Raises SourceError if the labels cannot be classes."""
        self.meter.add(scan.rows)
        self.hashes.append(scan.hashes)
        self.labels |= scan.labels
        largest = max((label for label in scan.labels if isinstance(label, int)), default=0)
        if len(self.labels) > MAX_CLASSES or largest >= MAX_CLASSES:
            raise SourceError(
                f"column {LABEL!r} cannot hold classes: its numbers are too large, or it has too "
                f"many distinct values. Classes are numbered from 0, fewer than {MAX_CLASSES:,}; "
                "leave the column out if it holds something else"
            )
        self.scored_ids[scan.name] = scan.scored_ids
        self.scored[scan.name] = scan.scored


def check_tables(
    fragments: Sequence[TableFragment],
    scores: pa.Table,
    problems: ProblemCounts,
    progress: Progress,
    run_tasks: RunTasks,
) -> tuple[pa.Table, ClassMap]:
    """Return the scored samples with a usable embedding, and the classes.

    Parameters
    ----------
    fragments : sequence of TableFragment
        All embeddings.
    scores : pyarrow.Table
        sample_id and score of every scored sample, from `read_scores`.
    problems : ProblemCounts
        Receives the scored samples without an embedding.
    progress : Progress
        Where to show progress.
    run_tasks : callable
        `Context.run_tasks`.

    Returns
    -------
    pyarrow.Table
        In the order of the fragments: sample_id string, label int32 (class index, or null),
        embedding float32 [d], score float32. Embeddings have the width d that most scored samples
        have.
    ClassMap
        The classes.

    Raises
    ------
    SourceError
        For repeated ids, labels that cannot be classes, or if no sample is left to fit on.
    """
    rows = sum(fragment.rows for fragment in fragments)
    rounds = -(-rows // HASHED_ROWS)
    with progress.meter("check", rows) as meter:
        scans = _Scans(meter)
        run_tasks(fragments, functools.partial(scan_fragment, scores[ID], rounds), scans.add)
    _check_unique(fragments, rounds, scans.hashes, run_tasks)
    scored_ids = pa.chunked_array(
        [scans.scored_ids[fragment.name] for fragment in fragments], pa.string()
    )
    without_embedding = scores[ID].filter(pc.invert(pc.is_in(scores[ID], value_set=scored_ids)))
    if len(without_embedding) == len(scores):
        raise SourceError(
            f"none of the {len(scores):,} scored samples has an embedding; the first scored "
            f"sample is {scores[ID][0].as_py()!r}. sample_id must be the same in both tables"
        )
    problems.add("score_without_embedding", without_embedding.to_pylist())
    classes = class_map(None, frozenset(scans.labels), None)
    scored = _of_most_frequent_width([scans.scored[fragment.name] for fragment in fragments])
    return _scored_table(scored, scores, classes), classes


def _of_most_frequent_width(scored: Sequence[dict[int, ScoredRows]]) -> ScoredRows:
    """Join the scored samples of the most frequent width; the smaller one of two."""
    counts: Counter[int] = Counter()
    for by_width in scored:
        counts.update({width: len(rows.ids) for width, rows in by_width.items()})
    if not counts:
        raise SourceError(
            "no scored sample has a usable embedding: each is missing, empty or not finite"
        )
    width = min(counts, key=lambda size: (-counts[size], size))
    return ScoredRows.concat([by_width[width] for by_width in scored if width in by_width])


def _scored_table(scored: ScoredRows, scores: pa.Table, classes: ClassMap) -> pa.Table:
    label, width = class_index(scored.label, classes), scored.embedding.shape[1]
    columns = {
        ID: scored.ids,
        LABEL: pa.array(label, pa.int32(), mask=label < 0),
        EMBEDDING: pa.FixedSizeListArray.from_arrays(pa.array(scored.embedding.reshape(-1)), width),
        "score": scores["score"].take(pc.index_in(scored.ids, value_set=scores[ID])),
    }
    return pa.table(columns)


def scan_fragment(scored: pa.ChunkedArray, rounds: int, fragment: TableFragment) -> FragmentScan:
    """Read ids and labels of a fragment, and the embeddings of scored samples. Runs in a task.

    Parameters
    ----------
    scored : pyarrow.ChunkedArray
        Ids of all scored samples.
    rounds : int
        Rounds of the search for repeated ids.
    fragment : TableFragment
        What to read.
    """
    groups, hashes, labels = [], [], set()
    for group, ids, label in read_ids(fragment):
        hashes.append(_of_round(hash_ids(ids), rounds, 0))
        labels.update(label.unique().drop_null().to_pylist())
        if pc.any(pc.is_in(ids, value_set=scored)).as_py():
            groups.append(group)
    scored_ids = [pa.array([], pa.string())]
    parts: dict[int, list[ScoredRows]] = {}
    for batch in read_batches(fragment, groups) if groups else ():
        is_scored = pc.is_in(batch.ids, value_set=scored).to_numpy(zero_copy_only=False)
        scored_ids.append(batch.ids.filter(pa.array(is_scored)))
        for width, rows in _scored_rows(batch, is_scored).items():
            parts.setdefault(width, []).append(rows)
    return FragmentScan(
        name=fragment.name,
        rows=fragment.rows,
        hashes=np.concatenate(hashes),
        labels=labels,
        scored_ids=pa.concat_arrays(scored_ids),
        scored={width: ScoredRows.concat(rows) for width, rows in parts.items()},
    )


def _scored_rows(batch: EmbeddingBatch, is_scored: np.ndarray) -> dict[int, ScoredRows]:
    """Return the scored rows of a batch with finite embeddings, by the width of the embedding."""
    result, sizes = {}, widths(batch.embedding)
    for width in np.unique(sizes[is_scored & (sizes > 0)]).tolist():
        rows = is_scored & (sizes == width)
        embedding = matrix(batch.embedding, rows)
        finite = np.isfinite(embedding).all(1)
        rows[rows] = finite
        if finite.any():
            mask = pa.array(rows)
            result[width] = ScoredRows(
                batch.ids.filter(mask), batch.label.filter(mask), embedding[finite]
            )
    return result


def class_index(label: pa.Array, classes: ClassMap) -> np.ndarray:
    """Return the class indices, int64 [n], of labels in tables; -1 for a missing label."""
    if classes.numeric:  # a number is its own index; without any label all are null
        return pc.fill_null(pc.cast(label, pa.int64()), -1).to_numpy(zero_copy_only=False)
    index = pc.index_in(label, value_set=pa.array(classes.names, pa.string()))
    return pc.fill_null(pc.cast(index, pa.int64()), -1).to_numpy(zero_copy_only=False)


# -- repeated ids -----------------------------------------------------------------------


def _check_unique(
    fragments: Sequence[TableFragment], rounds: int, hashes: list[np.ndarray], run_tasks: RunTasks
) -> None:
    """Raise SourceError if an id occurs twice.

    `hashes` holds those of round 0. It is emptied, to free the memory for the next round.
    """
    count, candidates = 0, list[np.ndarray]()
    for number in range(rounds):
        if number:
            run_tasks(fragments, functools.partial(_hashes, rounds, number), hashes.append)
        values = np.concatenate(hashes)
        hashes.clear()
        values.sort()
        repeated = np.unique(values[1:][values[1:] == values[:-1]])
        count += len(repeated)
        candidates.append(repeated[:MAX_CONFIRMED])
    if not count:
        return
    ids: Counter[str] = Counter()
    confirmed = np.concatenate(candidates)
    run_tasks(fragments, functools.partial(_ids_with, confirmed), ids.update)
    repeated_ids = sorted(sample_id for sample_id, times in ids.items() if times > 1)
    if repeated_ids:
        count = len(repeated_ids) if count == len(confirmed) else count
        raise SourceError(
            f"sample_ids with more than one embedding: {count:,} "
            f"({shortened(repeated_ids, count)}); keep one embedding per sample_id"
        )


def _of_round(hashes: np.ndarray, rounds: int, number: int) -> np.ndarray:
    return hashes[hashes % np.uint64(rounds) == number] if rounds > 1 else hashes


def _hashes(rounds: int, number: int, fragment: TableFragment) -> np.ndarray:
    """Return the hashes of a fragment's ids that belong to a round, uint64. Runs in a task."""
    return np.concatenate(
        [_of_round(hash_ids(ids), rounds, number) for _, ids, _ in read_ids(fragment)]
    )


def _ids_with(hashes: np.ndarray, fragment: TableFragment) -> list[str]:
    """Return the ids of a fragment that have one of some hashes. Runs in a task."""
    result: list[str] = []
    for _, ids, _ in read_ids(fragment):
        present = ids.drop_null()
        result += present.filter(pa.array(np.isin(hash_ids(present), hashes))).to_pylist()
    return result
