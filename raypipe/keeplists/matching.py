"""Find the samples of a keep-list in a dataset: by their ids, or by the order of the source."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raypipe.errors import SourceError
from raypipe.keeplists.file import first_positions
from raypipe.runs.run import Run
from raypipe.sources.values import printable

Ids = Sequence[str] | Callable[[int], str]
"""Sample ids in the order of a dataset, or a function from an index to the id."""

_NUMBERED = re.compile(r"(.+)/(\d+)")


def id_text(sample_id: Any) -> str:
    """Return a sample id of a dataset as text. Raises SourceError for what has no one text."""
    if sample_id is None or isinstance(sample_id, float | np.floating | bytes):
        raise SourceError(f"{sample_id!r} cannot be a sample id; expected text or whole numbers")
    return str(sample_id)


@dataclass(frozen=True, eq=False)
class Matcher:
    """Finds the samples of a keep-list in datasets.

    Attributes
    ----------
    uri : str
        The keep-list file, for error messages.
    table : pyarrow.Table
        sample_id and label.
    run : Run, optional
        The run that the list is in.
    """

    uri: str
    table: pa.Table
    run: Run | None

    def __len__(self) -> int:
        return len(self.table)

    @functools.cached_property
    def ids(self) -> list[str]:
        """Ids of the kept samples."""
        return self.table["sample_id"].to_pylist()

    @functools.cached_property
    def files(self) -> frozenset[str]:
        """Paths before the "#" of the ids."""
        return frozenset(sample_id.rpartition("#")[0] for sample_id in self.ids)

    def by_ids(self, ids: Iterable[Any], strict: bool) -> tuple[np.ndarray, np.ndarray]:
        """Return ascending positions in `ids` and the rows of these in the list, int64 [k] each."""
        ids_array = pa.array([id_text(sample_id) for sample_id in ids], pa.string())
        row_of_id = pc.fill_null(
            pc.index_in(ids_array, value_set=self.table["sample_id"].combine_chunks()), -1
        )
        rows = row_of_id.to_numpy(zero_copy_only=False).astype(np.int64)
        position = np.flatnonzero(rows >= 0)
        rows = rows[position]
        distinct, counts = np.unique(rows, return_counts=True)
        if len(distinct) < len(rows):
            twice = self.table["sample_id"][int(distinct[counts > 1][0])].as_py()
            raise SourceError(
                f"{int((counts > 1).sum()):,} kept ids occur more than once in the dataset, such "
                f"as {twice!r}"
            )
        if strict and len(rows) < len(self):
            absent = int(np.setdiff1d(np.arange(len(self)), rows)[0])
            example = (
                f"; ids of the dataset are like {ids_array[0].as_py()!r}" if len(ids_array) else ""
            )
            raise SourceError(
                f"{len(self) - len(rows):,} of the {len(self):,} samples of the keep-list are not "
                f"among the {len(ids_array):,} of the dataset, such as "
                f"{self.table['sample_id'][absent].as_py()!r}{example}. strict=False continues "
                f"with {len(rows):,}"
            )
        return position, rows

    def find(self, dataset: Any, ids: Ids | None, strict: bool) -> tuple[np.ndarray, np.ndarray]:
        """Return positions and rows as `by_ids` does, for a dataset."""
        if ids is None:
            own_ids = self._ids_of(dataset)
            if own_ids is None:
                return self._by_row(dataset, strict)
            return self.by_ids(own_ids, strict)
        listed = [ids(index) for index in range(len(dataset))] if callable(ids) else ids
        if len(listed) != len(dataset):
            raise SourceError(
                f"{len(listed):,} ids are given, but the dataset has {len(dataset):,} samples"
            )
        return self.by_ids(listed, strict)

    def _ids_of(self, dataset: Any) -> list[str] | None:
        """Return the ids that can be derived from the dataset itself; None if there are none."""
        if hasattr(dataset, "dataset") and hasattr(dataset, "indices"):
            inner = self._ids_of(dataset.dataset)
            if inner is None:
                inner = [""] * len(dataset.dataset)
                for position, row in zip(*self._by_row(dataset.dataset, True), strict=True):
                    inner[position] = self.ids[row]
            return [inner[index] for index in dataset.indices]
        if hasattr(dataset, "samples") and hasattr(dataset, "root"):
            return [
                printable(os.path.relpath(path, dataset.root).replace(os.sep, "/"))
                for path, *_ in dataset.samples
            ]
        columns = getattr(dataset, "column_names", None) or ()
        stated = self.run.config().source.id_column if self.run is not None else None
        column = next(
            (name for name in (stated, "sample_id") if name is not None and name in columns), None
        )
        return list(map(id_text, dataset[column])) if column is not None else None

    def _by_row(self, dataset: Any, strict: bool) -> tuple[np.ndarray, np.ndarray]:
        """Return positions and rows as `by_ids` does, for a dataset in source order."""
        number = self._source_rows()
        rows = np.argsort(number, kind="stable")
        position = number[rows]
        inside = position < len(dataset)
        if strict and not inside.all():
            raise SourceError(
                f"{int((~inside).sum()):,} of the {len(self):,} samples of the keep-list are "
                f"beyond the {len(dataset):,} samples of the dataset, which is assumed to be in "
                "source order; give ids"
            )
        position, rows = position[inside], rows[inside]
        self._check_labels(dataset, position, rows)
        return position, rows

    def _source_rows(self) -> np.ndarray:
        """Return the number of every kept sample in the source, int64 [n], from its id.

        Raises SourceError if the ids do not contain it.
        """
        numbered = [match for match in map(_NUMBERED.fullmatch, self.ids) if match is not None]
        if numbered and len(numbered) == len(self) and len({match[1] for match in numbered}) == 1:
            return np.array([int(match[2]) for match in numbered], np.int64)
        split = [sample_id.rpartition("#") for sample_id in self.ids]
        source = self.run.config().source if self.run is not None else None
        parquet = (
            source.format == "parquet" and source.id_column is None
            if source is not None
            else all(path.lower().endswith(".parquet") for path, _, _ in split)
        )
        if not parquet or not all(row.isdecimal() for _, _, row in split):
            example = f": they are like {self.ids[0]!r}" if self.ids else ""
            raise SourceError(
                "the ids of the keep-list do not identify samples of the dataset"
                f"{example}; give ids"
            )
        first = dict.fromkeys(self.files, 0)
        if len(first) > 1:
            if self.run is None:
                raise SourceError(
                    f"the samples are in {len(first)} files, and {self.uri} is outside its run, "
                    "whose index has their order; give ids"
                )
            fragments = self.run.fragments()
            starts = first_positions(fragments)
            first = {
                fragment.path: starts[fragment.fragment_id]
                for fragment in fragments
                if fragment.start == 0
            }
            if gone := sorted(self.files - set(first)):
                raise SourceError(
                    f"{self.uri} has samples of files that are no longer in the source, such as "
                    f"{gone[0]}; give ids"
                )
        return np.array([first[path] + int(row) for path, _, row in split], np.int64)

    def _check_labels(self, dataset: Any, position: np.ndarray, rows: np.ndarray) -> None:
        """Raise SourceError if the dataset has integer labels that differ from the list's."""
        stated = {self.run.config().source.label_column} if self.run is not None else set()
        if None in stated:
            return  # the list has pseudo-labels
        column = next(
            (
                name
                for name in getattr(dataset, "column_names", None) or ()
                if name in stated | {"label"}
            ),
            None,
        )
        if column is not None:
            labels = list(dataset[column])
        else:
            labels = list(getattr(dataset, "targets", ()))
        if len(labels) != len(dataset) or not all(
            isinstance(label, int | np.integer) for label in labels
        ):
            return
        expected = pc.fill_null(self.table["label"], -1).to_numpy()[rows]
        wrong = int((np.array(labels)[position] != expected)[expected >= 0].sum())
        if wrong:
            raise SourceError(
                f"{wrong:,} of {len(rows):,} samples have another label in the dataset than in the "
                "keep-list: is the dataset in source order, without shuffling or filtering? Give "
                "ids"
            )
