"""The formats that are folders of shards: names of the shards, their writers, and last files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

from raypipe import storage
from raypipe.config.export import SHARD_FORMATS
from raypipe.exports import croissant, huggingface, lance, mds
from raypipe.exports.finished import FinishedExport
from raypipe.exports.formats import Item, write_parquet, write_tar


class WrittenShard(NamedTuple):
    """What a writer reports of a shard: its path in the export, its samples, and details."""

    file: str
    samples: int
    detail: Mapping[str, Any]


Writer = Callable[[str, str, Iterable[Item], Sequence[str], bool], WrittenShard]
"""Takes the folder, the name of the shard, its samples, the class names, and whether there are
weights."""


def _no_files(_: FinishedExport) -> Mapping[str, bytes]:
    return {}


@dataclass(frozen=True)
class ShardFormat:
    """One format.

    Attributes
    ----------
    name : str
        Name of a shard, with {number} and, if it is part of it, {total}.
    write : callable
        Writes a shard.
    finish : callable
        Returns the content of files to write when all shards are complete, in this order.
    files : sequence of str
        Names of these files.
    folders : sequence of str
        Folders that the format writes.
    """

    name: str
    write: Writer
    finish: Callable[[FinishedExport], Mapping[str, bytes]] = _no_files
    files: Sequence[str] = ()
    folders: Sequence[str] = ()

    @property
    def temporary(self) -> re.Pattern[str]:
        """Pattern of temporary files that killed writers of shards leave on a local disk."""
        name = re.sub(r"\\{\w+\\}", r"\\d{5,}", re.escape(self.name))
        return re.compile(rf"\.{name}\.[0-9a-f]{{32}}")


def _streamed(write: Callable[[IO[bytes], Iterable[Item], Sequence[str], bool], int]) -> Writer:
    """Return a writer to one file, which appears when it is complete."""

    def write_file(
        to: str, name: str, items: Iterable[Item], classes: Sequence[str], weighted: bool
    ) -> WrittenShard:
        with storage.Upload(storage.join(to, name)) as file:
            return WrittenShard(name, write(file, items, classes, weighted), {})

    return write_file


def _lance_fragment(
    to: str, _: str, items: Iterable[Item], classes: Sequence[str], weighted: bool
) -> WrittenShard:
    return WrittenShard(*lance.write_fragment(to, items, classes, weighted))


_PARQUET = "train-{number}-of-{total}.parquet"
FORMATS = {
    "webdataset": ShardFormat("train-{number}.tar", _streamed(write_tar)),
    "parquet": ShardFormat(_PARQUET, _streamed(write_parquet)),
    "croissant": ShardFormat(
        _PARQUET, _streamed(write_parquet), croissant.croissant_files, (croissant.CROISSANT_FILE,)
    ),
    "huggingface": ShardFormat(
        "data-{number}-of-{total}.arrow",
        _streamed(huggingface.write_arrow),
        huggingface.huggingface_files,
        huggingface.FILES,
    ),
    "mds": ShardFormat(
        "shard.{number}.mds", _streamed(mds.write_mds), mds.mds_index, (mds.INDEX_FILE,)
    ),
    "lance": ShardFormat(
        "fragment-{number}", _lance_fragment, lance.commit_lance, folders=lance.FOLDERS
    ),
}
"""The formats of `raypipe.config.export.SHARD_FORMATS`."""
assert set(FORMATS) == set(SHARD_FORMATS)
