"""Every strategy against a direct implementation of its paper, on arrays in memory."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta as beta_distribution

from raypipe.config.choices import CUTTING_STRATEGIES
from raypipe.errors import ConfigError, StageError
from raypipe.selection import (
    ALWAYS,
    FREE,
    NEVER,
    STRATEGIES,
    Chunk,
    SelectionOptions,
    hash64,
    id_hash,
    select,
)
from raypipe.selection.hashing import uniform

FRACTIONS = (0.1, 0.3, 0.5, 0.9)
CLASSES = 4
SAMPLES = st.lists(
    st.tuples(
        st.one_of(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), st.floats(-5, 5, width=32)),
        st.integers(-1, CLASSES - 1),
        st.floats(0, 8, width=32),
    ),
    max_size=50,
)


@dataclass(frozen=True)
class Data:
    score: np.ndarray
    label: np.ndarray
    loss: np.ndarray
    ids: list[str]
    mark: np.ndarray | None = None

    def vectors(self) -> np.ndarray:
        """Return embeddings that depend on the ids alone, float32 [n, 5]."""
        values = np.stack([uniform(hash64(self.ids, seed)) for seed in range(100, 105)], 1)
        return (values - 0.3).astype(np.float32)

    @classmethod
    def of(cls, samples: list[tuple[float, int, float]]) -> Data:
        columns = list(zip(*samples, strict=True)) or [(), (), ()]
        score, label, loss = (
            np.array(column, kind) for column, kind in zip(columns, ("f4", "i4", "f4"), strict=True)
        )
        return cls(score, label, loss, [f"s{row}" for row in range(len(samples))])

    @classmethod
    def drawn(cls, samples: int, seed: int = 0) -> Data:
        draw = np.random.default_rng(seed)
        score, loss = (
            draw.gamma(2, 0.1, samples).astype(np.float32),
            draw.exponential(1, samples).astype(np.float32),
        )
        return cls(
            score,
            draw.integers(-1, CLASSES, samples).astype(np.int32),
            loss,
            [f"s{row}" for row in range(samples)],
        )

    def stream(
        self, size: int = 7, order: list[int] | None = None
    ) -> Callable[[bool], Iterator[Chunk]]:
        rows = np.array(order if order is not None else range(len(self.ids)), np.int64)

        def chunks(with_ids: bool) -> Iterator[Chunk]:
            for start in range(0, len(rows), size):
                part = rows[start : start + size]
                ids = [self.ids[row] for row in part] if with_ids else ()
                mark = None if self.mark is None else self.mark[part]
                yield Chunk(self.score[part], self.label[part], ids, self.loss[part], mark, start)

        return chunks

    def embedded(
        self, size: int = 7, order: list[int] | None = None
    ) -> Callable[[], Iterator[tuple[Chunk, np.ndarray]]]:
        vectors = self.vectors()[order if order is not None else slice(None)]

        def chunks() -> Iterator[tuple[Chunk, np.ndarray]]:
            for chunk in self.stream(size, order)(True):
                assert chunk.position is not None
                yield chunk, vectors[chunk.position : chunk.position + len(chunk.score)]

        return chunks

    def lists(
        self,
        strategy: str,
        keep: tuple[float, ...] = FRACTIONS,
        size: int = 7,
        order: list[int] | None = None,
        **options: object,
    ) -> list[dict[str, float | None]]:
        """Return the listed ids with their weights, for each keep fraction."""
        chunks = self.stream(size, order)
        chosen = SelectionOptions(**options)  # type: ignore[arg-type]
        result = []
        marked, embedded = self.mark is not None, self.embedded(size, order)
        for cut in select(chunks, keep, strategy, CLASSES, chosen, marked, embedded):
            kept: dict[str, float | None] = {}
            for chunk in chunks(True):
                rows = np.flatnonzero(cut.mask(chunk))
                weight = cut.weight(chunk, rows)
                names = [chunk.sample_id[row] for row in rows]
                kept |= dict(
                    zip(
                        names,
                        [None] * len(names) if weight is None else weight.tolist(),
                        strict=True,
                    )
                )
            assert len(kept) == cut.count
            result.append(kept)
        return result

    def scores_of(self, kept: dict[str, float | None]) -> list[float]:
        return sorted(float(self.score[self.ids.index(name)]) for name in kept)


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(SAMPLES, st.integers(1, 9), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_lists_are_exact_nested_and_the_same_in_every_order(
    strategy: str, samples: list[tuple[float, int, float]], size: int, seed: int
) -> None:
    data = Data.of(samples)
    lists = data.lists(strategy, seed=seed, strata=5)
    assert [len(kept) for kept in lists] == [
        round(fraction * len(samples)) for fraction in FRACTIONS
    ]
    order = random.Random(seed).sample(range(len(samples)), len(samples))
    assert data.lists(strategy, size=size, order=order, seed=seed, strata=5) == lists
    for smaller, larger in itertools.pairwise(lists):
        if STRATEGIES[strategy].nested:
            assert smaller.keys() <= larger.keys()
        elif strategy == "balanced":  # a quota of largest remainders can fall by one
            lost = [data.label[data.ids.index(name)] for name in smaller.keys() - larger.keys()]
            assert len(lost) == len(set(lost))


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(SAMPLES, st.integers(1, 9))
@settings(max_examples=15, deadline=None)
def test_by_class_every_class_has_its_share(
    strategy: str, samples: list[tuple[float, int, float]], size: int
) -> None:
    data = Data.of(samples)
    class_sizes = np.bincount(data.label + 1, minlength=CLASSES + 1)
    if strategy in CUTTING_STRATEGIES:
        class_sizes -= class_sizes // 10  # the hardest
    for fraction, kept in zip(
        FRACTIONS,
        data.lists(strategy, size=size, by_class=True, strata=3, hard_cutoff=0.1),
        strict=True,
    ):
        assert len(kept) == round(fraction * len(samples))
        actual = np.bincount(
            [data.label[data.ids.index(name)] + 1 for name in kept], minlength=CLASSES + 1
        )
        assert np.abs(actual - len(kept) * class_sizes / max(1, class_sizes.sum())).max() < 1


@pytest.mark.parametrize(
    "strategy",
    [name for name in STRATEGIES if name != "beta"],  # its density is computed over all classes
)
def test_by_class_is_the_strategy_on_each_class_alone(strategy: str) -> None:
    draw = np.random.default_rng(4)
    label = np.repeat(np.arange(-1, CLASSES, dtype=np.int32), 60)
    level = draw.uniform(0.2, 5, CLASSES + 1)[label]
    data = replace(Data.drawn(300), label=label)
    data = replace(data, score=(data.score * level).astype(np.float32))
    options: dict[str, object] = {
        "strata": 6,
        "seed": 2,
        "difficulty": "loss",
        "easy_fraction": 0.3,
    }
    together = data.lists(strategy, by_class=True, **options)
    for which in range(-1, CLASSES):
        rows = np.flatnonzero(label == which)
        alone = Data(
            data.score[rows], label[rows], data.loss[rows], [data.ids[row] for row in rows]
        )
        for kept, expected in zip(together, alone.lists(strategy, **options), strict=True):
            assert {name for name in kept if label[data.ids.index(name)] == which} == set(expected)


def test_beta_by_class_draws_by_the_same_keys() -> None:
    data = Data.drawn(500)
    (kept,) = data.lists("beta", (0.4,), by_class=True, seed=9)
    with np.errstate(under="ignore"):
        keys = np.log(uniform(hash64(data.ids, 9))) / beta_weights(data, 0.4, 4.0)
    chosen = np.array([name in kept for name in data.ids])
    for which in range(-1, CLASSES):
        here = data.label == which
        assert keys[here & chosen].min() >= keys[here & ~chosen].max()


def test_by_class_with_samples_that_must_be_in_and_must_not() -> None:
    data = Data.drawn(200)
    mark = np.zeros(200, np.uint8)
    mark[:10], mark[10:40] = ALWAYS, NEVER
    for strategy in STRATEGIES:
        (kept,) = replace(data, mark=mark).lists(
            strategy, (0.3,), by_class=True, min_per_class=5, strata=5
        )
        assert len(kept) == 60 and {f"s{row}" for row in range(10)} <= set(kept)
        assert not {f"s{row}" for row in range(10, 40)} & set(kept)
        actual = np.bincount([data.label[data.ids.index(name)] + 1 for name in kept])
        assert actual[1:].min() >= 5


def test_beta_is_not_nested_since_it_goes_by_the_fraction() -> None:
    smaller, larger = Data.drawn(400).lists("beta", (0.1, 0.5))
    assert smaller.keys() - larger.keys()


@pytest.mark.parametrize(
    "strategy", [name for name, strategy in STRATEGIES.items() if strategy.draws_at_random]
)
def test_another_seed_draws_others(strategy: str) -> None:
    (one,), (other,) = (Data.drawn(200).lists(strategy, (0.3,), seed=seed) for seed in (0, 1))
    assert len(one.keys() - other.keys()) > 10


@given(SAMPLES)
@settings(max_examples=50, deadline=None)
def test_normalized_is_the_highest_z_scores(samples: list[tuple[float, int, float]]) -> None:
    data = Data.of(samples)
    z = np.zeros(len(samples))
    for label in np.unique(data.label):
        of_class = data.score[data.label == label].astype(np.float64)
        z[data.label == label] = (of_class - of_class.mean()) / (of_class.std() or 1)
    for fraction, kept in zip(FRACTIONS, data.lists("normalized"), strict=True):
        actual = sorted(z[data.ids.index(name)] for name in kept)
        assert np.allclose(actual, np.sort(z)[len(z) - round(fraction * len(z)) :], atol=1e-5)


@given(SAMPLES)
@settings(max_examples=50, deadline=None)
def test_moderate_is_the_middle_of_the_sorted_scores(
    samples: list[tuple[float, int, float]],
) -> None:
    data = Data.of(samples)
    ascending, n = np.sort(data.score).tolist(), len(samples)
    for fraction, kept in zip(FRACTIONS, data.lists("moderate"), strict=True):
        count = round(fraction * n)
        start = (n - count) // 2
        assert data.scores_of(kept) == ascending[start : start + count]
        # the published code keeps the same ranks, or those shifted by one
        low, high = round(n * (0.5 - fraction / 2)), round(n * (0.5 + fraction / 2))
        assert abs(low - start) <= 1 and abs(high - start - count) <= 1


@given(SAMPLES, st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.sampled_from(["score", "loss"]))
@settings(max_examples=60, deadline=None)
def test_mixed_is_both_ends(
    samples: list[tuple[float, int, float]], share: float, difficulty: str
) -> None:
    data = Data.of(samples)
    value = data.score if difficulty == "score" else data.loss
    ascending = np.sort(value).tolist()
    for fraction, kept in zip(
        FRACTIONS, data.lists("mixed", easy_fraction=share, difficulty=difficulty), strict=True
    ):
        count = round(fraction * len(samples))
        easy = int(np.floor(share * count + 0.5))
        expected = ascending[:easy] + ascending[len(samples) - (count - easy) :]
        assert sorted(float(value[data.ids.index(name)]) for name in kept) == sorted(expected)


def test_mixed_without_easy_samples_is_top() -> None:
    data = Data.drawn(100)
    assert data.lists("mixed", easy_fraction=0.0) == data.lists("top")


def test_random_is_the_highest_hashes() -> None:
    data = Data.drawn(300)
    order = sorted(data.ids, key=lambda name: (-(int(hash64([name], 5)[0]) >> 32), id_hash(name)))
    for fraction, kept in zip(FRACTIONS, data.lists("random", seed=5), strict=True):
        assert set(kept) == set(order[: round(fraction * 300)])


def published_strata(score: np.ndarray, budget: int, strata: int) -> list[int]:
    """Return the budgets of the strata, as `stratified_sampling` of CCS's published code does."""
    low, high = score.min(), score.max() * 1.0001
    edges = low + (high - low) / strata * np.arange(strata + 1)
    sizes = np.array([((score >= edges[k]) & (score < edges[k + 1])).sum() for k in range(strata)])
    budgets = np.zeros(strata, int)
    for served, k in enumerate(np.argsort(sizes, kind="stable")):
        budgets[k] = min(sizes[k], (budget - budgets.sum()) // (strata - served))
    return budgets.tolist()


@pytest.mark.parametrize(("difficulty", "cutoff"), [("score", 0.0), ("score", 0.2), ("loss", 0.2)])
def test_ccs_cuts_off_the_hardest_and_covers_the_range_of_the_rest(
    difficulty: str, cutoff: float
) -> None:
    data, strata, count = Data.drawn(500), 10, 100
    (kept,) = data.lists(
        "ccs", (0.2,), difficulty=difficulty, hard_cutoff=cutoff, strata=strata, seed=3
    )
    value = data.score if difficulty == "score" else data.loss
    left = np.argsort(-value)[round(cutoff * 500) :]
    rest = data.score[left].astype(np.float64)
    assert set(kept) <= {data.ids[row] for row in left}
    place = np.minimum((rest - rest.min()) / (rest.max() - rest.min()) * strata, strata - 1).astype(
        int
    )
    chosen = np.array([data.ids[row] in kept for row in left])
    actual = np.bincount(place[chosen], minlength=strata)
    # the published upper edge is higher by 1e-4 of max, so a sample at a border can fall one lower
    assert np.abs(actual - published_strata(rest, count, strata)).max() <= 1
    luck = (hash64([data.ids[row] for row in left], 3) >> np.uint64(32)).astype(np.int64)
    for k in range(strata):  # random within: the highest hashes, whatever the score
        assert luck[chosen & (place == k)].min(initial=2**32) >= luck[~chosen & (place == k)].max(
            initial=0
        )


def test_ccs_cuts_off_half_of_what_is_pruned() -> None:
    data = Data.drawn(200)
    data = replace(data, mark=np.where(np.arange(200) < 40, NEVER, FREE).astype(np.uint8))
    hardest_first = np.argsort(-data.loss[40:]) + 40
    for fraction, kept in zip(
        FRACTIONS[:3], data.lists("ccs", FRACTIONS[:3], difficulty="loss", strata=5), strict=True
    ):
        cut = int(160 * (0.5 * (1 - 200 * fraction / 160)))
        assert not set(kept) & {data.ids[row] for row in hardest_first[:cut]}
        (same,) = data.lists(
            "ccs", (fraction,), difficulty="loss", strata=5, hard_cutoff=(cut + 0.5) / 160
        )
        assert kept == same


def test_ccs_of_one_cut_off_is_nested() -> None:
    lists = Data.drawn(300).lists("ccs", hard_cutoff=0.1, strata=5)
    assert all(smaller.keys() <= larger.keys() for smaller, larger in itertools.pairwise(lists))


def test_ccs_keeps_rare_scores_that_top_would_not() -> None:
    data = Data.drawn(500)
    data = replace(data, score=np.where(np.arange(500) < 5, -1.0, data.score).astype(np.float32))
    (kept,) = data.lists("ccs", (0.3,), strata=10)
    assert {f"s{row}" for row in range(5)} <= set(kept)


def beta_weights(data: Data, fraction: float, exponent: float) -> np.ndarray:
    """Return the weights of `beta_sampling` of DUAL's code, with exp(-loss) as the probability."""
    p = np.exp(-data.loss.astype(np.float64))
    anchor = p[np.argsort(data.score)[-10:]].mean()
    b = 15 * (1 - anchor) * (1 - (1 - fraction) ** exponent)
    return beta_distribution.pdf(p, 16 - b, b) * (data.score - min(0, data.score.min()))


@pytest.mark.parametrize(("fraction", "exponent"), [(0.1, 4.0), (0.5, 4.0), (0.5, 11.0)])
def test_beta_draws_by_the_published_weights(fraction: float, exponent: float) -> None:
    data = Data.drawn(600)
    (kept,) = data.lists("beta", (fraction,), seed=9, beta_exponent=exponent)
    with np.errstate(under="ignore"):
        keys = np.log(uniform(hash64(data.ids, 9))) / beta_weights(
            data, fraction, exponent
        )  # u^(1/w)
    assert set(kept) == {data.ids[row] for row in np.argsort(-keys)[: round(fraction * 600)]}


def test_beta_prefers_easier_samples_the_more_is_pruned() -> None:
    data = Data.drawn(1000)
    loss = [
        np.mean([data.loss[data.ids.index(name)] for name in kept])
        for kept in data.lists("beta", (0.1, 0.5, 0.9))
    ]
    assert loss[0] < loss[1] < loss[2]


def test_keys_draw_as_often_as_drawing_one_by_one() -> None:
    data = replace(
        Data.drawn(8), loss=np.full(8, 0.7, np.float32), score=np.arange(1, 9, dtype=np.float32)
    )
    weight = np.arange(1, 9) / 36
    expected = np.zeros(8)  # two draws without replacement, in proportion to the remaining weights
    for first, second in itertools.permutations(range(8), 2):
        expected[[first, second]] += weight[first] * weight[second] / (1 - weight[first])
    seeds = 600
    actual = np.zeros(8)
    for seed in range(seeds):
        actual[
            [data.ids.index(name) for name in data.lists("beta", (0.25,), size=8, seed=seed)[0]]
        ] += 1
    assert np.abs(actual / seeds - expected).max() < 4 * np.sqrt(0.25 / seeds)


@pytest.mark.parametrize("by_class", [False, True])
@pytest.mark.parametrize("strategy", ["random", "ccs", "beta"])
def test_inverse_inclusion_weights_undo_the_choice(strategy: str, by_class: bool) -> None:
    data = Data.drawn(300)
    # without the bound, a few samples of tiny probability would have all the weight
    data = replace(data, loss=np.minimum(data.loss, 1.5))
    truth = float(data.score.mean())
    weighted, plain = [], []
    for seed in range(60):
        (kept,) = data.lists(
            strategy,
            (0.3,),
            size=100,
            seed=seed,
            weights="inclusion",
            hard_cutoff=0.0,
            strata=5,
            by_class=by_class,
        )
        rows, weight = (
            [data.ids.index(name) for name in kept],
            np.array(list(kept.values()), np.float64),
        )
        assert abs(weight.mean() - 1) < 1e-5
        weighted.append(float((weight * data.score[rows]).mean()))
        plain.append(float(data.score[rows].mean()))
    assert abs(np.mean(weighted) - truth) < 0.03 * truth
    if strategy != "random":
        assert abs(np.mean(plain) - truth) > 0.1 * truth


@pytest.mark.parametrize("strategy", ["top", "random"])
def test_class_weights_give_the_classes_their_share_of_the_source(strategy: str) -> None:
    data = Data.drawn(300)
    (kept,) = data.lists(strategy, (0.2,), weights="class")
    weight = np.array(list(kept.values()), np.float64)
    label = np.array([data.label[data.ids.index(name)] for name in kept])
    for y in range(-1, CLASSES):
        assert weight[label == y].sum() / weight.sum() == pytest.approx(
            (data.label == y).mean(), rel=1e-5
        )
    assert weight.mean() == pytest.approx(1, rel=1e-5)


def test_a_class_without_a_sample_has_no_weight_to_give() -> None:
    data = Data(
        np.arange(10, dtype=np.float32),
        np.array([0] * 4 + [1] * 6, np.int32),
        np.zeros(10, np.float32),
        list("abcdefghij"),
    )
    (kept,) = data.lists("top", (0.5,), weights="class")
    assert list(kept.values()) == pytest.approx([0.6] * 5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_class_has_its_least_number(strategy: str) -> None:
    data = Data.drawn(200)
    # class 0 has three samples
    label = np.where(np.arange(200) < 3, 0, data.label % 2 + 1).astype(np.int32)
    data = replace(data, label=label)
    for minimum, fraction in itertools.product((2, 5), (0.1, 0.5)):
        (kept,) = data.lists(strategy, (fraction,), min_per_class=minimum, strata=5)
        label = np.array([data.label[data.ids.index(name)] for name in kept])
        assert len(kept) == round(fraction * 200)
        # samples that are cut off are excluded
        present = min(minimum, 3) if strategy not in CUTTING_STRATEGIES else 1
        assert (
            (label == 0).sum() >= present
            and (label == 1).sum() >= minimum
            and (label == 2).sum() >= minimum
        )


@given(
    SAMPLES,
    st.integers(1, 4),
    st.lists(st.sampled_from([FREE, FREE, FREE, ALWAYS, NEVER]), min_size=50, max_size=50),
)
@settings(max_examples=60, deadline=None)
def test_top_fills_up_what_is_reserved(
    samples: list[tuple[float, int, float]], minimum: int, marks: list[int]
) -> None:
    data = replace(Data.of(samples), mark=np.array(marks[: len(samples)], np.uint8))
    order = sorted(range(len(samples)), key=lambda row: (-data.score[row], id_hash(data.ids[row])))
    order = [row for row in order if data.mark is not None and data.mark[row] != NEVER]
    always = [row for row in order if data.mark is not None and data.mark[row] == ALWAYS]
    reserved = set(always)
    for y in range(CLASSES):
        of_class = [
            row
            for row in [*always, *(row for row in order if row not in always)]
            if data.label[row] == y
        ]
        reserved |= set(of_class[:minimum])
    count = round(0.6 * len(samples))
    if len(reserved) > count or len(order) < count:
        with pytest.raises(ConfigError, match=r"must be in it|only .* are eligible"):
            data.lists("top", (0.6,), min_per_class=minimum)
        return
    rest = [row for row in order if row not in reserved]
    expected = reserved | set(rest[: count - len(reserved)])
    assert set(data.lists("top", (0.6,), min_per_class=minimum)[0]) == {
        data.ids[row] for row in expected
    }


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_marked_samples_are_in_every_list_or_in_none(strategy: str) -> None:
    data = Data.drawn(200)
    mark = np.zeros(200, np.uint8)
    mark[np.argsort(data.score)[::10]] = ALWAYS
    mark[np.argsort(data.score)[5::20]] = NEVER
    data = replace(data, mark=mark)
    weights = "inclusion" if STRATEGIES[strategy].draws_at_random else "none"
    for kept, fraction in zip(
        data.lists(strategy, (0.2, 0.8), weights=weights), (0.2, 0.8), strict=True
    ):
        marks = mark[[data.ids.index(name) for name in kept]]
        # a fraction of all samples, including those that are never kept
        assert len(kept) == round(fraction * 200)
        assert (marks == ALWAYS).sum() == 20 and not (marks == NEVER).any()
        if weights == "inclusion":  # drawn with certainty, so their weight is the lowest
            of_always = [kept[data.ids[row]] for row in np.flatnonzero(mark == ALWAYS)]
            assert max(of_always) <= min(kept.values()) + 1e-6


def test_a_sample_to_keep_counts_for_its_class_even_where_it_is_cut_off() -> None:
    data = Data.drawn(20)
    mark = np.zeros(20, np.uint8)
    mark[data.score.argmax()] = ALWAYS
    label = np.zeros(20, np.int32)
    label[np.argsort(data.score)[:10]] = 1
    (kept,) = replace(data, mark=mark, label=label).lists(
        "ccs", (0.1,), min_per_class=1, hard_cutoff=0.2, strata=4
    )
    # and one of the other class: there is no room for more
    assert len(kept) == 2 and data.ids[data.score.argmax()] in kept


def test_balanced_gives_what_small_classes_cannot_take_to_others() -> None:
    data = Data.drawn(100)
    mark = np.where(data.label == 0, NEVER, FREE).astype(np.uint8)
    mark[np.flatnonzero(data.label == 0)[:2]] = FREE
    (kept,) = replace(data, mark=mark).lists("balanced", (0.5,))
    label = np.array([data.label[data.ids.index(name)] for name in kept])
    shares = [(label == y).sum() / (data.label == y).sum() for y in (-1, 1, 2, 3)]
    assert len(kept) == 50 and (label == 0).sum() <= 2
    assert max(shares) - min(shares) < 0.08


def test_lists_that_cannot_be_made_are_refused_in_numbers() -> None:
    data = Data.drawn(40)
    with pytest.raises(
        ConfigError, match=r"keep 0\.9 asks for 36 of 40 samples, but only 28 are eligible"
    ):
        data.lists("ccs", (0.9,), hard_cutoff=0.3)
    with pytest.raises(ConfigError, match=r"keep 0\.1 is a list of 4 samples, but 8 must be in it"):
        data.lists("top", (0.1,), min_per_class=2)
    with pytest.raises(ConfigError, match="top draws nothing at random"):
        data.lists("top", weights="inclusion")
    with pytest.raises(ConfigError, match="min_per_class changes"):
        data.lists("random", weights="inclusion", min_per_class=1)
    with pytest.raises(StageError, match=r"2 of 40 losses are not finite"):
        replace(data, loss=np.where(np.arange(40) < 2, np.nan, data.loss)).lists("beta")


def test_a_stream_without_losses_is_refused_where_they_are_needed() -> None:
    chunks = [Chunk(np.ones(3, np.float32), np.zeros(3, np.int32), list("abc"))]
    with pytest.raises(ConfigError, match="needs the proxy's loss"):
        select(lambda with_ids: chunks, [0.5], "beta")


def test_equal_scores_and_one_sample_have_lists_too() -> None:
    for strategy in STRATEGIES:
        for count in (1, 20):
            data = Data(
                np.ones(count, np.float32),
                np.zeros(count, np.int32),
                np.zeros(count, np.float32),
                [f"s{i}" for i in range(count)],
            )
            assert [len(kept) for kept in data.lists(strategy, (0.5, 0.9), weights="class")] == [
                round(0.5 * count),
                round(0.9 * count),
            ]


@pytest.mark.parametrize("cutoff", [0.1, "auto"])
@pytest.mark.parametrize("strategy", ["d2", "infomax", "coverage"])
def test_each_of_several_lists_is_the_one_that_is_cut_alone(
    strategy: str, cutoff: float | str
) -> None:
    data, fractions = Data.drawn(150), (0.1, 0.3, 0.5)
    options = {"hard_cutoff": cutoff, "strata": 3, "by_class": True}
    together = data.lists(strategy, fractions, **options)
    assert together == [data.lists(strategy, (fraction,), **options)[0] for fraction in fractions]
