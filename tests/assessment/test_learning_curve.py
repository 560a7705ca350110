from __future__ import annotations

import json

import numpy as np
import pytest

from raypipe.assessment.learning_curve import _extrapolated, learning_curve


def test_the_curve_rises_and_predicts_what_twice_the_seed_set_gives(problem) -> None:
    nodes, score = problem(1500, noise=0.4)
    known, rest = np.arange(400), np.arange(900, 1500)
    curve = learning_curve(nodes.take(known), score[known], nodes.take(rest), score[rest], 0)
    assert curve.samples == (50, 100, 200, 400) and curve.judged == 600 and curve.note == ""
    assert list(curve.spearman) == sorted(curve.spearman)
    for rho, (low, high) in zip(curve.spearman, curve.interval, strict=True):
        assert low < rho < high
    twice = learning_curve(
        nodes.take(np.arange(800)), score[:800], nodes.take(rest), score[rest], 0
    )
    assert twice.samples[-1] == 800
    assert curve.doubled == pytest.approx(twice.spearman[-1], abs=0.03)
    assert curve.gain == pytest.approx(curve.doubled - curve.spearman[-1])
    assert (
        curve.gain_interval is not None
        and curve.gain_interval[0] <= curve.gain <= curve.gain_interval[1]
    )
    data = json.loads(json.dumps(curve.as_dict(), allow_nan=False))
    assert [point["samples"] for point in data["points"]] == [50, 100, 200, 400] and data[
        "doubled"
    ]["samples"] == 800


def test_a_power_law_is_continued_exactly() -> None:
    sizes = [100, 200, 400, 800]
    rho = 1 - 3 * np.array(sizes, float) ** -0.4
    assert _extrapolated(sizes, rho[:, None])[0] == pytest.approx(1 - 3 * 1600.0**-0.4)
    # a falling curve predicts no gain
    assert _extrapolated(sizes, rho[::-1, None])[0] == pytest.approx(rho[0])


def test_too_little_gives_no_points_but_a_reason(problem) -> None:
    nodes, score = problem(300)
    few = learning_curve(nodes.take(np.arange(159)), score[:159], nodes, score, 0)
    assert few.samples == () and "159 measured samples" in few.note
    json.dumps(few.as_dict(), allow_nan=False)
    for known, judged in ((np.ones(300), score), (score, np.ones(300))):
        assert learning_curve(nodes, known, nodes, judged, 0).doubled is None
