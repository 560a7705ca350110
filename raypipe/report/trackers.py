"""The figures of a report in TensorBoard, MLflow or Weights & Biases, where `report.log_to` asks for it.

Their packages are optional and imported on use. Where they write to, and with what credentials, is for their own environment variables
and files to say: nothing of them is read, kept or logged here.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from raypipe import storage
from raypipe.errors import ConfigError, RaypipeError
from raypipe.report.text import without_secrets
from raypipe.runs.layout import Run

PACKAGES = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}
"""The module that each of `report.log_to` needs; its extra has the name of the tracker."""
EVENTS = "events.out.tfevents.raypipe"
"""The file in `RUN/report/tensorboard`; TensorBoard goes by the first three words of it."""
PAGES = ("index.html", "summary.json")
MOST_TEXT = 500
"""Characters of a setting: MLflow takes no more."""


def check_trackers(names: Sequence[str]) -> None:
    """Raises ConfigError for trackers whose package is not installed."""
    missing = [name for name in names if importlib.util.find_spec(PACKAGES[name]) is None]
    if missing:
        extras = ",".join(missing)
        packages = " and ".join(PACKAGES[name] for name in missing)
        raise ConfigError(
            f"report.log_to: {', '.join(missing)} needs the package {packages}, which is not installed here: "
            f"pip install 'raypipe[{extras}]', or leave it out"
        )


def log_report(
    run: Run, summary: Mapping[str, Any], names: Sequence[str], experiment: str
) -> dict[str, str]:
    """Log a report that has been written. Returns what went wrong, by tracker: a server that is away is no reason to lose a run.

    Raises what the storage of the run does.
    """
    failed = {}
    for name in names:
        try:
            _LOG[name](run, summary, experiment)
        except RaypipeError:
            raise
        except Exception as error:  # whatever ails a service of others
            failed[name] = without_secrets(" ".join(f"{type(error).__name__}: {error}".split()))[
                :300
            ]
    return failed


def metrics(summary: Mapping[str, Any]) -> dict[str, float]:
    """Every number worth comparing between runs, by a name with slashes; those that are not there are left out."""
    fidelity, cost = summary["fidelity"], summary["cost"]
    found: dict[str, Any] = {
        f"counts/{key}": value
        for key, value in summary["counts"].items()
        if not isinstance(value, bool)
    }
    for key in (
        "spearman",
        "spearman_low",
        "spearman_high",
        "pearson",
        "pearson_low",
        "pearson_high",
    ):
        found[f"fidelity/{key}"] = fidelity[key]
    found |= {f"fidelity/overlap_{key}": value for key, value in fidelity["overlap"].items()}
    found |= {
        f"baselines/{name}_spearman": figures["spearman"]
        for name, figures in fidelity["baselines"].items()
    }
    found |= {f"scores/{key}": summary["scores"][key] for key in ("low", "high", "mean")}
    for item in summary["keep"]:
        place = f"keep_{item['fraction']:g}"
        found |= {
            f"{place}/{key}": item[key]
            for key in ("samples", "lowest_score", "emptied_classes", "even_classes")
        }
    for row in [*cost["stages"], {**cost["total"], "stage": "all"}]:
        found |= {
            f"{key}/{row['stage']}": row[key]
            for key in ("wall_seconds", "cpu_seconds", "gpu_seconds", "dollars")
        }
    found["saving/factor"] = cost["saving"]["factor"]
    if summary["headline"]:
        found |= {
            f"saving/{key}": summary["headline"][key]
            for key in ("saved_share", "training_seconds", "saved_seconds")
        }
    return {
        _name(key): float(value)
        for key, value in found.items()
        if value is not None and math.isfinite(value)
    }


def parameters(summary: Mapping[str, Any]) -> dict[str, str]:
    """The settings by section and name, as text."""
    return {_name(key): str(value)[:MOST_TEXT] for key, value in _flat(summary["settings"])}


def _flat(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield before + key, value


def _curve(summary: Mapping[str, Any]) -> list[tuple[int, float]]:
    """Seed samples and Spearman correlation of the learning curve."""
    curve = summary["learning_curve"]
    return (
        [
            (point["samples"], point["spearman"])
            for point in curve["points"]
            if point["spearman"] is not None
        ]
        if curve
        else []
    )


def _tensorboard(run: Run, summary: Mapping[str, Any], experiment: str) -> None:
    """An event file in the run, the same name each time: the newest report replaces it."""
    writer_of = importlib.import_module("tensorboardX").SummaryWriter
    with tempfile.TemporaryDirectory(prefix="raypipe-tensorboard-") as folder:
        writer = writer_of(logdir=folder)
        try:
            for name, value in metrics(summary).items():
                writer.add_scalar(name, value, 0)
            for samples, value in _curve(summary):
                writer.add_scalar("fidelity/learning_curve", value, samples)
            histogram = summary["scores"]["histogram"]
            if histogram:
                ends = histogram["edges"][0], histogram["edges"][-1]
                for kind in ("measured", "extrapolated"):
                    _add_histogram(writer, f"scores/{kind}", ends, histogram[kind])
                for item in summary["class_histograms"]:
                    _add_histogram(
                        writer, _name(f"classes/{item['name']}"), ends, item["extrapolated"]
                    )
            writer.add_text("summary", "  \n".join(_sentences(summary)), 0)
            writer.add_text(
                "settings",
                "\n".join(f"    {key}: {value}" for key, value in parameters(summary).items()),
                0,
            )
        finally:
            writer.close()
        (written,) = os.listdir(folder)
        with open(os.path.join(folder, written), "rb") as file:
            storage.write_bytes(run.path("report", "tensorboard", EVENTS), file.read())


def _add_histogram(
    writer: Any, name: str, ends: tuple[float, float], counts: Sequence[int]
) -> None:
    """Counts of bins of equal width; the sums are those of their middles."""
    if not sum(counts):
        return
    limits = np.linspace(*ends, len(counts) + 1)
    middles = (limits[1:] + limits[:-1]) / 2
    writer.add_histogram_raw(
        name, min=ends[0], max=ends[1], num=sum(counts), sum=float(middles @ counts), sum_squares=float(middles**2 @ counts),
        bucket_limits=limits[1:].tolist(), bucket_counts=list(counts), global_step=0,
    )  # fmt: skip


def _mlflow(run: Run, summary: Mapping[str, Any], experiment: str) -> None:
    """A run of its own for each report, in the experiment."""
    mlflow = importlib.import_module("mlflow")
    mlflow.set_experiment(experiment)
    with mlflow.start_run(
        run_name=storage.name(run.uri), nested=True
    ):  # nested: the caller may have a run of its own open
        for name, text in parameters(summary).items():
            mlflow.log_param(name, text)
        for name, value in metrics(summary).items():
            mlflow.log_metric(name, value)
        for samples, value in _curve(summary):
            mlflow.log_metric("fidelity/learning_curve", value, step=samples)
        with tempfile.TemporaryDirectory(prefix="raypipe-mlflow-") as folder:
            for path in _copies(run, folder):
                mlflow.log_artifact(path)


def _wandb(run: Run, summary: Mapping[str, Any], experiment: str) -> None:
    """A run of its own for each report, in the project; within a run that the caller has open, that one."""
    wandb = importlib.import_module("wandb")
    given = wandb.run
    started = given or wandb.init(
        project=experiment,
        name=storage.name(run.uri),
        job_type="raypipe",
        config=parameters(summary),
    )
    try:
        started.log(metrics(summary))
        artifact = wandb.Artifact("raypipe-report", type="report")
        with tempfile.TemporaryDirectory(prefix="raypipe-wandb-") as folder:
            for path in _copies(run, folder):
                artifact.add_file(path)
            started.log_artifact(artifact)
            if given is None:
                started.finish()  # waits until everything is sent
    except BaseException:
        if given is None:
            started.finish(exit_code=1)
        raise


def _copies(run: Run, folder: str) -> Iterator[str]:
    """The page and its figures as local files, wherever the run is."""
    for name in PAGES:
        path = os.path.join(folder, name)
        with open(path, "wb") as file:
            file.write(storage.read_bytes(run.path("report", name)))
        yield path


def _sentences(summary: Mapping[str, Any]) -> list[str]:
    lead = summary["headline"]
    kept = (
        [
            f"Keep {lead['fraction']:.0%}: {lead['samples']:,} of {lead['of']:,} samples.",
            *lead["sentences"],
        ]
        if lead
        else []
    )
    return [*kept, summary["fidelity"]["sentence"]]


def _name(text: str) -> str:
    """What all three take for a name."""
    return re.sub(r"[^A-Za-z0-9_./ -]", "_", text)[:200]


_LOG: dict[str, Callable[[Run, Mapping[str, Any], str], None]] = {
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
    "wandb": _wandb,
}
