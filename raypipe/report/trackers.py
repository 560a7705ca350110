"""Log the figures of a report to TensorBoard, MLflow or Weights & Biases (`report.log_to`).

Their packages are optional and imported on use. Their own environment variables and files decide
where they write to and with what credentials: nothing of them is read, stored or logged here.
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
from raypipe.runs.run import Run

PACKAGES = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}
"""The module that each tracker needs; raypipe's extra has the name of the tracker."""
EVENTS = "events.out.tfevents.raypipe"
"""The file in `RUN/report/tensorboard`; TensorBoard recognises its first three words."""
PAGES = ("index.html", "summary.json")
MAX_TEXT = 500
"""Longest text of a setting, in characters: MLflow's limit."""
MAX_NAME = 200
"""Longest name of a metric, in characters."""


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError for trackers whose package is not installed."""
    missing = [name for name in names if importlib.util.find_spec(PACKAGES[name]) is None]
    if missing:
        extras = ",".join(missing)
        packages = " and ".join(PACKAGES[name] for name in missing)
        raise ConfigError(
            f"report.log_to: {', '.join(missing)} needs the package {packages}, "
            f"which is not installed here. Install it (pip install 'raypipe[{extras}]'), or "
            "remove the tracker from report.log_to"
        )


def log_report(
    run: Run, summary: Mapping[str, Any], names: Sequence[str], experiment: str
) -> dict[str, str]:
    """Log a report that has been written.

    Parameters
    ----------
    run, summary
        The run, and the content of its `summary.json`.
    names
        Trackers.
    experiment
        Name of the experiment or project.

    Returns
    -------
    dict
        What went wrong, by tracker: an unreachable server is no reason to lose a run. Errors of
        the run's own storage are raised.
    """
    failed = {}
    for name in names:
        try:
            _LOG[name](run, summary, experiment)
        except RaypipeError:
            raise
        except Exception as error:  # third-party services fail in any way
            line = " ".join(f"{type(error).__name__}: {error}".split())
            failed[name] = without_secrets(line)[:300]
    return failed


def metrics(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return every number worth comparing between runs, by a name with slashes.

    Figures that the run does not have are left out.
    """
    figures = {
        **_count_metrics(summary),
        **_fidelity_metrics(summary["fidelity"]),
        **{f"scores/{key}": summary["scores"][key] for key in ("low", "high", "mean")},
        **_keep_list_metrics(summary["keep"]),
        **_cost_metrics(summary["cost"]),
        **_saving_metrics(summary),
    }
    return {
        _name(key): float(value)
        for key, value in figures.items()
        if value is not None and math.isfinite(value)
    }


def _count_metrics(summary: Mapping[str, Any]) -> dict[str, Any]:
    counts = summary["counts"].items()
    return {f"counts/{key}": value for key, value in counts if not isinstance(value, bool)}


def _fidelity_metrics(fidelity: Mapping[str, Any]) -> dict[str, Any]:
    correlations = [
        f"{name}{end}" for name in ("spearman", "pearson") for end in ("", "_low", "_high")
    ]
    within = [f"spearman_within{end}" for end in ("", "_low", "_high")]
    later = [*within, "n_extremes", "rmse", "spread", "proxy_accuracy", "proxy_chance"]
    coverage = fidelity.get("coverage") or {}
    return {
        **{f"fidelity/{key}": fidelity[key] for key in correlations},
        **{f"fidelity/{key}": fidelity.get(key) for key in later},
        **{f"fidelity/coverage_{key}": value for key, value in coverage.items()},
        **{f"fidelity/overlap_{key}": value for key, value in fidelity["overlap"].items()},
        **{
            f"baselines/{name}_spearman": figures["spearman"]
            for name, figures in fidelity["baselines"].items()
        },
    }


def _keep_list_metrics(keep: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        f"keep_{item['fraction']:g}/{key}": item[key]
        for item in keep
        for key in ("samples", "lowest_score", "emptied_classes", "even_classes")
    }


def _cost_metrics(cost: Mapping[str, Any]) -> dict[str, Any]:
    return {
        f"{key}/{row['stage']}": row[key]
        for row in [*cost["stages"], {**cost["total"], "stage": "all"}]
        for key in ("wall_seconds", "cpu_seconds", "gpu_seconds", "dollars")
    }


def _saving_metrics(summary: Mapping[str, Any]) -> dict[str, Any]:
    figures = {"saving/factor": summary["cost"]["saving"]["factor"]}
    leading = summary["headline"]
    if leading:
        for key in ("saved_share", "training_seconds", "saved_seconds"):
            figures[f"saving/{key}"] = leading[key]
    return figures


def parameters(summary: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings by section and name, as text."""
    return {_name(key): str(value)[:MAX_TEXT] for key, value in _flat(summary["settings"])}


def _flat(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield before + key, value


def _curve(summary: Mapping[str, Any]) -> list[tuple[int, float]]:
    """Return seed samples and Spearman correlation of the learning curve."""
    curve = summary["learning_curve"]
    points = curve["points"] if curve else []
    return [
        (point["samples"], point["spearman"]) for point in points if point["spearman"] is not None
    ]


def _tensorboard(run: Run, summary: Mapping[str, Any], experiment: str) -> None:
    """Write an event file to the run; it always has the same name, so the newest one stays."""
    summary_writer = importlib.import_module("tensorboardX").SummaryWriter
    with tempfile.TemporaryDirectory(prefix="raypipe-tensorboard-") as folder:
        writer = summary_writer(logdir=folder)
        try:
            for name, value in metrics(summary).items():
                writer.add_scalar(name, value, 0)
            for samples, value in _curve(summary):
                writer.add_scalar("fidelity/learning_curve", value, samples)
            _add_histograms(writer, summary)
            settings = [f"    {key}: {value}" for key, value in parameters(summary).items()]
            writer.add_text("summary", "  \n".join(_sentences(summary)), 0)
            writer.add_text("settings", "\n".join(settings), 0)
        finally:
            writer.close()
        (written,) = os.listdir(folder)
        with open(os.path.join(folder, written), "rb") as file:
            storage.write_bytes(storage.join(run.report_folder, "tensorboard", EVENTS), file.read())


def _add_histograms(writer: Any, summary: Mapping[str, Any]) -> None:
    histogram = summary["scores"]["histogram"]
    if not histogram:
        return
    ends = histogram["edges"][0], histogram["edges"][-1]
    for kind in ("measured", "extrapolated"):
        _add_histogram(writer, f"scores/{kind}", ends, histogram[kind])
    for item in summary["class_histograms"]:
        _add_histogram(writer, _name(f"classes/{item['name']}"), ends, item["extrapolated"])


def _add_histogram(
    writer: Any, name: str, ends: tuple[float, float], counts: Sequence[int]
) -> None:
    """Add counts of bins of equal width; sums are computed from the middles of the bins."""
    if not sum(counts):
        return
    limits = np.linspace(*ends, len(counts) + 1)
    middles = (limits[1:] + limits[:-1]) / 2
    writer.add_histogram_raw(
        name,
        min=ends[0],
        max=ends[1],
        num=sum(counts),
        sum=float(middles @ counts),
        sum_squares=float(middles**2 @ counts),
        bucket_limits=limits[1:].tolist(),
        bucket_counts=list(counts),
        global_step=0,
    )


def _mlflow(run: Run, summary: Mapping[str, Any], experiment: str) -> None:
    """Create an MLflow run for each report, in the experiment."""
    mlflow = importlib.import_module("mlflow")
    mlflow.set_experiment(experiment)
    # nested: the caller can have an open run
    with mlflow.start_run(run_name=storage.name(run.uri), nested=True):
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
    """Create a run for each report, in the project; a run that the caller has open is used."""
    wandb = importlib.import_module("wandb")
    open_run = wandb.run
    target = open_run or wandb.init(
        project=experiment,
        name=storage.name(run.uri),
        job_type="raypipe",
        config=parameters(summary),
    )
    try:
        target.log(metrics(summary))
        artifact = wandb.Artifact("raypipe-report", type="report")
        with tempfile.TemporaryDirectory(prefix="raypipe-wandb-") as folder:
            for path in _copies(run, folder):
                artifact.add_file(path)
            target.log_artifact(artifact)
            if open_run is None:
                target.finish()  # waits until everything is uploaded
    except BaseException:
        if open_run is None:
            target.finish(exit_code=1)
        raise


def _copies(run: Run, folder: str) -> Iterator[str]:
    """Yield local copies of the page and its figures."""
    for name in PAGES:
        path = os.path.join(folder, name)
        with open(path, "wb") as file:
            file.write(storage.read_bytes(storage.join(run.report_folder, name)))
        yield path


def _sentences(summary: Mapping[str, Any]) -> list[str]:
    leading, fidelity = summary["headline"], summary["fidelity"]["sentence"]
    if not leading:
        return [fidelity]
    kept = f"{leading['samples']:,} of {leading['of']:,} samples"
    return [f"Keep {leading['fraction']:.0%}: {kept}.", *leading["sentences"], fidelity]


def _name(text: str) -> str:
    """Return a name that all trackers accept."""
    return re.sub(r"[^A-Za-z0-9_./ -]", "_", text)[:MAX_NAME]


_LOG: dict[str, Callable[[Run, Mapping[str, Any], str], None]] = {
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
    "wandb": _wandb,
}
