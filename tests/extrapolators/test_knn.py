from __future__ import annotations

import math

import numpy as np
import pytest

from raypipe.extrapolators.base import Nodes
from raypipe.extrapolators.knn import Knn, KnnConstants


def plain_loop(
    seed: Nodes, score: np.ndarray, nodes: Nodes, typical: float, constants: KnnConstants
) -> list[float]:
    result = []
    for z, y in zip(nodes.embedding.astype(float), nodes.label):
        away = sorted(
            (math.dist(z, other), row) for row, other in enumerate(seed.embedding.astype(float))
        )
        same = [(d, row) for d, row in away if y >= 0 and seed.label[row] == y]
        near = same[: constants.neighbours] + [
            pair for pair in away[: constants.neighbours] if pair not in same
        ]
        first = min(d for d, _ in near)
        share = {True: 1.0, False: constants.others if y >= 0 else 1.0}
        weights = [
            math.exp((first - d) / (constants.bandwidth * typical)) * share[seed.label[row] == y]
            for d, row in near
        ]
        mine = [score[row] for _, row in same]
        mean = (sum(mine) + score.mean()) / (len(mine) + 1)
        top = sum(w * score[row] for w, (_, row) in zip(weights, near)) + constants.shrinkage * mean
        result.append(top / (sum(weights) + constants.shrinkage))
    return result


def test_formula(problem, settings) -> None:
    nodes, score = problem(150)
    label = np.where(np.arange(150) % 7 == 0, -1, nodes.label)
    nodes = Nodes(nodes.embedding, label, nodes.signals)
    seed, rest = nodes.take(np.arange(90)), nodes.take(np.arange(90, 150))
    knn = Knn(settings("knn", neighbours=6), 4)
    knn.fit(seed, score[:90])
    assert knn._constants.neighbours == 6
    knn._constants = KnnConstants(6, 0.4, 0.3, 0.7)
    np.testing.assert_allclose(
        knn.predict(rest),
        plain_loop(seed, score[:90], rest, knn._typical, knn._constants),
        rtol=1e-5,
    )


def test_what_is_chosen_from_is_leave_one_out(problem, settings) -> None:
    """Each scored sample is predicted as if it had not been scored."""
    nodes, score = problem(40)
    knn = Knn(settings("knn"), 4)
    knn.fit(nodes, score)
    together = knn._scored_neighbours(nodes, 5, exclude=np.arange(40))
    for row in (0, 17):
        others = np.delete(np.arange(40), row)
        less = Knn(settings("knn"), 4)
        less.fit(nodes.take(others), score[others])
        alone = less._scored_neighbours(nodes.take(np.array([row])), 5)
        for name in ("same", "same_score", "other", "class_mean"):
            mine, theirs = getattr(together, name)[row], getattr(alone, name)[0]
            np.testing.assert_allclose(
                mine[np.isfinite(mine)], theirs[np.isfinite(theirs)], rtol=1e-6
            )


@pytest.mark.parametrize("telling", ["class", "place"])
def test_constants_follow_the_scores(settings, telling: str) -> None:
    rng = np.random.default_rng(0)
    embedding, label = rng.normal(size=(400, 2)), rng.integers(0, 8, 400)
    score = (label * 1.0 if telling == "class" else 3 * embedding[:, 0]) + 0.3 * rng.normal(
        size=400
    )
    knn = Knn(settings("knn"), 8)
    knn.fit(Nodes(embedding, label, np.zeros((400, 0))), score)
    assert (knn._constants.others < 0.1) == (telling == "class")
