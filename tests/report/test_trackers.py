"""Logging to TensorBoard with its real writer, to MLflow and Weights & Biases with fake modules."""

from __future__ import annotations

import importlib
import json
import os
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from raypipe import storage
from raypipe.config import Config, parse_config
from raypipe.distributed.context import Context
from raypipe.errors import ConfigError
from raypipe.pipeline import execute
from raypipe.progress import Progress
from raypipe.report import build, trackers
from raypipe.report.trackers import check_trackers, log_report, metrics, parameters
from raypipe.runs.ledger import StageRecord
from raypipe.runs.run import Run
from raypipe.stages.report import ReportStage

MakeRun = Callable[..., Run]

MLFLOW = """
calls = []
def set_experiment(name): calls.append(("experiment", name))
def log_param(key, value): calls.append(("param", key, value))
def log_metric(key, value, step=None): calls.append(("metric", key, value, step))
def log_artifact(path): calls.append(("artifact", path.rpartition("/")[2], open(path, "rb").read()))
class start_run:
    def __init__(self, run_name, nested): calls.append(("start", run_name, nested))
    def __enter__(self): return self
    def __exit__(self, *_): calls.append(("end",))
"""
WANDB = """
calls, run = [], None
class Artifact:
    def __init__(self, name, type): self.files = []; self.name = name
    def add_file(self, path): self.files.append((path.rpartition("/")[2], open(path, "rb").read()))
class Run:
    def log(self, figures): calls.append(("log", figures))
    def log_artifact(self, artifact): calls.append(("artifact", artifact.files))
    def finish(self, exit_code=0): calls.append(("finish", exit_code))
def init(project, name, job_type, config):
    calls.append(("init", project, name, config))
    return Run()
"""


@pytest.fixture
def stand_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str, str], ModuleType]]:
    """stand_in(name, code): a module of that name instead of an installed one."""
    made: list[str] = []

    def make(name: str, code: str) -> ModuleType:
        folder = tmp_path / "modules"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(code)
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.delitem(sys.modules, name, raising=False)
        made.append(name)
        return importlib.import_module(name)

    yield make
    for name in made:
        sys.modules.pop(name, None)


@pytest.fixture
def run(make_run: MakeRun) -> Run:
    """With a page, a learning curve, and a password in an address."""
    run = make_run(source={"uri": "s3://me:hunter2@bucket/x"})
    points = [
        {"samples": 10 * 2**step, "spearman": 0.3 + 0.1 * step, "spearman_interval": [0.2, 0.9]}
        for step in range(3)
    ]
    about = storage.read_json(run.path("extrapolator", "extrapolator.json"))
    curve = {
        "method": "kernel regression",
        "n_held": 9,
        "points": points,
        "doubled": {"spearman": None},
    }
    storage.write_json(
        run.path("extrapolator", "extrapolator.json"), about | {"learning_curve": curve}
    )
    build(run)
    return run


def summary_of(run: Run) -> dict[str, Any]:
    return storage.read_json(run.path("report", "summary.json"))


def configured(run: Run, *names: str) -> Config:
    data = run.config().model_dump()
    return parse_config(data | {"report": data["report"] | {"log_to": list(names)}})


def events(run: Run) -> list[Any]:
    """Return the events of a file: records of a length, its checksum, an Event, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    data, place, found = (
        storage.read_bytes(run.path("report", "tensorboard", trackers.EVENTS)),
        0,
        [],
    )
    while place < len(data):
        (length,) = struct.unpack_from("<Q", data, place)
        found.append(Event.FromString(data[place + 12 : place + 12 + length]))
        place += 16 + length
    return found


def test_figures_and_timings_are_named(run: Run) -> None:
    summary = summary_of(run)
    found = metrics(summary)
    assert found["fidelity/spearman"] == 0.7 and found["baselines/class_mean_spearman"] == 0.4
    assert (
        found["wall_seconds/proxy"] == 20
        and found["cpu_seconds/all"] == summary["cost"]["total"]["cpu_seconds"]
    )
    assert (
        found["counts/samples"] == 199
        and found["keep_0.5/samples"] == 100
        and found["saving/saved_share"] == 1 - 100 / 199
    )
    assert "baselines/proxy_loss_spearman" not in found, "there is no figure"
    assert parameters(summary)["proxy.epochs"] == str(summary["settings"]["proxy"]["epochs"])
    assert parameters(summary)["source.uri"] == "s3://bucket/x"


def test_tensorboard_gets_an_event_file_in_the_run(run: Run) -> None:
    for _ in range(2):
        assert log_report(run, summary_of(run), ["tensorboard"], "x") == {}
        assert storage.names(run.path("report", "tensorboard")) == {trackers.EVENTS}, (
            "the newest alone"
        )
    values = [
        (value.tag, event.step, value) for event in events(run) for value in event.summary.value
    ]
    scalars = {
        (tag, step): value.simple_value
        for tag, step, value in values
        if value.WhichOneof("value") == "simple_value"
    }
    expected = {(name, 0): number for name, number in metrics(summary_of(run)).items()}
    expected |= {("fidelity/learning_curve", 10 * 2**step): 0.3 + 0.1 * step for step in range(3)}
    assert scalars == pytest.approx(expected, rel=1e-6)
    histograms = {tag: value.histo for tag, _, value in values if value.HasField("histo")}
    assert set(histograms) == {
        "scores/measured",
        "scores/extrapolated",
        *(f"classes/{n}" for n in ("cat", "dog", "owl", "unlabelled")),
    }
    both = [list(histograms[f"scores/{kind}"].bucket) for kind in ("measured", "extrapolated")]
    assert both == [
        summary_of(run)["scores"]["histogram"][kind] for kind in ("measured", "extrapolated")
    ]
    scores = summary_of(run)["scores"]
    mean = sum(histograms[f"scores/{kind}"].sum for kind in ("measured", "extrapolated")) / 199
    assert mean == pytest.approx(scores["mean"], abs=0.05)
    assert not any(b"hunter2" in event.SerializeToString() for event in events(run))


def test_mlflow_gets_a_run_with_page_and_figures(
    run: Run, stand_in: Callable[[str, str], Any]
) -> None:
    mlflow = stand_in("mlflow", MLFLOW)
    assert log_report(run, summary_of(run), ["mlflow"], "pruning") == {}
    assert mlflow.calls[:2] == [("experiment", "pruning"), ("start", "run", True)] and mlflow.calls[
        -1
    ] == ("end",)
    assert ("param", "source.uri", "s3://bucket/x") in mlflow.calls
    assert ("metric", "fidelity/spearman", 0.7, None) in mlflow.calls and (
        "metric",
        "fidelity/learning_curve",
        0.4,
        20,
    ) in mlflow.calls
    files = {call[1]: call[2] for call in mlflow.calls if call[0] == "artifact"}
    assert files == {
        name: storage.read_bytes(run.path("report", name))
        for name in ("index.html", "summary.json")
    }
    assert "hunter2" not in str(mlflow.calls)


def test_wandb_gets_a_run_with_page_and_figures(
    run: Run, stand_in: Callable[[str, str], Any]
) -> None:
    wandb = stand_in("wandb", WANDB)
    assert log_report(run, summary_of(run), ["wandb"], "pruning") == {}
    assert [call[0] for call in wandb.calls] == ["init", "log", "artifact", "finish"]
    assert wandb.calls[0] == ("init", "pruning", "run", parameters(summary_of(run)))
    assert wandb.calls[1][1] == metrics(summary_of(run))
    assert [name for name, _ in wandb.calls[2][1]] == ["index.html", "summary.json"]
    assert "hunter2" not in str(wandb.calls)
    wandb.run, wandb.calls[:] = wandb.Run(), []
    assert log_report(run, summary_of(run), ["wandb"], "pruning") == {}
    assert [call[0] for call in wandb.calls] == ["log", "artifact"], (
        "a run of the caller is used, and is not ended"
    )


def test_a_tracker_that_fails_does_not_take_the_run_with_it(
    run: Run, stand_in: Callable[[str, str], Any]
) -> None:
    refuses = (
        "def set_experiment(name):\n"
        '    raise OSError("http://ada:hunter2@host?api_key=abc refused")\n'
    )
    mlflow = stand_in("mlflow", refuses)
    messages: list[str] = []
    progress = Progress(quiet=True)
    progress.say = messages.append  # type: ignore[method-assign]
    config = configured(run, "mlflow", "tensorboard")
    context, stage, record = Context(config, run, progress), ReportStage(), StageRecord()
    stage.execute(context, record)
    assert messages == [
        "note: the report is written, but mlflow did not accept it "
        "(OSError: http://host?api_key=… refused); run again to retry"
    ]
    assert record.detail["logged"] == ["tensorboard"]
    assert not stage.complete(context, record), "so that the next start tries again"
    mlflow.__dict__.update(stand_in("mlflow", MLFLOW).__dict__)
    stage.execute(context, record)
    assert stage.complete(context, record)
    assert not stage.complete(Context(configured(run, "mlflow"), run, progress), record)


def test_writing_the_page_of_a_run_logs_nothing(
    run: Run, stand_in: Callable[[str, str], Any]
) -> None:
    """The configuration in a run's folder can be untrusted: `raypipe report` sends nothing."""
    mlflow = stand_in("mlflow", MLFLOW)
    run.write_config(configured(run, "mlflow", "tensorboard"))
    build(run)
    assert mlflow.calls == [] and not os.path.exists(run.path("report", "tensorboard"))


def test_a_missing_package_is_said_before_the_run_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = trackers.importlib.util.find_spec
    monkeypatch.setattr(
        trackers.importlib.util,
        "find_spec",
        lambda name: None if name in ("mlflow", "wandb") else known(name),
    )
    check_trackers([])
    check_trackers(["tensorboard"])
    for names, packages in ((["wandb"], "wandb"), (["mlflow", "wandb"], "mlflow and wandb")):
        config = parse_config(
            {
                "run": str(tmp_path / "run"),
                "source": {"uri": "digits://"},
                "report": {"log_to": names},
            }
        )
        with pytest.raises(ConfigError) as error:
            execute(config)
        assert (
            f"needs the package {packages}, which is not installed here. "
            f"Install it (pip install 'raypipe[{','.join(names)}]')" in str(error.value)
        )
        assert error.value.exit_code == 2
    assert not os.path.exists(tmp_path / "run")


def test_where_to_log_is_checked() -> None:
    least = {"run": "out", "source": {"uri": "data"}}
    assert parse_config(least).report.log_to == ()
    assert parse_config({**least, "report": {"log_to": "wandb"}}).report.log_to == ("wandb",)
    for bad, message in ((["comet"], "'comet'"), (["wandb", "wandb"], "each tracker at most once")):
        with pytest.raises(ConfigError) as error:
            parse_config({**least, "report": {"log_to": bad}})
        assert "report.log_to" in str(error.value) and message in str(error.value)


def test_each_tracker_has_an_extra() -> None:
    import tomllib

    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for name, package in trackers.PACKAGES.items():
        assert any(line.startswith(package) and "<" in line for line in extras[name]), json.dumps(
            extras[name]
        )
