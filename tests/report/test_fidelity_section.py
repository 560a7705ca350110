"""Fidelity in the report, whatever the extrapolator wrote about itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from raypipe import storage
from raypipe.report import summarize
from raypipe.runs.run import Run

MakeRun = Callable[..., Run]


def test_both_ways_of_writing_fidelity_are_understood(make_run: MakeRun) -> None:
    run = make_run()
    first = summarize(run)["fidelity"]
    stated = {
        "spearman": 0.7, "spearman_low": 0.6, "spearman_high": 0.8, "n_held": 10,
        "baselines": {"class_mean": {"spearman": 0.4, "pearson": 0.5}, "odd": None},
    }  # fmt: skip
    search = {"kind": "ivf", "recall": 0.96, "effort": 16}
    storage.write_json(
        run.path("extrapolator", "extrapolator.json"),
        {"method": "gnn", "fidelity": stated, "search": search},
    )
    second = summarize(run)["fidelity"]
    assert summarize(run)["neighbour_search"] == search
    assert (first["spearman_low"], second["spearman_low"]) == (pytest.approx(0.6), 0.6)
    assert first["baselines"]["class_mean"] == {
        "spearman": 0.4, "spearman_low": None, "spearman_high": None,
        "pearson": None, "pearson_low": None, "pearson_high": None,
        "overlap": {}, "overlap_interval": {},
    }  # fmt: skip
    assert [second["baselines"]["class_mean"][name] for name in ("spearman", "pearson")] == [
        0.4,
        0.5,
    ]
    assert second["baselines"]["odd"]["spearman"] is None
    assert summarize(run)["fidelity_seed"] is None and summarize(run)["learning_curve"] is None
    assert second["pearson"] is None


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"{",
        b"[]",
        b"{}",
        b'{"fidelity": null}',
        b'{"fidelity": {"spearman": NaN, "overlap": null, "baselines": null}}',
    ],
)
def test_a_missing_or_odd_extrapolator_gives_an_unknown_fidelity(
    make_run: MakeRun, content: bytes | None
) -> None:
    run = make_run()
    storage.delete(run.path("extrapolator"))
    if content is not None:
        storage.write_bytes(run.path("extrapolator", "extrapolator.json"), content)
    fidelity = summarize(run)["fidelity"]
    assert (fidelity["verdict"], fidelity["spearman"]) == ("unknown", None)
