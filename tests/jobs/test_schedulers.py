"""jobs/submit.py, and the examples for Airflow, Dagster and Argo where these are installed."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import yaml

from raypipe.errors import ConfigError, TrustError
from raypipe.nightly.night import REFRESH_EXIT_CODE

JOBS = Path(__file__).resolve().parents[2] / "jobs"
AIRFLOW, DAGSTER, ARGO = (
    JOBS / "schedulers" / name
    for name in ("airflow_dag.py", "dagster_job.py", "argo-cronworkflow.yaml")
)


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- jobs/submit.py -------------------------------------------------------------------------------


class Status(str):
    """As Ray's JobStatus, which is a text, too."""

    def is_terminal(self) -> bool:
        return self in ("SUCCEEDED", "FAILED", "STOPPED")


class Client:
    """A cluster whose job has one state after another; remembers which job was stopped."""

    states: ClassVar[list[tuple[str, int | None]]] = []
    stopped: ClassVar[list[str]] = []

    def __init__(self, address: str | None) -> None:
        if address != "http://head:8265":
            raise ConnectionError(f"no cluster at {address}")

    def get_job_info(self, submission: str) -> Any:
        status, code = self.states.pop(0)
        return SimpleNamespace(status=Status(status), driver_exit_code=code)

    def stop_job(self, submission: str) -> None:
        self.stopped.append(submission)


@pytest.fixture
def submit(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load(JOBS / "submit.py")
    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", Client)
    monkeypatch.setattr(module, "SECONDS", 0)
    monkeypatch.setattr(module.signal, "signal", lambda *_: None)
    monkeypatch.setattr(Client, "stopped", [])
    return module


OPTIONS = ["--address", "http://head:8265", "--working-dir", "."]
COMMAND = ["--", "python", "jobs/nightly.py", "--config", "my.yaml"]


@pytest.mark.parametrize(
    ("states", "code"),
    [
        ([("SUCCEEDED", 0)], 0),
        ([("FAILED", 4)], 4),
        ([("RUNNING", None), ("FAILED", 3)], 3),
        ([("FAILED", None)], 1),
        ([("FAILED", -9)], 1),
        ([("STOPPED", None)], 1),
    ],
)
def test_the_exit_code_is_that_of_the_command(
    submit: ModuleType, monkeypatch: pytest.MonkeyPatch, states: list[Any], code: int
) -> None:
    called = []

    def run(command: list[str], check: bool) -> Any:
        called.append(command)
        return SimpleNamespace(returncode=1)  # of `ray job submit`, for every failure

    monkeypatch.setattr(submit.subprocess, "run", run)
    monkeypatch.setattr(Client, "states", states)
    assert submit.main([*OPTIONS, *COMMAND]) == code
    (command,) = called
    assert command[:4] == ["ray", "job", "submit", "--submission-id"]
    assert command[5:] == [*OPTIONS, *COMMAND] and not Client.stopped


def test_a_job_is_stopped_with_the_program_and_a_lost_cluster_is_one_line(
    submit: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(command: list[str], check: bool) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(submit.subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        submit.main([*OPTIONS, *COMMAND])
    assert len(Client.stopped) == 1
    monkeypatch.setattr(submit.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))
    assert submit.main(["--address=http://nowhere:8265", *COMMAND]) == 1
    assert "(no cluster at http://nowhere:8265)" in capsys.readouterr().err
    for wrong in (OPTIONS, [*OPTIONS, "--"], [*OPTIONS, "--no-wait", *COMMAND]):
        with pytest.raises(SystemExit) as ended:
            submit.main(wrong)
        assert ended.value.code == 2


# -- the examples ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [AIRFLOW, DAGSTER])
def test_the_exit_codes_are_those_of_raypipe(path: Path) -> None:
    values: dict[str, ast.expr] = {}
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign):
            target = statement.targets[0]
            if isinstance(target, ast.Tuple) and isinstance(statement.value, ast.Tuple):
                pairs = zip(target.elts, statement.value.elts, strict=True)
                values |= {name.id: value for name, value in pairs if isinstance(name, ast.Name)}
            elif isinstance(target, ast.Name):
                values[target.id] = statement.value
    assert ast.literal_eval(values["REFRESH"]) == REFRESH_EXIT_CODE
    permanent = {ConfigError.exit_code, TrustError.exit_code}
    assert set(ast.literal_eval(values["PERMANENT"])) == permanent
    used = [
        item.value
        for name in ("SUBMIT", "NIGHT")
        for item in ast.walk(values[name])
        if isinstance(item, ast.Constant) and str(item.value).startswith("jobs/")
    ]
    assert used == ["jobs/submit.py", "jobs/nightly.py"]
    assert all((JOBS.parent / file).is_file() for file in used)


def test_argo_goes_by_the_exit_codes() -> None:
    spec = yaml.safe_load(ARGO.read_text(encoding="utf-8"))["spec"]["workflowSpec"]
    templates = {template["name"]: template for template in spec["templates"]}
    assert spec["entrypoint"] in templates
    (first,), (refresh, failed) = templates["nightly"]["steps"]
    assert first["continueOn"] == {"failed": True} and templates[first["template"]]
    code = f"{{{{steps.{first['name']}.exitCode}}}}"
    assert refresh["when"] == f"{code} == {REFRESH_EXIT_CODE}"
    assert failed["when"] == f"{code} != 0 && {code} != {REFRESH_EXIT_CODE}"
    night = templates["night"]
    assert night["retryStrategy"]["expression"] == "asInt(lastRetry.exitCode) == 1"
    for file in (night["container"]["command"][1], night["container"]["args"][4]):
        assert (JOBS / file.removeprefix("/opt/raypipe/jobs/")).is_file()


def test_hera_reads_the_workflow_of_argo() -> None:
    models = pytest.importorskip("hera.workflows.models")
    stored = yaml.safe_load(ARGO.read_text(encoding="utf-8"))
    read = models.CronWorkflow.model_validate(stored)
    assert read.model_dump(mode="json", by_alias=True, exclude_none=True) == stored


@pytest.mark.skipif(importlib.util.find_spec("airflow") is None, reason="needs Airflow")
def test_airflow_loads_the_dag_and_its_tasks_go_by_the_exit_codes(tmp_path: Path) -> None:
    program = f"""
import json, subprocess
from types import SimpleNamespace
from airflow.dag_processing.dagbag import DagBag
from airflow.sdk.exceptions import AirflowFailException
bag = DagBag({str(AIRFLOW)!r})
assert not bag.import_errors, bag.import_errors
dag = bag.dags["raypipe_nightly"]
result = dict()
for code in range(6):
    subprocess.run = lambda *_, **__: SimpleNamespace(returncode=code)
    try:
        result[code] = dag.get_task("night").python_callable()
    except AirflowFailException:
        result[code] = "permanent"
    except Exception:
        result[code] = "again"
advised = dag.get_task("refresh_is_advised").python_callable
order = {{task.task_id: sorted(task.downstream_task_ids) for task in dag.tasks}}
print("RESULT" + json.dumps([result, [advised(0), advised(4)], order]))
"""
    environment = {
        **os.environ,
        "AIRFLOW_HOME": str(tmp_path),
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{tmp_path}/airflow.db",
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result, advised, order = json.loads(done.stdout.rsplit("RESULT", 1)[1])
    assert result == {
        "0": 0,
        "1": "again",
        "2": "permanent",
        "3": "permanent",
        "4": 4,
        "5": "again",
    }
    assert advised == [False, True]
    assert order == {
        "night": ["refresh_is_advised"],
        "refresh_is_advised": ["refresh"],
        "refresh": [],
    }


def test_dagster_validates_the_definitions_and_the_asset_goes_by_the_exit_codes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dagster = pytest.importorskip("dagster")
    module = load(DAGSTER)
    dagster.Definitions.validate_loadable(module.defs)

    def materialized(code: int) -> Any:
        monkeypatch.setattr(
            module.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=code)
        )
        return dagster.materialize([module.keep_lists], raise_on_error=False)

    for code, passed in ((0, True), (4, False)):
        result = materialized(code)
        (check,) = result.get_asset_check_evaluations()
        assert result.success and check.passed is passed
    assert not materialized(3).success and not materialized(2).success
    monkeypatch.setattr(module.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))
    with pytest.raises(dagster.RetryRequested):
        module.keep_lists()
