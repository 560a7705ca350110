"""What is in tables of embeddings and scores: the scored samples, the classes, and ids that are there twice.

Every piece is read in a Ray task: ids and labels, and embeddings only of row groups with a scored sample. The driver holds the scored
samples and no others. Ids that are there twice are found by their 64-bit hashes, of `HASHED_ROWS` rows at a time: of larger tables
the ids are read again for each further share of the hashes. Equal hashes are confirmed by the ids themselves.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raypipe.distributed.context import RunTasks
from raypipe.errors import SourceError
from raypipe.progress import Progress
from raypipe.selection.hashing import hash_ids
from raypipe.sources.classes import MAX_CLASSES, ClassMap, class_map
from raypipe.tables.reader import (
    EMBEDDING,
    ID,
    LABEL,
    Piece,
    ProblemTally,
    matrix,
    name_some,
    read_batches,
    read_ids,
    widths,
)

HASHED_ROWS = 1 << 25
"""Hashes held at once, 256 MiB, while ids that are there twice are looked for."""
CONFIRMED = 100
"""Equal hashes whose ids are compared; of more, chance is no explanation."""


def check(
    pieces: list[Piece],
    scores: pa.Table,
    tally: ProblemTally,
    progress: Progress,
    run_tasks: RunTasks,
) -> tuple[pa.Table, ClassMap]:
    """The scored samples with a usable embedding, in the order of the pieces, and the classes.

    scores   sample_id, score of every scored sample (`tables.read_scores`)
    Returns sample_id string, label int32 (class index, or null), embedding float32 [d], score float32. Where widths differ, d is
    the one that most of these samples have. Scored samples without an embedding go into the tally. Raises SourceError for ids
    that are there twice, labels that cannot be classes, and where nothing is left to fit on.
    """
    rows = sum(piece.rows for piece in pieces)
    rounds = -(-rows // HASHED_ROWS)
    found: dict[str, dict[str, Any]] = {}
    hashes: list[np.ndarray] = []
    labels: set[int | str] = set()
    with progress.meter("check", rows) as meter:

        def collect(result: dict[str, Any]) -> None:
            meter.add(result["rows"])
            hashes.append(result.pop("hashes"))
            new: set[int | str] = result.pop("labels")
            labels.update(new)
            if (
                len(labels) > MAX_CLASSES
                or max((label for label in new if isinstance(label, int)), default=0) >= MAX_CLASSES
            ):
                raise SourceError(
                    f"column {LABEL!r} has numbers that are too large, or too many values, for a class: classes are numbered from 0, "
                    f"fewer than {MAX_CLASSES:,}; leave the column out if it is no class"
                )
            found[result["unit"]] = result

        run_tasks(pieces, functools.partial(scan_piece, scores[ID], rounds), collect)
    _refuse_repeated(pieces, rounds, hashes, run_tasks)
    results = [found[piece.name] for piece in pieces]
    seen = pa.chunked_array([result["seen"] for result in results], pa.string())
    alone = scores[ID].filter(pc.invert(pc.is_in(scores[ID], value_set=seen)))
    if len(alone) == len(scores):
        raise SourceError(
            f"none of the {len(scores):,} scored samples has an embedding: their ids are such as {scores[ID][0].as_py()!r}. "
            "sample_id must be the same in both tables"
        )
    tally.add("score_without_embedding", alone.to_pylist())
    sizes: Counter[int] = Counter()
    for result in results:
        sizes.update({width: len(part[ID]) for width, part in result["scored"].items()})
    if not sizes:
        raise SourceError(
            "no scored sample has a usable embedding: each is missing, empty or not finite"
        )
    width = min(sizes, key=lambda size: (-sizes[size], size))
    parts = [result["scored"][width] for result in results if width in result["scored"]]
    ids, classes = (
        pa.concat_arrays([part[ID] for part in parts]),
        class_map(None, frozenset(labels), None),
    )
    label = class_index(pa.concat_arrays([part[LABEL] for part in parts]), classes)
    values = np.concatenate([part[EMBEDDING] for part in parts])
    scored = {
        ID: ids,
        LABEL: pa.array(label, pa.int32(), mask=label < 0),
        EMBEDDING: pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), width),
        "score": scores["score"].take(pc.index_in(ids, value_set=scores[ID])),
    }
    return pa.table(scored), classes


def scan_piece(scored: pa.ChunkedArray, rounds: int, piece: Piece) -> dict[str, Any]:
    """Ids, labels and the scored samples of one piece. Runs in a task.

    hashes of all ids (those of the first round); labels that occur; seen: scored ids that are here; scored: by width of the
    embedding, those of them whose embedding is finite.
    """
    groups, hashes, labels = [], [], set()
    for group, ids, label in read_ids(piece):
        hashes.append(_of_round(hash_ids(ids), rounds, 0))
        labels.update(label.unique().drop_null().to_pylist())
        if pc.any(pc.is_in(ids, value_set=scored)).as_py():
            groups.append(group)
    seen = [pa.array([], pa.string())]
    parts: dict[int, list[dict[str, Any]]] = {}
    for batch in read_batches(piece, groups) if groups else ():
        mine = pc.is_in(batch.ids, value_set=scored).to_numpy(zero_copy_only=False)
        seen.append(batch.ids.filter(pa.array(mine)))
        width = widths(batch.embedding)
        for size in np.unique(width[mine & (width > 0)]).tolist():
            rows = mine & (width == size)
            embedding = matrix(batch.embedding, rows)
            good = np.isfinite(embedding).all(1)
            rows[rows] = good
            if good.any():
                keep = pa.array(rows)
                part = {
                    ID: batch.ids.filter(keep),
                    LABEL: batch.label.filter(keep),
                    EMBEDDING: embedding[good],
                }
                parts.setdefault(size, []).append(part)
    joined = {
        size: {
            ID: pa.concat_arrays([part[ID] for part in same]),
            LABEL: pa.concat_arrays([part[LABEL] for part in same]),
            EMBEDDING: np.concatenate([part[EMBEDDING] for part in same]),
        }
        for size, same in parts.items()
    }
    return {
        "unit": piece.name,
        "rows": piece.rows,
        "hashes": np.concatenate(hashes),
        "labels": labels,
        "seen": pa.concat_arrays(seen),
        "scored": joined,
    }


def class_index(label: pa.Array, classes: ClassMap) -> np.ndarray:
    """Class indices, int64 [n], of labels as `tables` reads them; -1 where there is none."""
    if classes.numeric:  # a number is its own index; without any label all are null
        return pc.fill_null(pc.cast(label, pa.int64()), -1).to_numpy(zero_copy_only=False)
    index = pc.index_in(label, value_set=pa.array(classes.names, pa.string()))
    return pc.fill_null(pc.cast(index, pa.int64()), -1).to_numpy(zero_copy_only=False)


def _refuse_repeated(
    pieces: list[Piece], rounds: int, first: list[np.ndarray], run_tasks: RunTasks
) -> None:
    """Raises SourceError when an id is there twice. `first`: hashes of round 0; emptied."""
    count, some = 0, list[np.ndarray]()
    for number in range(rounds):
        if number:
            run_tasks(
                pieces,
                functools.partial(_hashes, rounds, number),
                lambda result: first.append(result["hashes"]),
            )
        values = np.concatenate(first)
        first.clear()
        values.sort()
        twice = np.unique(values[1:][values[1:] == values[:-1]])
        count += len(twice)
        some.append(twice[:CONFIRMED])
    if not count:
        return
    ids: Counter[str] = Counter()
    asked = np.concatenate(some)
    run_tasks(pieces, functools.partial(_ids_with, asked), lambda result: ids.update(result["ids"]))
    repeated = sorted(sample_id for sample_id, times in ids.items() if times > 1)
    if repeated:
        count = len(repeated) if count == len(asked) else count
        raise SourceError(
            f"sample_ids with more than one embedding: {count:,} ({name_some(repeated, count)}); leave one embedding for each"
        )


def _of_round(hashes: np.ndarray, rounds: int, number: int) -> np.ndarray:
    return hashes[hashes % np.uint64(rounds) == number] if rounds > 1 else hashes


def _hashes(rounds: int, number: int, piece: Piece) -> dict[str, Any]:
    return {
        "hashes": np.concatenate(
            [_of_round(hash_ids(ids), rounds, number) for _, ids, _ in read_ids(piece)]
        )
    }


def _ids_with(asked: np.ndarray, piece: Piece) -> dict[str, Any]:
    """Ids of a piece that have one of some hashes."""
    result: list[str] = []
    for _, ids, _ in read_ids(piece):
        there = ids.drop_null()
        result += there.filter(pa.array(np.isin(hash_ids(there), asked))).to_pylist()
    return {"ids": result}
