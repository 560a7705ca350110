"""A keep-list for training code: ids with labels, scores and weights, and one line each for PyTorch, Ray Data and WebDataset.

torch and Ray are imported by the methods that need them, and not before.
"""

from __future__ import annotations

import functools
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raypipe import storage
from raypipe.errors import ConfigError, SourceError
from raypipe.keeplists.file import KeepFile, find_keep_list, first_positions
from raypipe.runs.keep_files import keep_metadata
from raypipe.runs.run import Run
from raypipe.sources.noise import LabelNoise
from raypipe.sources.values import printable

if TYPE_CHECKING:
    import torch
    from torch.utils.data import Subset, WeightedRandomSampler

    from raypipe.distributed.ray_data import Dataset as RayDataset


Ids = Sequence[str] | Callable[[int], str]
"""Sample ids of a dataset in its order, or a function from an index to the id."""

_NUMBERS: dict[str, Callable[[str], Any]] = {
    "fraction": float,
    "count": int,
    "samples": int,
    "forced": lambda value: value == "true",
    "inject_noise": float,
    "spearman": lambda value: None if value == "unknown" else float(value),
    "spearman_low": lambda value: None if value == "unknown" else float(value),
}
_NUMBERED = re.compile(r"(.+)/(\d+)")
_TAR = re.compile(r"\S+\.(?:tar\.gz|tar|tgz)", re.IGNORECASE)


class KeepList:
    """The samples to keep.

    KeepList("runs/first", keep=0.5)                       of a run, local or s3://; the only list there is without `keep`
    KeepList("runs/first", keep=0.5, snapshot="2026-11-22T020000Z")    as it was in a snapshot: see docs/nightly.md
    KeepList("runs/first/keep/keep-0.50.parquet")          the file itself

    It has a length, gives its ids when iterated over, and tells whether an id is `in` it. It can be pickled, and so sent to the
    workers of a DataLoader. Raises RunError where there is no such list, naming those there are.
    """

    def __init__(
        self, uri: str | os.PathLike[str], keep: float | None = None, snapshot: str | None = None
    ) -> None:
        where = os.fspath(uri)
        if keep is None and snapshot is None and where.lower().endswith(".parquet"):
            self.uri = where
            run = Run(
                (where if "://" in where else os.path.abspath(os.path.expanduser(where))).rsplit(
                    "/", 2
                )[0]
            )
            self._run = run if run.exists() else None
        else:
            self._run = Run(where)
            self.uri = find_keep_list(self._run, keep, snapshot)
        with KeepFile(self.uri) as file:
            self._table = pa.Table.from_batches(file.batches(), file.schema).combine_chunks()
        if noise := self.metadata.get("inject_noise"):
            warnings.warn(f"{self.uri}: {LabelNoise(noise).warning}", stacklevel=2)

    def __len__(self) -> int:
        return len(self._table)

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)

    def __contains__(self, sample_id: object) -> bool:
        return sample_id in self._set

    def __repr__(self) -> str:
        return f"KeepList({self.uri!r}: {len(self):,} samples)"

    @functools.cached_property
    def ids(self) -> list[str]:
        """Sample ids. Labels, scores and weights are in the same order, which is that of the score shards and no order of the source."""
        return self._table["sample_id"].to_pylist()

    @property
    def labels(self) -> np.ndarray:
        """Class indices, int32 [n]; -1 for an unlabelled sample."""
        return pc.fill_null(self._table["label"], -1).to_numpy()

    @property
    def scores(self) -> np.ndarray:
        """float32 [n]; higher means keep."""
        return self._table["score"].to_numpy()

    @property
    def weights(self) -> np.ndarray | None:
        """float32 [n], where the strategy that made the list gives weights; else None."""
        return (
            self._table["weight"].to_numpy().astype(np.float32)
            if "weight" in self._table.column_names
            else None
        )

    @functools.cached_property
    def metadata(self) -> dict[str, Any]:
        """How the list was made: fraction, strategy, count, samples (scored in all), scores (their hash), spearman, spearman_low, forced;
        of a rehearsal with wrong labels `inject_noise`.

        Spearman figures are None where they are not known. Others, that the strategy adds, are text.
        """
        return {
            key: _NUMBERS.get(key, str)(value) for key, value in keep_metadata(self.uri).items()
        }

    # -- PyTorch --------------------------------------------------------------------------------------------------

    def indices(self, ids: Iterable[Any], *, strict: bool = True) -> list[int]:
        """Which of a dataset's samples are kept: ascending positions in `ids`, the sample ids of the dataset in its order.

        Raises SourceError where an id occurs twice, and with `strict` where a kept sample is not among them.
        """
        return self._match(ids, strict)[0].tolist()

    def subset(self, dataset: Any, ids: Ids | None = None, *, strict: bool = True) -> Subset[Any]:
        """The kept samples of a map-style dataset, in its order, as `torch.utils.data.Subset`.

        ids  the dataset's sample ids in its order, or a function from an index to the id. By default they are found out, for

             - torchvision's ImageFolder and DatasetFolder on the folder of the source;
             - a `datasets.Dataset` of Hugging Face with a column of the ids: `sample_id`, or the run's `source.id_column`;
             - any dataset in the order of the rows of the Parquet files, files sorted by path; of more than one file, for a
               list in its run. Where the dataset tells its labels, these are compared;
             - any dataset in the order of ids that end in its number, such as those of the bundled digits; labels as above;
             - a `Subset` of one of these.

        Raises SourceError where the ids cannot be told or do not fit; see `indices`.
        """
        from torch.utils.data import Subset

        return Subset(dataset, self._find(dataset, ids, strict)[0].tolist())

    def sampler(
        self,
        dataset: Any,
        ids: Ids | None = None,
        *,
        num_samples: int | None = None,
        replacement: bool = True,
        generator: torch.Generator | None = None,
        strict: bool = True,
    ) -> WeightedRandomSampler:
        """Draws from `subset(dataset, ids)` by weight: `torch.utils.data.WeightedRandomSampler`, of as many samples by default.

        Raises ConfigError where the list has no weights.
        """
        from torch.utils.data import WeightedRandomSampler

        if self.weights is None:
            raise ConfigError(
                f"{self.uri}: has no weights; the strategy {self.metadata.get('strategy')!r} gives none"
            )
        rows = self._find(dataset, ids, strict)[1]
        return WeightedRandomSampler(
            self.weights[rows].tolist(), num_samples or len(rows), replacement, generator
        )

    # -- Ray Data and WebDataset ----------------------------------------------------------------------------------

    def filter(
        self,
        dataset: RayDataset,
        id_column: str = "sample_id",
        *,
        root: str = "",
        columns: Sequence[str] = (),
    ) -> RayDataset:
        """The rows of a Ray Dataset whose id is kept, in their order. Lazy, as Ray Datasets are; the list is shared once per machine.

        root     folder of the source, where the column holds whole paths, as `path` of `ray.data.read_images` does
        columns  of the keep-list, to add to the rows, in place of columns of these names: "score", "weight"
        """
        from raypipe.distributed.ray_data.join import filter_dataset

        unknown = sorted(set(columns) - set(self._table.column_names))
        if unknown:
            raise ConfigError(
                f"{self.uri}: has no column {unknown[0]!r}; it has {', '.join(self._table.column_names)}"
            )
        return filter_dataset(
            dataset,
            self._table.select(list(dict.fromkeys(["sample_id", *columns]))),
            id_column,
            root,
        )

    def filter_webdataset(
        self, samples: Iterable[dict[str, Any]], root: str | None = None
    ) -> Iterator[dict[str, Any]]:
        """The kept ones of the samples that `webdataset` reads: dicts with `__key__` and `__url__`. Put it before decoding.

        root  URL of the folder that paths of tars in ids are below; default: that of the run's source. A URL elsewhere (a copy,
              a cache) is matched by the end of its path.
        Warns when samples went in and none came out.
        """
        base = root if root is not None else self._source_root
        tars: dict[str, str] = {}
        seen = kept = 0
        for sample in samples:
            url, seen = sample["__url__"], seen + 1
            if url not in tars:
                tars[url] = self._tar(url, base)
            if f"{tars[url]}#{printable(sample['__key__'].removeprefix('./'))}" in self._set:
                kept += 1
                yield sample
        if seen and not kept:
            known = f", ids of the keep-list such as {self.ids[0]!r}" if self.ids else ""
            warnings.warn(
                f"none of {seen} samples is in {self.uri}: the last was in {tars[url]!r}{known}; see `root`",
                stacklevel=2,
            )

    def _tar(self, url: str, root: str | None) -> str:
        """The path of a tar as it stands in ids."""
        found = _TAR.search(url)  # of a pipe, the first word that is a tar
        path = found[0] if found is not None else url
        if root is not None and path.startswith(root.rstrip("/") + "/"):
            return path[len(root.rstrip("/")) + 1 :]
        parts = path.split("/")
        ends = ("/".join(parts[start:]) for start in range(len(parts)))
        return next((end for end in ends if end in self._files), parts[-1])

    # -- matching -------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _set(self) -> frozenset[str]:
        return frozenset(self.ids)

    @functools.cached_property
    def _files(self) -> frozenset[str]:
        """Paths before the '#' of ids."""
        return frozenset(sample_id.rpartition("#")[0] for sample_id in self.ids)

    @functools.cached_property
    def _source_root(self) -> str | None:
        if self._run is None:
            return None
        return storage.glob_root(self._run.config().source.uri)

    def _match(self, ids: Iterable[Any], strict: bool) -> tuple[np.ndarray, np.ndarray]:
        """Positions in `ids` of what is kept, ascending, and the rows of these in the list, int64 [k] each."""
        given = pa.array([str(sample_id) for sample_id in ids], pa.string())
        found = pc.fill_null(
            pc.index_in(given, value_set=self._table["sample_id"].combine_chunks()), -1
        )
        rows = found.to_numpy(zero_copy_only=False).astype(np.int64)
        position = np.flatnonzero(rows >= 0)
        rows = rows[position]
        distinct, counts = np.unique(rows, return_counts=True)
        if len(distinct) < len(rows):
            twice = self._table["sample_id"][int(distinct[counts > 1][0])].as_py()
            raise SourceError(
                f"{int((counts > 1).sum()):,} kept ids occur more than once in the dataset, such as {twice!r}"
            )
        if strict and len(rows) < len(self):
            absent = int(np.setdiff1d(np.arange(len(self)), rows)[0])
            example = f"; ids of the dataset are such as {given[0].as_py()!r}" if len(given) else ""
            raise SourceError(
                f"{len(self) - len(rows):,} of the {len(self):,} samples of the keep-list are not among the {len(given):,} of the dataset, "
                f"such as {self._table['sample_id'][absent].as_py()!r}{example}. strict=False goes on with {len(rows):,}"
            )
        return position, rows

    def _find(self, dataset: Any, ids: Ids | None, strict: bool) -> tuple[np.ndarray, np.ndarray]:
        """As `_match`, for a dataset."""
        if ids is None:
            known = self._ids_of(dataset)
            return (
                self._match(known, strict) if known is not None else self._by_row(dataset, strict)
            )
        listed = [ids(index) for index in range(len(dataset))] if callable(ids) else ids
        if len(listed) != len(dataset):
            raise SourceError(
                f"{len(listed):,} ids are given, but the dataset has {len(dataset):,} samples"
            )
        return self._match(listed, strict)

    def _ids_of(self, dataset: Any) -> list[str] | None:
        """Ids that the dataset itself tells; None where it tells none."""
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
        stated = self._run.config().source.id_column if self._run is not None else None
        column = next(
            (name for name in (stated, "sample_id") if name is not None and name in columns), None
        )
        return [str(sample_id) for sample_id in dataset[column]] if column is not None else None

    def _by_row(self, dataset: Any, strict: bool) -> tuple[np.ndarray, np.ndarray]:
        """As `_match`, for a dataset whose order is that of the source."""
        number = self._source_rows()
        rows = np.argsort(number, kind="stable")
        position = number[rows]
        inside = position < len(dataset)
        if strict and not inside.all():
            raise SourceError(
                f"{int((~inside).sum()):,} of the {len(self):,} samples of the keep-list are beyond the {len(dataset):,} samples of the "
                "dataset, taken in the order of the source; give ids"
            )
        position, rows = position[inside], rows[inside]
        self._check_labels(dataset, position, rows)
        return position, rows

    def _source_rows(self) -> np.ndarray:
        """Number of every kept sample in the source, int64 [n], as its id tells it. Raises SourceError where it does not."""
        numbered = [found for found in map(_NUMBERED.fullmatch, self.ids) if found is not None]
        if numbered and len(numbered) == len(self) and len({found[1] for found in numbered}) == 1:
            return np.array([int(found[2]) for found in numbered], np.int64)
        split = [sample_id.rpartition("#") for sample_id in self.ids]
        source = self._run.config().source if self._run is not None else None
        parquet = (
            source.format == "parquet" and source.id_column is None
            if source is not None
            else all(path.lower().endswith(".parquet") for path, _, _ in split)
        )
        if not parquet or not all(row.isdecimal() for _, _, row in split):
            example = f": they are such as {self.ids[0]!r}" if self.ids else ""
            raise SourceError(
                f"the ids of the keep-list do not say which sample of the dataset is meant{example}; give ids"
            )
        first = dict.fromkeys(self._files, 0)
        if len(first) > 1:
            if self._run is None:
                raise SourceError(
                    f"the samples are in {len(first)} files, and {self.uri} is not in its run, which has their order; give ids"
                )
            fragments = self._run.fragments()
            starts = first_positions(fragments)
            first = {
                fragment.path: starts[fragment.fragment_id]
                for fragment in fragments
                if fragment.start == 0
            }
            if gone := sorted(self._files - set(first)):
                raise SourceError(
                    f"{self.uri} has samples of files that are no longer in the source, such as {gone[0]}; give ids"
                )
        return np.array([first[path] + int(row) for path, _, row in split], np.int64)

    def _check_labels(self, dataset: Any, position: np.ndarray, rows: np.ndarray) -> None:
        """Raise SourceError where the dataset tells labels that are numbers, and some are not those of the list."""
        stated = {self._run.config().source.label_column} if self._run is not None else set()
        if None in stated:
            return  # those of the list are pseudo-labels
        column = next(
            (
                name
                for name in getattr(dataset, "column_names", None) or ()
                if name in stated | {"label"}
            ),
            None,
        )
        if column is not None:
            told = list(dataset[column])
        else:
            told = list(getattr(dataset, "targets", ()))
        if len(told) != len(dataset) or not all(
            isinstance(label, int | np.integer) for label in told
        ):
            return
        label = self.labels[rows]
        wrong = int((np.array(told)[position] != label)[label >= 0].sum())
        if wrong:
            raise SourceError(
                f"{wrong:,} of {len(rows):,} samples have another label in the dataset than in the keep-list: is it in the order of the "
                "source, without shuffling or filtering? Give ids"
            )
