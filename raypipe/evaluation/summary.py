"""What the trainings of an evaluation say together: `evaluation/summary.json`, `trainings.parquet`, and lines for a terminal. No Ray."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from raypipe._version import __version__
from raypipe.config import Config, ProxySettings
from raypipe.config.evaluate import EvaluateSettings
from raypipe.evaluation.figures import (
    UNKNOWN,
    BreakEven,
    Interval,
    difference,
    interval,
    sentence,
)
from raypipe.evaluation.lists import FULL, RANDOM
from raypipe.evaluation.trainings import RECIPE, Training
from raypipe.runs.layout import Run
from raypipe.runs.ledger import StageRecord, now

FORMAT = 1
"""Version of `evaluation/summary.json`."""
SCORING = ("index", "seed", "label", "proxy", "measure", "rehearse", "embed", "extrapolate")
"""Stages whose seconds the scores cost."""

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
"""One row for each list, fraction and seed; equal trainings share a result file, which `fingerprint` names. Robust: under attack."""


ROBUST = ("under attack", "against random")
"""Columns of the table where models were attacked."""


@dataclass(frozen=True)
class Results:
    """Trainings, and the content of the result file of each by its name."""

    trainings: Sequence[Training]
    found: Mapping[str, Mapping[str, Any]]

    def values(self, name: str, fraction: float, figure: str) -> dict[int, float]:
        """A figure of a list at a fraction, by seed."""
        chosen = [
            item
            for item in self.trainings
            if (item.listed.name, item.listed.fraction) == (name, fraction)
        ]
        return {
            item.seed: float(self.found[item.name][figure])
            for item in chosen
            if item.name in self.found
        }

    def lists(self) -> list[str]:
        """Names of what is compared with random, in order."""
        names = dict.fromkeys(item.listed.name for item in self.trainings)
        return [name for name in names if name not in (RANDOM, FULL)]

    def fractions(self) -> list[float]:
        return sorted(
            {item.listed.fraction for item in self.trainings if item.listed.name == RANDOM}
        )

    def samples(self, name: str, fraction: float) -> int:
        """Labelled samples of a list; of random lists those of the first."""
        return next(
            len(item.listed.rows)
            for item in self.trainings
            if (item.listed.name, item.listed.fraction) == (name, fraction)
        )


def table_of(results: Results, classes: Sequence[str]) -> pa.Table:
    """All trainings; see SCHEMA."""
    rows = []
    for item in results.trainings:
        found, listed = results.found[item.name], item.listed
        kept = {
            name: found[name]
            for name in SCHEMA.names
            if name in found and name not in ("list", "fraction", "worst_class")
        }
        rows.append(
            {
                **kept,
                "list": listed.name,
                "origin": listed.origin,
                "score": listed.score,
                "strategy": listed.strategy,
                "by_class": listed.by_class,
                "fraction": listed.fraction,
                "worst_class": classes[found["worst_class"]],
                "fingerprint": item.name,
            }
        )
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def scoring_seconds(ledger: Mapping[str, StageRecord], kind: str) -> float:
    """What the scores cost by the run's ledger; kind: cpu_seconds or gpu_seconds."""
    return sum(getattr(ledger[stage], kind) for stage in SCORING if stage in ledger)


def summarize(
    run: Run,
    config: Config,
    settings: EvaluateSettings,
    recipe: ProxySettings,
    results: Results,
    samples: int,
    test: dict[str, Any],
) -> dict[str, Any]:
    """Everything the table and the report show, as JSON. `samples` can be trained on; `test` is what is said of the test set."""
    ledger = run.ledger()
    gpu = any(found["gpu"] for found in results.found.values())
    kind = "gpu_seconds" if gpu else "cpu_seconds"
    scoring = scoring_seconds(ledger, kind)
    extrapolated = ledger["extrapolate"]
    full = _figures(results, FULL, 1.0, kind, settings.attack)
    accuracies = ("accuracy", "robust_accuracy")[: 1 + settings.attack]

    def against_random(name: str, fraction: float, figure: str) -> Interval | None:
        return difference(
            results.values(name, fraction, figure), results.values(RANDOM, fraction, figure)
        )

    def of(name: str, fraction: float) -> dict[str, Any]:
        figures = _figures(results, name, fraction, kind, settings.attack)
        found = {figure: against_random(name, fraction, figure) for figure in accuracies}
        differences = {
            figure.replace("accuracy", "difference"): None
            if gap is None
            else {**gap.as_dict(), "verdict": gap.verdict}
            for figure, gap in found.items()
        }
        return {
            **figures,
            **differences,
            "break_even": BreakEven(
                "GPU" if gpu else "CPU", full["seconds"] - figures["seconds"], scoring
            ).as_dict(),
        }

    lists = []
    for name in results.lists():
        listed = next(item.listed for item in results.trainings if item.listed.name == name)
        sentences = [
            sentence(
                {
                    fraction: against_random(name, fraction, figure)
                    for fraction in results.fractions()
                },
                title,
            )
            for figure, title in zip(accuracies, (name, f"{name}, under attack"))
        ]
        lists.append(
            {
                "name": name,
                "origin": listed.origin,
                "score": listed.score,
                "strategy": listed.strategy,
                "by_class": listed.by_class,
                "sentence": ". ".join(sentences),
                "fractions": [of(name, fraction) for fraction in results.fractions()],
            }
        )
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
        "unit": "GPU" if gpu else "CPU",
        "scoring_seconds": {
            name: scoring_seconds(ledger, name) for name in ("cpu_seconds", "gpu_seconds")
        },
        "trainings": len(results.found),
        "full": full,
        "random": [
            _figures(results, RANDOM, fraction, kind, settings.attack)
            for fraction in results.fractions()
        ],
        "lists": lists,
    }


def _figures(
    results: Results, name: str, fraction: float, kind: str, attack: bool
) -> dict[str, Any]:
    def each(figure: str) -> dict[str, Any]:
        return interval(list(results.values(name, fraction, figure).values())).as_dict()

    return {
        "fraction": fraction,
        "samples": results.samples(name, fraction),
        "accuracy": each("accuracy"),
        **({"robust_accuracy": each("robust_accuracy")} if attack else {}),
        "worst_class": each("worst_class_accuracy"),
        "seconds": each(kind)["mean"],
    }


def describe_evaluation(summary: Mapping[str, Any]) -> Iterator[str]:
    """Lines for the end of an evaluation: a table of accuracies and differences in points, and a sentence for each list."""
    training, test = summary["training"], summary["test"]
    yield (
        f"{training['model']} at {training['image_size']} pixels, {training['epochs']} epochs"
        f"{'' if summary['protocol'] == 'epochs' else ' of the full set, the same steps for all'}, {summary['seeds']} "
        f"{'seeds' if summary['seeds'] > 1 else 'seed'}; test: {test['samples']:,} samples of {test['uri']}"
    )
    full, attacked = summary["full"], summary["training"].get("adversary")
    robust = f", {_percent(full['robust_accuracy'])} under attack" if attacked else ""
    yield f"full set    {_percent(full['accuracy'])}{robust} ({full['samples']:,} samples); worst class {_percent(full['worst_class'])}"
    if attacked:
        yield (
            f"attack      {attacked['iterations']} steps of {255 * attacked['step_size']:.3g}/255 within {255 * attacked['eps']:.3g}/255 "
            "(PGD), in training and test; what a stronger attack finds is not in these figures"
        )
    unit, seconds = summary["unit"], summary["scoring_seconds"]
    rows: list[tuple[str, ...]] = [
        (
            "list",
            "keep",
            "samples",
            "accuracy",
            "worst class",
            "against random",
            *ROBUST[: 2 * bool(attacked)],
            f"{unit} s saved",
            "paid after",
        )
    ]
    for position, random in enumerate(summary["random"]):
        under = (_percent(random["robust_accuracy"]), "") if attacked else ()
        rows.append(_row("random", random, "", *under, "", ""))
        for listed in summary["lists"]:
            found = listed["fractions"][position]
            gap, even = found["difference"], found["break_even"]
            after = f"{even['trainings']:,}" if even["trainings"] is not None else "never"
            under = (
                (_percent(found["robust_accuracy"]), _points(found["robust_difference"]))
                if attacked
                else ()
            )
            rows.append(
                _row(listed["name"], found, _points(gap), *under, f"{even['saved']:,.1f}", after)
            )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        first, *others = (
            text.ljust(width) if column == 0 else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths))
        )
        yield "  ".join([first, *others]).rstrip()
    cost = seconds["gpu_seconds" if unit == "GPU" else "cpu_seconds"]
    yield f"the scores cost {cost:,.1f} {unit} seconds; paid after: so many trainings on the list"
    for listed in summary["lists"]:
        yield listed["sentence"]


def _row(name: str, found: Mapping[str, Any], *others: str) -> tuple[str, ...]:
    return (
        name,
        f"{found['fraction']:g}",
        f"{found['samples']:,}",
        _percent(found["accuracy"]),
        _percent(found["worst_class"]),
        *others,
    )


def _percent(found: Mapping[str, Any]) -> str:
    """61.3 ± 0.8 %"""
    return _with_reach(found, "{:.1f}") + " %"


def _points(found: Mapping[str, Any] | None) -> str:
    """+1.3 ± 0.8 better"""
    if found is None:
        return ""
    said = found["verdict"] if found["verdict"] != UNKNOWN else "one seed"
    return f"{_with_reach(found, '{:+.1f}')} {said}"


def _with_reach(found: Mapping[str, Any], form: str) -> str:
    text = form.format(100 * found["mean"])
    return text if found["low"] is None else f"{text} ± {100 * (found['mean'] - found['low']):.1f}"
