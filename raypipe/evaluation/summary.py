"""What the trainings show together: `summary.json`, `trainings.parquet`, lines for a terminal.

No Ray.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from raypipe._version import __version__
from raypipe.config import ProxySettings
from raypipe.config.evaluate import EvaluateSettings
from raypipe.evaluation.certificate import certificate_lines, certify
from raypipe.evaluation.figures import (
    UNCLEAR,
    UNKNOWN,
    BreakEven,
    SeedInterval,
    paired_difference,
    seed_interval,
    sentence,
)
from raypipe.evaluation.lists import FULL, RANDOM
from raypipe.evaluation.trainings import RECIPE, Training
from raypipe.runs.ledger import StageRecord, extrapolated_tables, now
from raypipe.runs.packed_bits import unpack
from raypipe.runs.run import Run
from raypipe.text import (
    MIN_ACCURACY_OVER_CHANCE,
    beats_chance,
    counted,
    mean_and_margin,
    table,
)

FORMAT = 1
"""Version of `evaluation/summary.json`."""
SCORING = (
    "index",
    "seed",
    "label",
    "proxy",
    "measure",
    "rehearse",
    "embed",
    "extrapolate",
    "pilot",
)
"""Stages whose seconds are the cost of the scores, and of the choice of a strategy."""

SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("list", "origin", "score", "strategy")),
        ("by_class", pa.bool_()),
        ("fraction", pa.float64()),
        ("seed", pa.int64()),
        ("samples", pa.int64()),
        ("steps", pa.int64()),
        ("accuracy", pa.float64()),
        ("robust_accuracy", pa.float64()),
        ("worst_class", pa.string()),
        ("worst_class_accuracy", pa.float64()),
        ("gpu", pa.bool_()),
        *((name, pa.float64()) for name in ("cpu_seconds", "gpu_seconds", "wall_seconds")),
        ("fingerprint", pa.string()),
    ]
)
"""One row for each list, fraction and seed. Robust: under attack.

Equal trainings share a result file, which `fingerprint` names.
"""

ROBUST = ("under attack", "against random")
"""Columns of the table if models were attacked."""


@dataclass(frozen=True)
class Results:
    """Trainings, and the content of their result files by name."""

    trainings: Sequence[Training]
    by_name: Mapping[str, Mapping[str, Any]]

    def values(self, name: str, fraction: float, figure: str) -> dict[int, float]:
        """Return a figure of a list at a fraction, by seed."""
        chosen = [
            item
            for item in self.trainings
            if (item.listed.name, item.listed.fraction) == (name, fraction)
        ]
        return {
            item.seed: float(self.by_name[item.name][figure])
            for item in chosen
            if item.name in self.by_name
        }

    def correct(self, name: str, fraction: float, tested: int) -> np.ndarray:
        """Return which test samples the models on a list got right, bool [seeds, tested]."""
        rows = {
            item.seed: unpack(self.by_name[item.name]["correct"], (tested,))
            for item in self.trainings
            if (item.listed.name, item.listed.fraction) == (name, fraction)
        }
        return np.stack([rows[seed] for seed in sorted(rows)])

    def lists(self) -> list[str]:
        """Return the names of the lists that are compared with random ones, in order."""
        names = dict.fromkeys(item.listed.name for item in self.trainings)
        return [name for name in names if name not in (RANDOM, FULL)]

    def fractions(self) -> list[float]:
        """Return the keep fractions, rising."""
        return sorted(
            {item.listed.fraction for item in self.trainings if item.listed.name == RANDOM}
        )

    def samples(self, name: str, fraction: float) -> int:
        """Return the labelled samples of a list; of random lists, those of the first."""
        return next(
            item.listed.samples
            for item in self.trainings
            if (item.listed.name, item.listed.fraction) == (name, fraction)
        )


def table_of(results: Results, classes: Sequence[str]) -> pa.Table:
    """Return all trainings; see SCHEMA."""
    rows = []
    for item in results.trainings:
        result, listed = results.by_name[item.name], item.listed
        columns = {
            name: result[name]
            for name in SCHEMA.names
            if name in result and name not in ("list", "fraction", "worst_class")
        }
        rows.append(
            {
                **columns,
                "list": listed.name,
                "origin": listed.origin,
                "score": listed.score,
                "strategy": listed.strategy,
                "by_class": listed.by_class,
                "fraction": listed.fraction,
                "worst_class": classes[result["worst_class"]],
                "fingerprint": item.name,
            }
        )
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def scoring_seconds(ledger: Mapping[str, StageRecord], kind: str) -> float:
    """Return what the scores cost, by the run's ledger, in cpu_seconds or gpu_seconds."""
    return sum(getattr(ledger[stage], kind) for stage in SCORING if stage in ledger)


def summarize(
    run: Run,
    settings: EvaluateSettings,
    recipe: ProxySettings,
    results: Results,
    samples: int,
    test: dict[str, Any],
) -> dict[str, Any]:
    """Return the content of `evaluation/summary.json`: all that the table and the report show.

    Parameters
    ----------
    run, settings, recipe
        The run, the settings of the evaluation, and how lists were trained on.
    results
        All trainings.
    samples
        Samples that can be trained on.
    test
        What is known about the test set.
    """
    ledger = run.ledger()
    extrapolated = ledger["extrapolate"]
    gpu = any(result["gpu"] for result in results.by_name.values())
    figures = _Figures(results, gpu, settings.attack, ledger)
    return {
        "format": FORMAT,
        "raypipe": __version__,
        "made": now(),
        "run": run.uri,
        "scores_of": {"fingerprint": extrapolated.fingerprint, "finished": extrapolated.finished},
        "samples": samples,
        "test": test,
        "protocol": settings.protocol,
        "seeds": settings.seeds,
        "training": recipe.model_dump(mode="json", include=set(RECIPE)),
        "unit": figures.unit,
        "scoring_seconds": {
            name: scoring_seconds(ledger, name) for name in ("cpu_seconds", "gpu_seconds")
        },
        **({"tables": tables} if (tables := extrapolated_tables(ledger)) else {}),
        "trainings": len(results.by_name),
        "full": figures.full,
        "warning": _untrained(results, test["samples"]),
        "random": [figures.of(RANDOM, fraction) for fraction in results.fractions()],
        "lists": [figures.compared(name) for name in results.lists()],
        **({"certificate": _certificate(results, test["samples"])} if settings.certify else {}),
    }


def _certificate(results: Results, tested: int) -> dict[str, Any]:
    """Return the certificate as `evaluation/summary.json` has it."""
    correct = {
        fraction: {
            name: results.correct(name, fraction, tested) for name in (RANDOM, *results.lists())
        }
        for fraction in results.fractions()
    }
    return certify(correct, RANDOM).as_dict()


def _untrained(results: Results, test_samples: int) -> str:
    """Return a sentence if the trainings on the full set hardly beat chance; else nothing."""
    by_class = [
        [value for value in results.by_name[item.name]["per_class"] if value is not None]
        for item in results.trainings
        if item.listed.name == FULL
    ]
    accuracy = statistics.fmean(statistics.fmean(values) for values in by_class)
    chance = 1 / len(by_class[0])
    error = (chance * (1 - chance) / test_samples) ** 0.5
    if beats_chance(accuracy, chance, error, MIN_ACCURACY_OVER_CHANCE):
        return ""
    return (
        f"even on the full set, trainings hardly beat chance (mean accuracy over classes "
        f"{100 * accuracy:.0f} %, chance {100 * chance:.0f} %), so no list can be judged by them: "
        "train for more epochs, or with another learning rate, model or image size"
    )


class _Figures:
    """Figures of lists, as `evaluation/summary.json` has them."""

    def __init__(
        self, results: Results, gpu: bool, attack: bool, ledger: Mapping[str, StageRecord]
    ) -> None:
        self._results, self._attack = results, attack
        self._kind = "gpu_seconds" if gpu else "cpu_seconds"
        self._scoring = scoring_seconds(ledger, self._kind)
        self.unit = "GPU" if gpu else "CPU"
        self.full = self.of(FULL, 1.0)

    @property
    def _accuracies(self) -> tuple[str, ...]:
        return ("accuracy", "robust_accuracy") if self._attack else ("accuracy",)

    def of(self, name: str, fraction: float) -> dict[str, Any]:
        """Return the figures of a list at a fraction."""
        return {
            "fraction": fraction,
            "samples": self._results.samples(name, fraction),
            **{figure: self._mean(name, fraction, figure) for figure in self._accuracies},
            "worst_class": self._mean(name, fraction, "worst_class_accuracy"),
            "seconds": self._mean(name, fraction, self._kind)["mean"],
        }

    def compared(self, name: str) -> dict[str, Any]:
        """Return everything about a list that is compared with random ones."""
        listed = next(item.listed for item in self._results.trainings if item.listed.name == name)
        return {
            "name": name,
            "origin": listed.origin,
            "score": listed.score,
            "strategy": listed.strategy,
            "by_class": listed.by_class,
            "sentence": self._sentences(name),
            "fractions": [
                self._against_random(name, fraction) for fraction in self._results.fractions()
            ],
        }

    def _mean(self, name: str, fraction: float, figure: str) -> dict[str, Any]:
        values = self._results.values(name, fraction, figure).values()
        return seed_interval(list(values)).as_dict()

    def _difference(self, name: str, fraction: float, figure: str) -> SeedInterval | None:
        return paired_difference(
            self._results.values(name, fraction, figure),
            self._results.values(RANDOM, fraction, figure),
        )

    def _against_random(self, name: str, fraction: float) -> dict[str, Any]:
        """Return the figures of a list, its differences to random lists, and its break-even."""
        figures = self.of(name, fraction)
        saved = self.full["seconds"] - figures["seconds"]
        differences: dict[str, Any] = {}
        for figure in self._accuracies:
            gap = self._difference(name, fraction, figure)
            differences[figure.replace("accuracy", "difference")] = (
                None if gap is None else {**gap.as_dict(), "verdict": gap.verdict}
            )
        scored = name in {item.listed.name for item in self._results.trainings if item.listed.score}
        even = BreakEven(self.unit, saved, self._scoring if scored else 0.0).as_dict()
        return {**figures, **differences, "break_even": even}

    def _sentences(self, name: str) -> str:
        titles = {"accuracy": name, "robust_accuracy": f"{name}, under attack"}
        return ". ".join(
            sentence(
                {
                    fraction: self._difference(name, fraction, figure)
                    for fraction in self._results.fractions()
                },
                titles[figure],
            )
            for figure in self._accuracies
        )


# -- lines for a terminal ------------------------------------------------------------------------


def describe_evaluation(summary: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines for the end of an evaluation.

    They have a table of accuracies and of differences in percentage points, and a sentence for
    each list.
    """
    yield from _describe_trainings(summary)
    yield from table(_rows(summary))
    unit, seconds = summary["unit"], summary["scoring_seconds"]
    cost = seconds["gpu_seconds" if unit == "GPU" else "cpu_seconds"]
    unknown = " besides the tables they come from" if summary.get("tables") else ""
    yield (
        f"the scores cost {cost:,.1f} {unit} seconds{unknown}; 'paid after' is the number of "
        "trainings on the list that save as much"
    )
    for listed in summary["lists"]:
        yield listed["sentence"]
    if "certificate" in summary:
        yield from certificate_lines(summary["certificate"])


def _describe_trainings(summary: Mapping[str, Any]) -> Iterator[str]:
    training, test, full = summary["training"], summary["test"], summary["full"]
    same_steps = (
        "" if summary["protocol"] == "epochs" else " of the full set, the same steps for all"
    )
    yield (
        f"{training['model']} at {training['image_size']} pixels, {training['epochs']} epochs"
        f"{same_steps}, {counted(summary['seeds'], 'seed')}; "
        f"test: {test['samples']:,} samples of {test['uri']}"
    )
    attack = training.get("adversary")
    robust = f", {_percent(full['robust_accuracy'])} under attack" if attack else ""
    yield (
        f"full set    {_percent(full['accuracy'])}{robust} ({full['samples']:,} samples); "
        f"worst class {_percent(full['worst_class'])}"
    )
    if summary.get("warning"):
        yield f"WARNING     {summary['warning']}"
    if attack:
        yield (
            f"attack      {attack['iterations']} steps of {255 * attack['step_size']:.3g}/255 "
            f"within {255 * attack['eps']:.3g}/255 (PGD), in training and test; a stronger attack "
            "can find more than these figures show"
        )


def _rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the rows of the table, its header first."""
    attacked = bool(summary["training"].get("adversary"))
    rows: list[tuple[str, ...]] = [
        (
            "list",
            "keep",
            "samples",
            "accuracy",
            "worst class",
            "against random",
            *(ROBUST if attacked else ()),
            f"{summary['unit']} s saved",
            "paid after",
        )
    ]
    for position, random in enumerate(summary["random"]):
        robust = (_percent(random["robust_accuracy"]), "") if attacked else ()
        rows.append((*_cells("random", random), "", *robust, "", ""))
        for listed in summary["lists"]:
            rows.append(_compared_row(listed["name"], listed["fractions"][position], attacked))
    return rows


def _compared_row(name: str, point: Mapping[str, Any], attacked: bool) -> tuple[str, ...]:
    even = point["break_even"]
    robust = (
        (_percent(point["robust_accuracy"]), _points(point["robust_difference"]))
        if attacked
        else ()
    )
    return (
        *_cells(name, point),
        _points(point["difference"]),
        *robust,
        f"{even['saved']:,.1f}",
        f"{even['trainings']:,}" if even["trainings"] is not None else "never",
    )


def _cells(name: str, point: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        name,
        f"{point['fraction']:g}",
        f"{point['samples']:,}",
        _percent(point["accuracy"]),
        _percent(point["worst_class"]),
    )


def _percent(figure: Mapping[str, Any]) -> str:
    """Return "61.3 ± 0.8 %"."""
    return mean_and_margin(figure, "{:.1f}") + " %"


def _points(difference: Mapping[str, Any] | None) -> str:
    """Return "+1.3 ± 0.8 better"."""
    if difference is None:
        return ""
    words = {UNKNOWN: "one seed", UNCLEAR: "unclear"}
    verdict = difference["verdict"]
    return f"{mean_and_margin(difference, '{:+.1f}')} {words.get(verdict, verdict)}"
