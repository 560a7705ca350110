"""Strategies that compare samples by their embeddings, against slow and plain versions."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from raypipe.errors import ConfigError
from raypipe.selection import NEVER, STRATEGIES, Chunk, Parts, SelectionOptions, hash64, select
from raypipe.selection import blocks as blocks_module
from raypipe.selection.hashing import ORDER_SEED
from raypipe.selection.infomax import project

CLASSES = 3
NAMES = ("d2", "infomax", "coverage", "typical")


@dataclass(frozen=True)
class Data:
    """Samples with clustered embeddings, in the order of their hashes."""

    score: np.ndarray
    label: np.ndarray
    vectors: np.ndarray
    ids: list[str]
    mark: np.ndarray | None = None

    @classmethod
    def drawn(cls, samples: int, seed: int = 0, classes: int = CLASSES) -> Data:
        draw = np.random.default_rng(seed)
        names = [f"sample-{row}" for row in range(samples)]
        ids = [names[row] for row in np.argsort(hash64(names, ORDER_SEED))]
        centres = draw.normal(size=(12, 6))
        vectors = centres[draw.integers(12, size=samples)] + draw.normal(size=(samples, 6)) / 3
        return cls(
            draw.gamma(2, 1, samples).astype(np.float32),
            draw.integers(classes, size=samples).astype(np.int32),
            vectors.astype(np.float32),
            ids,
        )

    def take(self, rows: np.ndarray) -> Data:
        return Data(
            self.score[rows],
            self.label[rows],
            self.vectors[rows],
            [self.ids[row] for row in rows],
            None if self.mark is None else self.mark[rows],
        )

    def kept(
        self, strategy: str, keep: float, size: int = 50, dtype: str = "f4", **options: object
    ) -> set[str]:
        def chunks(with_ids: bool) -> Iterator[Chunk]:
            for start in range(0, len(self.ids), size):
                part = slice(start, start + size)
                ids = self.ids[part] if with_ids else ()
                mark = None if self.mark is None else self.mark[part]
                yield Chunk(self.score[part], self.label[part], ids, None, mark, start)

        def embedded() -> Iterator[tuple[Chunk, np.ndarray]]:
            for chunk in chunks(True):
                assert chunk.position is not None
                end = chunk.position + len(chunk.score)
                yield chunk, self.vectors[chunk.position : end].astype(dtype)

        chosen = SelectionOptions(**options)  # type: ignore[arg-type]
        marked = self.mark is not None
        (cut,) = select(chunks, [keep], strategy, CLASSES, chosen, marked, embedded)
        kept = {
            chunk.sample_id[row]
            for chunk in chunks(True)
            for row in np.flatnonzero(cut.mask(chunk))
        }
        assert len(kept) == cut.count == round(keep * len(self.ids))
        return kept


def neighbours(vectors: np.ndarray, k: int) -> list[list[tuple[float, int]]]:
    """Return distance and row of the k nearest others of each sample."""
    v = vectors.astype(np.float64)
    return [
        sorted((float(np.linalg.norm(v[i] - v[j])), j) for j in range(len(v)) if j != i)[:k]
        for i in range(len(v))
    ]


def not_hardest(data: Data, share: float) -> np.ndarray:
    """Return the rows that are left, in their order."""
    return np.sort(np.argsort(-data.score, kind="stable")[int(share * len(data.ids)) :])


def plain_d2(data: Data, kept: int, share: float) -> set[str]:
    data = data.take(not_hardest(data, share))
    near = neighbours(data.vectors, 5)
    scale = np.mean([distance for row in near for distance, _ in row])
    s = data.score.astype(np.float64)
    u = [s[i] + sum(np.exp(-d / scale) * s[j] for d, j in near[i]) for i in range(len(s))]
    chosen: list[int] = []
    while len(chosen) < kept:
        best = max((i for i in range(len(s)) if i not in chosen), key=lambda i: (u[i], -i))
        chosen.append(best)
        message = u[best]
        for d, j in near[best]:
            u[j] -= np.exp(-0.1 * d / scale) * message
    return {data.ids[i] for i in chosen}


def similarities(vectors: np.ndarray, k: int) -> np.ndarray:
    """Return the kernel of InfoMax, dense."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    kernel = np.zeros((len(unit), len(unit)))
    for i, row in enumerate(neighbours(unit, k)):
        for _, j in row:
            kernel[i, j] = kernel[j, i] = max(0.0, float(unit[i].astype(np.float64) @ unit[j]))
    return kernel


def plain_projection(y: np.ndarray, total: float) -> np.ndarray:
    """Project on the capped simplex by trying every pair of breakpoints."""
    edges = np.sort(np.concatenate([y, y - 1]))
    for low, high in itertools.pairwise(edges):
        inside = (y > low) & (y - 1 < high) & (y >= high) & (y - 1 <= low)
        above = (y - 1 >= high).sum()
        if inside.any():
            shift = (y[inside].sum() + above - total) / inside.sum()
            if low - 1e-12 <= shift <= high + 1e-12:
                return np.clip(y - shift, 0, 1)
    raise AssertionError("no shift gives this sum")


def plain_infomax(data: Data, kept: int, share: float) -> set[str]:
    data = data.take(not_hardest(data, share))
    n, kernel = len(data.ids), similarities(data.vectors, 10)
    s = (data.score - data.score.min()).astype(np.float64) / float(np.ptp(data.score))
    a = s.mean() / (kept / n * kernel.sum(axis=1).mean())
    step = 1 / (2 * a * np.linalg.norm(kernel, 2))
    x = np.full(n, kept / n)
    for _ in range(300):
        x = plain_projection(x + step * (s - 2 * a * kernel @ x), kept)
    gradient = s - 2 * a * kernel @ x
    order = sorted(range(n), key=lambda i: (-round(x[i], 9), -gradient[i]))
    return {data.ids[i] for i in order[:kept]}


def plain_typical(data: Data, kept: int, _: float) -> set[str]:
    last = [row[-1][0] for row in neighbours(data.vectors, 20)]
    return {data.ids[i] for i in np.argsort(last, kind="stable")[:kept]}


def plain_coverage(data: Data, kept: int, share: float, strata: int = 1) -> set[str]:
    data = data.take(not_hardest(data, share))
    similarity = similarities(data.vectors, 20) + np.eye(len(data.ids))
    chosen: list[int] = []
    for _ in range(kept):
        gains = [
            np.maximum(similarity[:, [*chosen, i]].max(axis=1), 0).sum() if i not in chosen else -1
            for i in range(len(data.ids))
        ]
        chosen.append(int(np.argmax(np.round(gains, 9))))
    return {data.ids[i] for i in chosen}


PLAIN: dict[str, Callable[[Data, int, float], set[str]]] = {
    "d2": plain_d2,
    "infomax": plain_infomax,
    "coverage": plain_coverage,
    "typical": plain_typical,
}


@pytest.mark.parametrize("strategy", NAMES)
@pytest.mark.parametrize(("keep", "cutoff"), [(0.1, 0.3), (0.4, 0.2), (0.5, 0.0)])
def test_lists_are_those_of_the_plain_version(strategy: str, keep: float, cutoff: float) -> None:
    data = Data.drawn(150, seed=3)
    expected = PLAIN[strategy](data, round(keep * 150), cutoff)
    assert data.kept(strategy, keep, hard_cutoff=cutoff, strata=1) == expected
    random_rows = np.random.default_rng(0).permutation(150)
    assert data.take(random_rows).kept(strategy, keep, hard_cutoff=cutoff, strata=1) == expected


@pytest.mark.parametrize("strategy", NAMES)
def test_within_classes_each_class_is_chosen_as_if_alone(strategy: str) -> None:
    data = Data.drawn(240, seed=5)
    data = replace(data, label=np.repeat(np.arange(3), 80)[np.argsort(data.score)].astype(np.int32))
    together = data.kept(strategy, 0.25, by_class=True, hard_cutoff=0.1, strata=4)
    for label in range(3):
        alone = data.take(np.flatnonzero(data.label == label))
        kept = alone.kept(strategy, 0.25, hard_cutoff=0.1, strata=4)
        assert kept == together & set(alone.ids)


def parts_of(data: Data, count: int) -> Parts:
    """Return parts of equal size, by the row of each sample."""
    row = {name: number for number, name in enumerate(data.ids)}
    return Parts(count, lambda ids: np.array([row[name] % count for name in ids], np.int64))


@pytest.mark.parametrize("strategy", ["d2", "infomax"])
def test_scores_of_neighbours_are_weighed_within_a_part(strategy: str) -> None:
    data = Data.drawn(150, seed=3)
    parts = parts_of(data, 3)
    kept = data.kept(strategy, 0.4, hard_cutoff=0.0, parts=parts)
    for number in range(3):
        part = data.take(np.arange(number, 150, 3))
        assert kept & set(part.ids) == PLAIN[strategy](part, 20, 0.0)


@pytest.mark.parametrize("strategy", ["d2", "infomax"])
def test_what_other_parts_know_of_a_sample_changes_nothing_for_it(strategy: str) -> None:
    data = Data.drawn(150, seed=8, classes=1)
    first = np.arange(150) % 3 == 0
    raised = replace(data, score=np.where(first, data.score, data.score[::-1] + 1))
    of_first = {data.ids[row] for row in np.flatnonzero(first)}

    def kept_of_first(of: Data, parts: Parts | None) -> set[str]:
        return of.kept(strategy, 0.3, hard_cutoff=0.0, parts=parts) & of_first

    parts = parts_of(data, 3)
    assert kept_of_first(data, parts) == kept_of_first(raised, parts)
    assert kept_of_first(data, None) != kept_of_first(raised, None)


@pytest.mark.parametrize("strategy", ["d2", "infomax"])
def test_parts_of_a_large_class_are_divided_into_blocks(
    strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Data.drawn(400, seed=1)
    chosen = {"by_class": True, "parts": parts_of(data, 2)}
    monkeypatch.setattr(blocks_module, "BLOCK_SAMPLES", 30)
    monkeypatch.setattr(blocks_module, "HELD_BYTES", 100 * 6 * 4)
    kept = data.kept(strategy, 0.3, **chosen)
    shares = [len(kept & set(data.ids[part::2])) / 200 for part in range(2)]
    assert shares == pytest.approx([0.3, 0.3], abs=0.02)
    order = np.random.default_rng(2).permutation(400)
    assert data.take(order).kept(strategy, 0.3, size=33, **chosen) == kept


@pytest.mark.parametrize("strategy", NAMES)
def test_a_large_class_is_divided_by_hashes_into_blocks(
    strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Data.drawn(400, seed=1)
    whole = data.kept(strategy, 0.3, by_class=True, strata=2)
    monkeypatch.setattr(blocks_module, "BLOCK_SAMPLES", 50)
    monkeypatch.setattr(blocks_module, "HELD_BYTES", 100 * 6 * 4)
    kept = data.kept(strategy, 0.3, by_class=True, strata=2)
    assert kept != whole
    order = np.array(random.Random(2).sample(range(400), 400))
    assert data.take(order).kept(strategy, 0.3, size=33, by_class=True, strata=2) == kept
    label = dict(zip(data.ids, data.label.tolist(), strict=True))
    counts = np.bincount([label[name] for name in kept]) / np.bincount(data.label)
    assert np.ptp(counts) < 0.02


def test_blocks_are_read_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Data.drawn(400, seed=1)
    sizes: list[list[int]] = []
    read_batch = blocks_module._read_batch

    def record(*arguments: Any) -> Iterator[blocks_module.Block]:
        blocks = list(read_batch(*arguments))
        sizes.append([len(block.vectors) for block in blocks])
        return iter(blocks)

    monkeypatch.setattr(blocks_module, "BLOCK_SAMPLES", 50)
    monkeypatch.setattr(blocks_module, "HELD_BYTES", 100 * 6 * 4)
    monkeypatch.setattr(blocks_module, "_read_batch", record)
    data.kept("typical", 0.3)
    assert [len(batch) for batch in sizes] == [2, 2, 2, 2]
    assert sum(map(sum, sizes)) == 400 and max(map(sum, sizes)) < 130


@pytest.mark.parametrize("strategy", NAMES)
def test_samples_never_kept_do_not_count_as_neighbours(strategy: str) -> None:
    data = Data.drawn(200, seed=2)
    mark = np.zeros(200, np.uint8)
    mark[::4] = NEVER
    marked = replace(data, mark=mark)
    without = data.take(np.flatnonzero(mark != NEVER))
    # 0.3 of 200 samples are 0.4 of the 150 left
    assert marked.kept(strategy, 0.3, hard_cutoff=0.1, strata=3) == without.kept(
        strategy, 0.4, hard_cutoff=0.1, strata=3
    )


@pytest.mark.parametrize("strategy", NAMES)
def test_blocks_without_samples_are_skipped(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Data.drawn(40)
    kept = data.kept(strategy, 0.3, by_class=True, strata=2)
    monkeypatch.setattr(blocks_module, "HELD_BYTES", 1)  # the last batch: the unlabelled, of none
    assert data.kept(strategy, 0.3, by_class=True, strata=2) == kept
    with pytest.raises(ConfigError, match="only 0 are eligible"):
        replace(data, mark=np.full(40, NEVER, np.uint8)).kept(strategy, 0.3)


@pytest.mark.parametrize("strategy", ["d2", "coverage"])
def test_few_copies_of_an_image_are_kept(strategy: str) -> None:
    data = Data.drawn(150, seed=4)
    data = replace(data, vectors=data.vectors[np.arange(150) // 3 * 3])  # three of each
    kept = data.kept(strategy, 0.2, hard_cutoff=0.0, strata=1)
    # at random, 30 samples are of 24.6 images
    assert len({data.ids.index(name) // 3 for name in kept}) >= 28


def test_embeddings_of_half_precision_are_read() -> None:
    data = Data.drawn(150, seed=6)
    data = replace(data, vectors=data.vectors.astype(np.float16).astype(np.float32))
    for strategy in NAMES:
        assert data.kept(strategy, 0.3, dtype="f2") == data.kept(strategy, 0.3)


def test_strategies_that_need_embeddings_refuse_a_stream_without_them() -> None:
    data = Data.drawn(20)

    def chunks(_: bool) -> Iterator[Chunk]:
        yield Chunk(data.score, data.label, data.ids)

    for name, strategy in STRATEGIES.items():
        if strategy.needs_embeddings:
            with pytest.raises(ConfigError, match="needs embeddings"):
                select(chunks, [0.5], name)


def test_projection_is_the_nearest_point() -> None:
    draw = np.random.default_rng(0)
    for total in (1, 5, 19):
        y = draw.normal(size=20) * 2
        expected = plain_projection(y, total)
        shift = None
        for start in (None, 0.3, -40.0, 40.0):
            x, shift = project(y, total, start)
            assert x == pytest.approx(expected, abs=1e-9)
            assert x.sum() == pytest.approx(total)
        assert project(y, total, shift)[1] == shift, "the solution is where it ends"


def test_band_is_between_the_hardest_and_the_easiest() -> None:
    data = Data.drawn(200)
    hardest_first = [data.ids[row] for row in np.argsort(-data.score)]
    assert data.kept("band", 0.2, hard_cutoff=0.3) == set(hardest_first[60:100])
    assert data.kept("band", 0.2) == set(hardest_first[80:120])
