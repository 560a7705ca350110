"""Which fits assess the extrapolator; without a cluster or a fit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from raypipe.assessment import held_out
from raypipe.config import parse_config
from raypipe.runs.run import Run
from raypipe.stages.extrapolate import assess


@pytest.mark.parametrize(
    ("extrapolate", "rehearsal", "samples", "expected"),
    [
        ({}, False, 500, 5),  # 10 classes with fewer than 120 samples each
        ({}, True, 500, 1),
        ({"holdout": 0.25}, False, 500, 4),
        ({}, False, 2000, 3),
        ({}, False, 100_000, 1),
        ({"folds": 5}, False, 100_000, 5),
        ({"folds": 3}, True, 500, 3),
        ({"method": "gnn-published"}, False, 500, 1),
    ],
)
def test_parts_that_are_held_out(
    monkeypatch, extrapolate: dict[str, Any], rehearsal: bool, samples: int, expected: int
) -> None:
    monkeypatch.setattr(Run, "ledger", lambda self: {"rehearse": None} if rehearsal else {})
    monkeypatch.setattr(Run, "classes", lambda self: SimpleNamespace(names=list("0123456789")))
    monkeypatch.setattr(assess, "count_measured", lambda run: samples)
    one_proxy = {"proxy": {"parts": 1}}
    config = parse_config(
        {"run": "r", "source": {"uri": "x"}, "extrapolate": extrapolate, **one_proxy}
    )
    assert assess.fold_count(config, Run("r")) == expected


@pytest.mark.parametrize(
    ("method", "audited", "members"),
    [("gnn", 100, 1), ("gnn", 99, 3), ("gnn", None, 3), ("trees", 100, None)],
)
def test_fits_on_parts_are_quick_where_an_audit_set_decides(
    monkeypatch, method: str, audited: int | None, members: int
) -> None:
    monkeypatch.setattr(assess, "fold_count", lambda config, run: 5)

    def samples(*_: Any) -> SimpleNamespace:
        seed = SimpleNamespace(
            ids=[f"{row}" for row in range(50)], nodes=None, score=np.zeros(50), rows=None
        )
        audit = None if audited is None else SimpleNamespace(ids=["x"] * audited)
        return SimpleNamespace(seed=seed, audit=lambda: audit, everything=None)

    made, written = [], []
    monkeypatch.setattr(assess, "FitData", samples)
    monkeypatch.setattr(Run, "ledger", lambda self: {})
    monkeypatch.setattr(Run, "classes", lambda self: SimpleNamespace(names=("a", "b")))
    monkeypatch.setattr(held_out, "hold_out", lambda make, *_, mlp: made.append((make(), mlp)))
    monkeypatch.setattr(
        assess,
        "write_predictions",
        lambda run, name, ids, predictions: written.append((name, len(ids))),
    )
    config = parse_config({"run": "r", "source": {"uri": "x"}, "extrapolate": {"method": method}})
    assess.write_fold(2, config, Run("r"), 1000, lambda *_: None)
    assert (
        getattr(made[0][0], "members", None) == members
        and made[0][1] == (members != 1)
        and written == [("fold-2", 10)]
    )
