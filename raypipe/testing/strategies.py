"""Check a keep strategy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from raypipe.selection import Chunk, KeepStrategy, SelectionOptions, select
from raypipe.selection.outside import strategy_of_class
from raypipe.testing.contract import (
    ContractError,
    Unchanged,
    check_declaration,
    failures,
    require,
)

SAMPLES, CLASSES, WIDTH = 600, 4, 8
KEEP = (0.2, 0.5, 0.8)


def check_strategy(part: type[KeepStrategy], **options: Any) -> None:
    """Check a keep strategy on an artificial stream of 600 samples.

    Checked are what the class declares, that lists can be cut, that the same stream gives the same
    lists in whatever order and chunks it comes, that the input stays unchanged, and that the lists
    are as `nested`, `uses_scores`, `uses_classes` and `draws_at_random` state.

    Parameters
    ----------
    part : type of KeepStrategy
    **options
        Options by name. Default: those of the part.

    Raises
    ------
    ContractError
        What is broken.
    """
    settings = check_declaration(part, KeepStrategy, options)
    require(bool(part.kept.strip()), part, "kept is empty; say what a keep-list contains")
    own = {part.__name__: settings.model_dump()}
    stream = _Stream.drawn(part)
    unchanged = Unchanged(part, stream.arrays())
    base = SelectionOptions(own=own)
    first = _lists(part, stream, base)
    unchanged.check()
    again = _lists(part, stream, base)
    require(first == again, part, "the same stream gives another list at a second call")
    others = _lists(part, replace(stream, chunk=53), base)
    require(first == others, part, "the list depends on how the stream is divided into chunks")
    shuffled = stream.taken(np.random.default_rng(5).permutation(SAMPLES))
    require(
        first == _lists(part, shuffled, base), part, "the list depends on the order of the samples"
    )
    if part.nested:
        for small, large in pairwise(first):
            require(
                small <= large,
                part,
                "nested is true, but a smaller list is not contained in a larger one",
            )
    random = np.random.default_rng(6)
    if not part.uses_scores:
        other = replace(stream, score=random.permutation(stream.score))
        require(
            first == _lists(part, other, base),
            part,
            "uses_scores is false, but other scores give another list",
        )
    if not (part.uses_classes or part.balances_classes):
        other = replace(stream, label=random.permutation(stream.label))
        require(
            first == _lists(part, other, base),
            part,
            "uses_classes is false, but other labels give another list",
        )
    reseeded = _lists(part, stream, SelectionOptions(seed=1, own=own))
    if part.draws_at_random:
        require(
            first != reseeded, part, "draws_at_random is true, but another seed changes nothing"
        )
    else:
        require(
            first == reseeded, part, "draws_at_random is false, but another seed gives another list"
        )


@dataclass(frozen=True)
class _Stream:
    """An artificial stream: loss, margin and embeddings are None unless the strategy needs them."""

    score: np.ndarray
    label: np.ndarray
    ids: np.ndarray
    loss: np.ndarray | None
    margin: np.ndarray | None
    embedding: np.ndarray | None
    chunk: int = 128

    @classmethod
    def drawn(cls, part: type[KeepStrategy]) -> _Stream:
        random = np.random.default_rng(4)
        label = random.integers(0, CLASSES, SAMPLES).astype(np.int32)
        loss = random.exponential(1, SAMPLES).astype(np.float32)
        score = (0.5 * loss + random.normal(0, 0.3, SAMPLES)).astype(np.float32)
        margin = (1 - loss).astype(np.float32)
        embedding = random.normal(size=(SAMPLES, WIDTH)).astype(np.float32)
        embedding[np.arange(SAMPLES), label] += 4
        has_loss = part.needs_loss or part.uses_difficulty
        return cls(
            score,
            label,
            np.array([f"sample-{row}" for row in range(SAMPLES)]),
            loss if has_loss else None,
            margin if part.uses_difficulty else None,
            embedding if part.needs_embeddings else None,
        )

    def arrays(self) -> Mapping[str, np.ndarray]:
        named = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return {name: value for name, value in named.items() if name != "ids"}

    def taken(self, rows: np.ndarray) -> _Stream:
        changed = {name: value[rows] for name, value in self.arrays().items()}
        return replace(self, ids=self.ids[rows], **changed)

    def chunks(self, with_ids: bool) -> Iterator[Chunk]:
        for start in range(0, SAMPLES, self.chunk):
            rows = slice(start, start + self.chunk)
            yield Chunk(
                self.score[rows],
                self.label[rows],
                self.ids[rows].tolist() if with_ids else (),
                None if self.loss is None else self.loss[rows],
                None,
                start,
                None if self.margin is None else self.margin[rows],
            )

    def embedded(self) -> Iterator[tuple[Chunk, np.ndarray]]:
        assert self.embedding is not None
        for chunk in self.chunks(True):
            start = chunk.position or 0
            yield chunk, self.embedding[start : start + len(chunk.score)]


def _lists(
    part: type[KeepStrategy], stream: _Stream, options: SelectionOptions
) -> list[frozenset[str]]:
    """Return the ids of each list."""
    embedded = stream.embedded if stream.embedding is not None else None
    try:
        with failures(part, "cutting a list"):
            rule = strategy_of_class(part.__name__, part)
            cuts = select(stream.chunks, KEEP, rule, CLASSES, options, embedded=embedded)
            chosen: list[set[str]] = [set() for _ in KEEP]
            for chunk in stream.chunks(True):
                for ids, cut in zip(chosen, cuts, strict=True):
                    ids.update(np.array(chunk.sample_id)[cut.mask(chunk)].tolist())
    except ContractError as error:
        hint = "" if part.needs_loss else "; chunk.loss is None unless needs_loss is true"
        if "NoneType" in str(error):
            raise ContractError(f"{error}{hint}") from None
        raise
    return [frozenset(ids) for ids in chosen]
