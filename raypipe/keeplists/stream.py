"""Filter a dataset that streams its samples by a keep-list."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch.utils.data import IterableDataset

from raypipe.errors import SourceError


class KeptStream(IterableDataset):
    """The kept samples of a dataset that yields dicts, in its order.

    It can be iterated repeatedly, and in the workers of a DataLoader: the dataset itself divides
    its samples between workers.

    Parameters
    ----------
    dataset : iterable of dict
        The dataset.
    uri : str
        The keep-list file, for messages.
    ids : collection of str
        Ids of the kept samples.
    id_column : str
        Key of the id in a sample.
    """

    def __init__(
        self,
        dataset: Iterable[Mapping[str, Any]],
        uri: str,
        ids: Collection[str],
        id_column: str,
    ) -> None:
        self._dataset, self._uri, self._ids, self._id_column = dataset, uri, ids, id_column

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        """Yield the kept samples.

        Raises SourceError for a sample without an id; warns if there were samples and none was
        kept.
        """
        seen = kept = 0
        sample_id: Any = None
        for sample in self._dataset:
            try:
                sample_id = sample[self._id_column]
            except (KeyError, TypeError, IndexError):
                raise SourceError(
                    f"sample {seen} has no {self._id_column!r}, by which {self._uri} would select "
                    "it; set id_column to the key of the sample ids"
                ) from None
            seen += 1
            if str(sample_id) in self._ids:
                kept += 1
                yield sample
        if seen and not kept:
            example = f", ids of the keep-list are like {min(self._ids)!r}" if self._ids else ""
            warnings.warn(
                f"{self._uri} contains no sample of the {seen} read: the last was {sample_id!r}"
                f"{example}; check id_column",
                stacklevel=2,
            )
