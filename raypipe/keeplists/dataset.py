"""Keep-lists for training code, with adapters for the datasets of other libraries.

torch and Ray are imported by the methods that need them, and not before.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raypipe import storage
from raypipe.errors import ConfigError
from raypipe.keeplists.file import KeepFile, find_keep_list
from raypipe.keeplists.matching import Ids, Matcher, id_text
from raypipe.keeplists.webdataset import kept_samples
from raypipe.runs.keep_files import keep_metadata
from raypipe.runs.run import Run
from raypipe.selection import hash64
from raypipe.selection.redraw import draw, inclusion_probabilities, unbiased_weights
from raypipe.sources.noise import LabelNoise

if TYPE_CHECKING:
    import torch
    from torch.utils.data import Subset, WeightedRandomSampler

    from raypipe.distributed.ray_data import Dataset as RayDataset
    from raypipe.keeplists.stream import KeptStream


_NUMBERS: dict[str, Callable[[str], Any]] = {
    "fraction": float,
    "count": int,
    "samples": int,
    "forced": lambda value: value == "true",
    "inject_noise": float,
    "spearman": lambda value: None if value == "unknown" else float(value),
    "spearman_low": lambda value: None if value == "unknown" else float(value),
    "spearman_all": float,
}


class KeepList:
    """The samples to keep, with labels, scores and weights.

    A keep-list has a length, iterates over its ids, and supports `sample_id in keep_list`. It can
    be pickled, for example for the workers of a DataLoader.

    Parameters
    ----------
    uri : str or os.PathLike
        A run folder, or a keep-list file (.parquet). Local path or URI.
    keep : float, optional
        Fraction of the list, 0 to 1. Default: the only list of the run.
    snapshot : str, optional
        Name of a snapshot of a nightly run. Default: the list as it is now.

    Attributes
    ----------
    uri : str
        The keep-list file.

    Raises
    ------
    RunError
        If there is no such list. The error names the available lists.

    Examples
    --------
    >>> from raypipe import KeepList
    >>> keep = KeepList("runs/first", keep=0.5)  # doctest: +SKIP
    >>> train = keep.subset(torchvision.datasets.ImageFolder("/data"))  # doctest: +SKIP
    >>> KeepList("runs/first", keep=0.5, snapshot="2026-11-22T020000Z")  # doctest: +SKIP
    >>> KeepList("runs/first/keep/keep-0.50.parquet")  # doctest: +SKIP
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

    @property
    def ids(self) -> list[str]:
        """Sample ids, list of str.

        Labels, scores and weights have the same order: that of the score shards, not of the source.
        """
        return self._matcher.ids

    @property
    def labels(self) -> np.ndarray:
        """Class indices, int32 [n]; -1 for an unlabelled sample."""
        return pc.fill_null(self._table["label"], -1).to_numpy()

    @property
    def scores(self) -> np.ndarray:
        """Scores, float32 [n]; higher means keep."""
        return self._table["score"].to_numpy()

    @property
    def weights(self) -> np.ndarray | None:
        """Training weights, float32 [n]; None if the strategy of the list gives none."""
        return (
            self._table["weight"].to_numpy().astype(np.float32)
            if "weight" in self._table.column_names
            else None
        )

    @functools.cached_property
    def metadata(self) -> dict[str, Any]:
        """How the list was cut.

        Keys are fraction, strategy, count (kept samples), samples (all scored samples), scores
        (their hash), spearman, spearman_low and forced; spearman_all, over all classes, where
        spearman is within classes; inject_noise for runs with injected label noise. Spearman
        figures are None if unknown. Keys that a strategy adds have text values.
        """
        return {
            key: _NUMBERS.get(key, str)(value) for key, value in keep_metadata(self.uri).items()
        }

    def redraw(
        self, epoch: int, share: float = 0.5, *, seed: int = 0, ratio: float = 1.0
    ) -> KeepList:
        """Return a draw from the list, another one for every epoch.

        A training on it takes as many steps as one on a list of that length, but sees all samples
        of this list in the course of the epochs (RS2, arXiv 2305.18424). A sample is drawn or not
        by a hash of its id, the seed and the epoch.

        Parameters
        ----------
        epoch : int
            Number of the epoch.
        share : float
            Share of this list, above 0 and at most 1. Exactly round(share * len(self)) samples are
            drawn, at least one.
        seed : int
            Another seed gives other draws.
        ratio : float
            How much more likely the sample with the highest score is drawn than that with the
            lowest, at least 1. Between them, the probability grows geometrically with the rank of
            the score. 1: all are equally likely.

        Returns
        -------
        KeepList
            The drawn samples. Their `weights` make the mean weighted loss over a draw an unbiased
            estimate of that over this list: k / (n * probability), times the weights of this list
            if it has any. Its `metadata` are those of this list.

        Raises
        ------
        ConfigError
            For an empty list, or a share or ratio out of range.

        Examples
        --------
        >>> for epoch in range(90):  # doctest: +SKIP
        ...     train = keep.redraw(epoch, 0.5).subset(dataset, weights=True)
        ...     for images, labels, weights in DataLoader(train, batch_size=256, shuffle=True):
        ...         losses = cross_entropy(model(images), labels, reduction="none")
        ...         (losses * weights).mean().backward()
        """
        if not len(self) or not 0 < share <= 1 or ratio < 1:
            raise ConfigError(
                f"{self.uri}: a draw of share {share!r} with ratio {ratio!r} from {len(self):,} "
                "samples is not possible; share must be above 0 and at most 1, ratio at least 1"
            )
        count = max(1, round(share * len(self)))
        probability = inclusion_probabilities(self.scores, count, ratio)
        rows = draw(self._hashes, probability, seed, epoch)
        weight = unbiased_weights(probability)[rows]
        if self.weights is not None:
            weight = weight * self.weights[rows]
        table = self._table.select(["sample_id", "label", "score"]).take(pa.array(rows))
        drawn = KeepList.__new__(KeepList)
        drawn.uri, drawn._run = self.uri, self._run
        drawn._table = table.append_column("weight", pa.array(weight, pa.float32()))
        return drawn

    # -- PyTorch -----------------------------------------------------------------------------------

    def indices(self, ids: Iterable[Any], *, strict: bool = True) -> list[int]:
        """Return the indices of the kept samples of a dataset.

        Parameters
        ----------
        ids : iterable
            Sample ids of the dataset, in its order. They are compared as text.
        strict : bool
            Whether every kept sample must be in `ids`.

        Returns
        -------
        list of int
            Ascending positions in `ids`.

        Raises
        ------
        SourceError
            If a kept id occurs twice in `ids`, or with `strict` is not in `ids`.

        Examples
        --------
        >>> keep.indices(["cat/1.png", "cat/2.png", "dog/1.png"], strict=False)  # doctest: +SKIP
        [0, 2]
        """
        return self._matcher.by_ids(ids, strict)[0].tolist()

    def subset(
        self, dataset: Any, ids: Ids | None = None, *, strict: bool = True, weights: bool = False
    ) -> Subset[Any]:
        """Return the kept samples of a map-style dataset, in its order.

        Parameters
        ----------
        dataset : torch.utils.data.Dataset
            The dataset.
        ids : sequence of str or callable, optional
            Sample ids of the dataset in its order, or a function from an index to the id. By
            default they are derived, for

            - torchvision's ImageFolder and DatasetFolder on the folder of the source;
            - a Hugging Face `datasets.Dataset` with a column of ids: `sample_id`, or the run's
              `source.id_column`;
            - any dataset in the order of the rows of the Parquet files, sorted by path (several
              files: only for a list in its run); labels of the dataset are compared if it has any;
            - any dataset in the order of ids that end in a number, such as the bundled digits;
              labels are compared as well;
            - a `Subset` of one of these.
        strict : bool
            Whether every kept sample must be in the dataset.
        weights : bool
            Whether each sample comes with its weight: as one more element of a tuple, or as
            `weight` of a dict.

        Returns
        -------
        torch.utils.data.Subset
            The kept samples.

        Raises
        ------
        ConfigError
            If the list has no weights, with `weights`.
        SourceError
            If the ids cannot be derived or do not fit; see `indices`.

        Examples
        --------
        >>> train = keep.subset(torchvision.datasets.ImageFolder("/data"))  # doctest: +SKIP
        """
        from torch.utils.data import Subset

        from raypipe.keeplists.weighted_subset import WeightedSubset

        position, rows = self._matcher.find(dataset, ids, strict)
        if not weights:
            return Subset(dataset, position.tolist())
        return WeightedSubset(dataset, position.tolist(), self._known_weights()[rows].tolist())

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
        """Return a sampler that draws from `subset(dataset, ids)` by weight.

        Parameters
        ----------
        dataset, ids, strict
            As for `subset`.
        num_samples : int, optional
            Samples per epoch. Default: the size of the subset.
        replacement : bool
            Whether to draw with replacement.
        generator : torch.Generator, optional
            Source of randomness.

        Returns
        -------
        torch.utils.data.WeightedRandomSampler
            A sampler for the subset.

        Raises
        ------
        ConfigError
            If the list has no weights.
        SourceError
            As for `subset`.

        Examples
        --------
        >>> sampler = keep.sampler(dataset)  # doctest: +SKIP
        >>> loader = DataLoader(keep.subset(dataset), sampler=sampler)  # doctest: +SKIP
        """
        from torch.utils.data import WeightedRandomSampler

        weights = self._known_weights()
        rows = self._matcher.find(dataset, ids, strict)[1]
        return WeightedRandomSampler(
            weights[rows].tolist(), num_samples or len(rows), replacement, generator
        )

    def _known_weights(self) -> np.ndarray:
        """Return `weights`; raise ConfigError if there are none."""
        if self.weights is None:
            raise ConfigError(
                f"{self.uri}: the list has no weights, because the strategy "
                f"{self.metadata.get('strategy')!r} gives none; see select.weights"
            )
        return self.weights

    # -- Ray Data and WebDataset -------------------------------------------------------------------

    def filter(
        self,
        dataset: RayDataset,
        id_column: str = "sample_id",
        *,
        root: str = "",
        columns: Sequence[str] = (),
    ) -> RayDataset:
        """Return the rows of a Ray Dataset whose id is kept, in their order.

        The result is lazy, like all Ray Datasets. The list is shared once per machine.

        Parameters
        ----------
        dataset : ray.data.Dataset
            The dataset.
        id_column : str
            Its column with the sample ids.
        root : str
            Folder of the source, if the column contains whole paths, such as `path` of
            `ray.data.read_images`.
        columns : sequence of str
            Columns of the keep-list to add to the rows: "label", "score" or "weight". They replace
            columns of the same name.

        Returns
        -------
        ray.data.Dataset
            The kept rows.

        Raises
        ------
        ConfigError
            If the list has no such column.

        Examples
        --------
        >>> kept = keep.filter(dataset, "path", root="/data", columns=["weight"])  # doctest: +SKIP
        """
        from raypipe.distributed.ray_data.join import filter_dataset

        unknown = sorted(set(columns) - set(self._table.column_names))
        if unknown:
            raise ConfigError(
                f"{self.uri}: has no column {unknown[0]!r}; columns: "
                f"{', '.join(self._table.column_names)}"
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
        """Yield the kept samples of a `webdataset` pipeline. Put it before decoding.

        Warns if there were samples and none was kept.

        Parameters
        ----------
        samples : iterable of dict
            Samples with `__key__` and `__url__`.
        root : str, optional
            URL of the folder that the tar paths in ids are relative to. Default: that of the run's
            source. URLs elsewhere (a copy, a cache) are matched by the end of their path.

        Yields
        ------
        dict
            The kept samples, unchanged.

        Examples
        --------
        >>> pipeline = webdataset.WebDataset(urls).compose(keep.filter_webdataset)  # doctest: +SKIP
        """
        root = root if root is not None else self._source_root
        return kept_samples(samples, self.uri, self._set, self._matcher.files, root)

    # -- Hugging Face, MDS, LitData ----------------------------------------------------------------

    def filter_huggingface(
        self, dataset: Any, ids: Ids | None = None, *, id_column: str = "sample_id"
    ) -> Any:
        """Return the kept rows of a Hugging Face dataset, as a dataset of the same kind.

        Parameters
        ----------
        dataset : datasets.Dataset or datasets.IterableDataset
            The dataset.
        ids : sequence of str or callable, optional
            For a `Dataset`: see `subset`. Every kept sample must be in it.
        id_column : str
            For an `IterableDataset`: the column with the sample ids. It is filtered as it is read,
            so missing samples go unnoticed.

        Raises
        ------
        SourceError
            If the ids cannot be derived or do not fit; see `subset`.

        Examples
        --------
        >>> train = keep.filter_huggingface(datasets.load_from_disk("/data"))  # doctest: +SKIP
        """
        if hasattr(dataset, "select"):
            return dataset.select(self._matcher.find(dataset, ids, True)[0])
        kept = self._set
        return dataset.filter(lambda one: id_text(one) in kept, input_columns=[id_column])

    def filter_stream(
        self, dataset: Iterable[dict[str, Any]], id_column: str = "sample_id"
    ) -> KeptStream:
        """Return the kept samples of a dataset that streams dicts, such as MDS or LitData.

        It is filtered as it is read, so missing samples go unnoticed, and dropped samples are read.

        Parameters
        ----------
        dataset : streaming.StreamingDataset, litdata.StreamingDataset or iterable of dict
            The dataset.
        id_column : str
            Key of the id in a sample.

        Returns
        -------
        torch.utils.data.IterableDataset
            The kept samples, in the order of the dataset. It has no length.

        Examples
        --------
        >>> train = keep.filter_stream(streaming.StreamingDataset(local="/data"))  # doctest: +SKIP
        >>> train = keep.filter_stream(litdata.StreamingDataset("/data"), "id")  # doctest: +SKIP
        """
        from raypipe.keeplists.stream import KeptStream

        return KeptStream(dataset, self.uri, self._set, id_column)

    # -- matching ----------------------------------------------------------------------------------

    @functools.cached_property
    def _matcher(self) -> Matcher:
        return Matcher(self.uri, self._table, self._run)

    @functools.cached_property
    def _hashes(self) -> np.ndarray:
        return hash64(self._table["sample_id"].combine_chunks())

    @functools.cached_property
    def _set(self) -> frozenset[str]:
        return frozenset(self.ids)

    @functools.cached_property
    def _source_root(self) -> str | None:
        if self._run is None:
            return None
        return storage.glob_root(self._run.config().source.uri)
