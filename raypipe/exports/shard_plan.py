"""Which samples go into which shard: a fixed number of kept samples each, in source order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raypipe.errors import RunError
from raypipe.exports.shard_formats import FORMATS
from raypipe.keeplists.file import Located
from raypipe.sources import Fragment


@dataclass(frozen=True)
class ExportPart:
    """Kept samples of one fragment that go into one shard.

    Attributes
    ----------
    fragment : Fragment
        The fragment.
    start, stop : int
        Rows of the keep-list that belong to the fragment.
    skip, take : int
        Which of them go into the shard: `take` samples after the first `skip`, in source order.
    """

    fragment: Fragment
    start: int
    stop: int
    skip: int
    take: int


@dataclass(frozen=True)
class Shard:
    """Content of one output file; `first` is the number of its first sample among all kept ones."""

    name: str
    first: int
    parts: tuple[ExportPart, ...]

    @property
    def samples(self) -> int:
        """Number of samples that the shard should contain."""
        return sum(part.take for part in self.parts)


def plan_shards(
    fragments: Sequence[Fragment], located: Located, size: int, format: str
) -> list[Shard]:
    """Split the kept samples into shards of `size` samples, in source order.

    The last shard can be smaller. Raises RunError if the keep-list has samples of other fragments.
    """
    spans = [located.rows[fragment.fragment_id] for fragment in fragments]
    indexed = sum(stop - start for start, stop in spans)
    if indexed != located.samples:
        raise RunError(
            f"{located.samples - indexed:,} samples of the keep-list are in files that are no "
            "longer in the index; rerun `raypipe run`"
        )
    parts_of_shards: list[list[ExportPart]] = []
    room = 0
    for fragment, (start, stop) in zip(fragments, spans, strict=True):
        skip = 0
        while skip < stop - start:
            if room == 0:
                parts_of_shards.append([])
                room = size
            take = min(room, stop - start - skip)
            parts_of_shards[-1].append(ExportPart(fragment, start, stop, skip, take))
            skip, room = skip + take, room - take
    return [
        Shard(shard_name(format, number, located.samples, size), number * size, tuple(parts))
        for number, parts in enumerate(parts_of_shards)
    ]


def shard_name(format: str, number: int, samples: int, size: int) -> str:
    """Return the name of a shard, such as train-00000.tar or train-00000-of-00012.parquet."""
    total = -(-samples // size)
    width = max(5, len(str(total - 1)))
    return FORMATS[format].name.format(number=f"{number:0{width}d}", total=f"{total:0{width}d}")
