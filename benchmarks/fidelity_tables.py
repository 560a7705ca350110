"""The tables and sentences of `fidelity.py`, from whatever of a study has been made."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from common import BASELINES, Missing, interval
from fidelity_runs import ALONE, CROSSED, Study, direct
from scipy.stats import rankdata

from raypipe.assessment.rank_agreement import spearman
from raypipe.config.choices import PROXY_STATISTICS
from raypipe.extrapolators.neighbours import NeighbourIndex

DIRECT, FULL = "measured directly", "the full run's"
"""The two truths; the first is also a row of tables with the second."""
TITLES = {
    "moso": "moso, weights: learning rate",
    "moso-normalized": "moso, weights: normalised",
    "moso-none": "moso, weights: none",
}
DEFAULT = "gnn"
LEVELS = {
    "moso": {0.05: 0.90, 0.10: 0.93, 0.20: 0.95},
    "moso-normalized": {0.05: 0.86, 0.10: 0.90, 0.20: 0.92},
    "el2n": {0.05: 0.83, 0.10: 0.83, 0.20: 0.83},
}
"""What the default extrapolator is to reach, by score and scored share."""
LEADS = {
    "moso": {"gnn-published": 0.15, "knn-published": 0.15},
    "moso-normalized": {"gnn-published": 0.15, "knn-published": 0.15},
    "el2n": {"gnn-published": 0.25},
}
"""By how much it is to exceed the published methods."""
NEAR = 0.01
SHIFT_METHODS = ("gnn", "knn", "proxy")
NEIGHBOURS = 10


class Results:
    """Figures by seed, of whatever has been made."""

    def __init__(
        self, study: Study, sizes: list[float], seeds: Sequence[int], methods: list[str]
    ) -> None:
        self.study, self.sizes, self.seeds, self.methods = study, sizes, seeds, methods
        self._known: dict[tuple[str, str, float, str], dict[int, float]] = {}

    def each(self, function: Callable[..., float], *given: object) -> dict[int, float]:
        """function(*given, seed) of every seed for which all that it needs is there."""
        found = {}
        for seed in self.seeds:
            try:
                found[seed] = function(*given, seed)
            except Missing:
                continue
        return found

    def of(self, score: str, truth: str, size: float, method: str) -> dict[int, float]:
        """Spearman of a method's predictions outside the seed set with the truth."""
        key = score, truth, size, method
        if key not in self._known:
            self._known[key] = self.each(self._fidelity, *key)
        return self._known[key]

    def lead(self, score: str, truth: str, size: float, method: str, other: str) -> float:
        """Mean difference of two methods over the seeds that have both; NaN where none has."""
        found = difference(self.of(score, truth, size, method), self.of(score, truth, size, other))
        return float(np.mean(list(found.values()))) if found else float("nan")

    def true(self, score: str, truth: str, size: float, seed: int) -> np.ndarray:
        """True scores outside the seed set, float [n - m]."""
        run = self.study.of_seed_set(size, seed)
        return self.study.measured(run if truth == DIRECT else self.study.full(seed), score)[
            self.study.others(run)
        ]

    def seconds(self, score: str, size: float, method: str, seed: int) -> float:
        return self.study.predicted(self.study.of_seed_set(size, seed), score, method)[1]

    def seed_ceiling(self, score: str, size: float, seed: int) -> float:
        """Spearman of the seed set's scores in the seed run and in the full run."""
        run = self.study.of_seed_set(size, seed)
        return agreement(
            self.study.measured(run, score)[run.rows],
            self.study.measured(self.study.full(seed), score)[run.rows],
        )

    def full_ceiling(self, score: str) -> list[float]:
        """Spearman of all scores in two full runs, of every pair there is."""
        pairs = []
        for seed, other in itertools.combinations(self.seeds, 2):
            try:
                pairs.append(
                    agreement(
                        *(
                            self.study.measured(self.study.full(each), score)
                            for each in (seed, other)
                        )
                    )
                )
            except Missing:
                continue
        return pairs

    def _fidelity(self, score: str, truth: str, size: float, method: str, seed: int) -> float:
        if method == DIRECT:
            predicted = self.true(score, DIRECT, size, seed)
        else:
            predicted, _ = self.study.predicted(self.study.of_seed_set(size, seed), score, method)
        return agreement(predicted, self.true(score, truth, size, seed))


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    return spearman(a, b) or 0.0


def difference(a: dict[int, float], b: dict[int, float]) -> dict[int, float]:
    """By seed, where both have one."""
    return {seed: value - b[seed] for seed, value in a.items() if seed in b}


def truths(score: str) -> tuple[str, ...]:
    return (DIRECT, FULL) if direct(score) else (FULL,)


def percent(size: float) -> str:
    return f"{100 * size:g} %"


def cell(found: dict[int, float], seeds: int, sign: str = "") -> str:
    """Mean and interval, and the number of seeds where not all have it."""
    if not found:
        return "-"
    mean, half = interval(list(found.values()))
    few = f" ({len(found)})" if len(found) < seeds else ""
    return f"{mean:{sign}.3f}" + (f" ±{half:.3f}" if np.isfinite(half) else "") + few


def line(name: str, cells: Sequence[str], width: int = 18) -> None:
    print(f"{name:<32}" + "".join(f"{text:>{width}}" for text in cells), flush=True)


def table(results: Results, score: str, truth: str) -> None:
    """Every method, and the ceilings, of one score against one truth."""
    count, sizes = len(results.seeds), results.sizes
    print(f"\n{TITLES.get(score, score)}; truth: {truth}")
    line("", [*(f"{percent(size)} scored" for size in sizes), "fit, s"])
    for method in (method for method in results.methods if method != ALONE or not direct(score)):
        took = (
            []
            if method in BASELINES
            else [
                results.each(results.seconds, score, size, method) for size in (sizes[0], sizes[-1])
            ]
        )
        range_ = " to ".join(f"{np.mean(list(found.values())):.0f}" for found in took if found)
        line(
            method.replace("_", " "),
            [*(cell(results.of(score, truth, size, method), count) for size in sizes), range_],
        )
    if truth == DIRECT:
        return
    if direct(score):
        line(DIRECT, [cell(results.of(score, truth, size, DIRECT), count) for size in sizes])
    line(
        "ceiling: seed set, seed v. full",
        [cell(results.each(results.seed_ceiling, score, size), count) for size in sizes],
    )
    pairs = results.full_ceiling(score)
    text = f"{np.mean(pairs):.3f} ({min(pairs):.3f} to {max(pairs):.3f})" if pairs else "-"
    print(f"{'ceiling: all, full v. full':<35}{text}; {len(pairs)} pairs")


def reach(results: Results, scores: list[str]) -> None:
    """What the default extrapolator is to reach, in words."""
    print(
        f"\nWhat {DEFAULT} is to reach\n\n1. The best row of every table, or within {NEAR} of it."
    )
    first = [
        (score, truths(score)[0], size) for score, size in itertools.product(scores, results.sizes)
    ]
    _best(results, first)
    if second := [(score, FULL, size) for score, truth, size in first if truth != FULL]:
        print(
            "   Against the full run, where what is measured directly is no better than its own row says:"
        )
        _best(results, second)
    print("\n2. Levels, and leads over the published methods:")
    for score, truth, size in first:
        level, found = LEVELS.get(score, {}).get(size), results.of(score, truth, size, DEFAULT)
        if level is None or not found:
            continue
        mean = np.mean(list(found.values()))
        words = [
            f"{mean:.3f}, to reach {level:.2f}: {'reached' if mean >= level else f'missed by {level - mean:.3f}'}"
        ]
        for other, least in (
            (other, least) for other, least in LEADS[score].items() if other in results.methods
        ):
            lead = results.lead(score, truth, size, DEFAULT, other)
            if np.isfinite(lead):
                words.append(
                    f"{lead:+.3f} over {other}, to reach {least}: {'reached' if lead >= least else 'missed'}"
                )
        print(f"   {TITLES.get(score, score)}, {percent(size)}: " + "; ".join(words))
    print(
        f"\n3. A signal of the proxy alone is as good as {DEFAULT}, or less than {NEAR} below it:"
    )
    signals = [method for method in ("proxy", "proxy_loss") if method in results.methods]
    found_any = False
    for score, truth, size in first:
        leads = {method: results.lead(score, truth, size, DEFAULT, method) for method in signals}
        if good := [
            f"{method.replace('_', ' ')} {-lead:+.3f}"
            for method, lead in leads.items()
            if lead <= NEAR
        ]:
            print(f"   {TITLES.get(score, score)}, {percent(size)}: " + ", ".join(good))
            found_any = True
    if not found_any:
        print("   nowhere")


def _best(results: Results, cells: list[tuple[str, str, float]]) -> None:
    """In how many cells of the tables (score, truth, size) the default extrapolator is best or near, and by how much it is not."""
    methods = [method for method in results.methods if method not in (DEFAULT, "random")]
    reached = there = 0
    for score, truth, size in cells:
        leads = {method: results.lead(score, truth, size, DEFAULT, method) for method in methods}
        lead, method = min(
            ((lead, method) for method, lead in leads.items() if np.isfinite(lead)),
            default=(np.nan, ""),
        )
        there += bool(method)
        reached += lead >= -NEAR
        if lead < -NEAR:
            print(
                f"   missed: {TITLES.get(score, score)}, {percent(size)}: {method.replace('_', ' ')} is better by {-lead:.3f}"
            )
    print(f"   reached in {reached} of {there}")


def shift(results: Results, scores: list[str], size: float) -> None:
    """What it does that seed samples were trained on."""
    count = len(results.seeds)
    print(f"\nSeed samples were trained on, the others were not: with {percent(size)} scored\n")
    names = (
        "accuracy",
        *PROXY_STATISTICS,
        f"distance to {NEIGHBOURS} nearest scored",
        "of these of its class",
        "its loss is the larger",
    )
    found = {
        part: {name: results.each(_seen, results, size, part, name) for name in names}
        for part in ("seed", "others")
    }
    line("means", ["seed samples", "others"])
    for name in names:
        line(name, [cell(found[part][name], count) for part in ("seed", "others")])
    print(
        "\nSpearman on seed samples, each predicted by a fit without its fifth, and outside the seed set; then means, in spreads of the"
    )
    print(
        "measured scores of the seed set from their mean, of what is predicted outside, and of what is measured directly there"
    )
    line("", ["held out", "held out", "outside", "outside", "predicted", "direct"], 19)
    line("truth", ["the seed run's", FULL, FULL, DIRECT, "", ""], 19)
    for score, method in itertools.product(
        scores, (method for method in SHIFT_METHODS if method in results.methods)
    ):
        cells = [
            cell(results.each(_held_out, results, size, score, method, truth), count)
            for truth in (DIRECT, FULL)
        ]
        method = ALONE if method == DEFAULT and not direct(score) else method
        cells.append(cell(results.of(score, FULL, size, method), count))
        cells.append(cell(results.of(score, DIRECT, size, method), count) if direct(score) else "")
        cells.append(cell(results.each(_level, results, size, score, method), count, "+"))
        cells.append(
            cell(results.each(_level, results, size, score, DIRECT), count, "+")
            if direct(score)
            else ""
        )
        line(f"{score}, {method}", cells, 19)


def rehearsals(results: Results, scores: list[str], folded: float) -> None:
    """What a rehearsal gains, and whether it tells the truth. folded: the share for which parts of the seed set were held out."""
    count = len(results.seeds)
    print(
        f"\nScores that need training on the sample: {DEFAULT} with a rehearsal on half of the seed set beside {DEFAULT} without. Told: the fidelity"
    )
    print(
        "that a user is told, without from seed samples held out of the fit; true: outside the seed set, with the full run's scores"
    )
    line("", ["without: told", "true", "with: told", "true", "gain"])
    for score, size in itertools.product(
        (score for score in scores if not direct(score)), results.sizes
    ):
        alone, found = (results.of(score, FULL, size, method) for method in (ALONE, DEFAULT))
        told = (
            results.each(_held_out, results, size, score, DEFAULT, DIRECT) if size == folded else {}
        )
        rehearsed = results.each(
            lambda seed, score=score, size=size: results.study.rehearsal(
                results.study.of_seed_set(size, seed), score
            )
        )
        cells = [cell(each, count) for each in (told, alone, rehearsed, found)]
        line(f"{score}, {percent(size)}", [*cells, cell(difference(found, alone), count, "+")])


def _seen(results: Results, size: float, part: str, name: str, seed: int) -> float:
    """A mean over the seed samples or the others."""
    run = results.study.of_seed_set(size, seed)
    nodes, rows = (
        results.study.nodes(run),
        run.rows if part == "seed" else results.study.others(run),
    )
    loss, margin, _ = (nodes.signals[:, column] for column in range(3))
    if name in PROXY_STATISTICS:
        return float(nodes.signals[rows, PROXY_STATISTICS.index(name)].mean())
    if name == "accuracy":
        return float((margin[rows] > 0).mean())
    if name == "its loss is the larger":  # of a random pair, one of each
        other = np.setdiff1d(np.arange(len(nodes)), rows)
        ranks = rankdata(np.concatenate([loss[rows], loss[other]]))[: len(rows)]
        return float((ranks.sum() - len(rows) * (len(rows) + 1) / 2) / (len(rows) * len(other)))
    own = np.arange(len(run.rows)) if part == "seed" else None
    away, near = NeighbourIndex(nodes.embedding[run.rows]).search(
        nodes.embedding[rows], NEIGHBOURS, own
    )
    if name.startswith("distance"):
        return float(away.mean())
    return float((nodes.label[run.rows][near] == nodes.label[rows, None]).mean())


def _held_out(
    results: Results, size: float, score: str, method: str, truth: str, seed: int
) -> float:
    run = results.study.of_seed_set(size, seed)
    by = run if truth == DIRECT else results.study.full(seed)
    return agreement(
        results.study.out_of_fold(run, score, method), results.study.measured(by, score)[run.rows]
    )


def _level(results: Results, size: float, score: str, method: str, seed: int) -> float:
    run = results.study.of_seed_set(size, seed)
    known = results.study.measured(run, score)[run.rows]
    outside = (
        results.true(score, DIRECT, size, seed)
        if method == DIRECT
        else results.study.predicted(run, score, method)[0]
    )
    return float((outside.mean() - known.mean()) / known.std())


def cross_fit(results: Results, scores: list[str], size: float) -> None:
    """Whether it helps to make seed samples look as if they had not been trained on."""
    count = len(results.seeds)
    print(
        f"\nCross-fitting, {DEFAULT} without rehearsal, {percent(size)} scored: Spearman outside the seed set, and the difference to the plain way"
    )
    for score in scores:
        truth = truths(score)[0]
        plain = results.of(score, truth, size, DEFAULT if direct(score) else ALONE)
        print(f"\n{TITLES.get(score, score)}; truth: {truth}")
        line("plain", [cell(plain, count)])
        for variant in CROSSED:
            found = results.each(_crossed, results, size, score, variant, truth)
            line(variant, [cell(found, count), cell(difference(found, plain), count, "+")])
    print("\n" + "\n".join(f"{variant:<14} {words}" for variant, words in CROSSED.items()))


def _crossed(
    results: Results, size: float, score: str, variant: str, truth: str, seed: int
) -> float:
    return agreement(
        results.study.crossed(size, seed, score, variant, DEFAULT),
        results.true(score, truth, size, seed),
    )
