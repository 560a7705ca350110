from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from raypipe.extrapolators.base import Nodes
from raypipe.extrapolators.proxy_signal import Monotone, ProxySignal


def nodes_with(*signals: np.ndarray) -> Nodes:
    count = len(signals[0])
    return Nodes(
        np.random.default_rng(5).normal(size=(count, 3)), np.zeros(count), np.stack(signals, 1)
    )


@pytest.mark.parametrize("sign", [1, -1])
def test_takes_the_best_signal_and_its_direction(settings, sign: int) -> None:
    rng = np.random.default_rng(0)
    good, bad = rng.normal(size=(2, 500))
    score = 5 + sign * np.exp(good) + 0.05 * rng.normal(size=500)
    nodes = nodes_with(bad, good, bad + 0.3 * good)
    proxy = ProxySignal(settings("proxy"), 1)
    proxy.fit(nodes.take(np.arange(300)), score[:300])
    guess = proxy.predict(nodes.take(np.arange(300, 500)))
    assert spearmanr(guess, sign * good[300:]).statistic == pytest.approx(1, abs=1e-6)
    assert np.median(np.abs(guess - score[300:])) < 0.15  # on the scale of the score


def test_order_is_kept_beyond_and_between_the_knots() -> None:
    signal = np.linspace(0, 1, 200)
    monotone = Monotone.fit(signal, np.where(signal > 0.5, 2.0, 1.0) - 3)
    assert monotone is not None
    mapped = monotone(np.array([-5.0, 0.1, 0.2, 0.5, 0.9, 30.0, 31.0]))
    assert (np.diff(mapped.astype(np.float32)) > 0).all()
    assert mapped == pytest.approx([-2, -2, -2, -1.5, -1, -1, -1], abs=0.02)


def test_next_best_where_the_best_is_not_finite(settings) -> None:
    rng = np.random.default_rng(0)
    score = rng.normal(size=200)
    nodes = nodes_with(score, score + rng.normal(size=200), np.zeros(200))
    proxy = ProxySignal(settings("proxy"), 1)
    proxy.fit(nodes, score)
    signals = np.array([[np.nan, 2, 0], [np.nan, -2, 0], [np.nan, np.inf, 0], [2, -9, 0]])
    guess = proxy.predict(nodes_with(*signals.T))
    assert (
        guess[0] > 0.3
        and guess[1] < -0.3
        and guess[2] == pytest.approx(score.mean(), abs=1e-6)
        and guess[3] > 1.5
    )
