"""A night of raypipe as a DAG of Airflow 3: copy it into the folder of DAGs, and set the constants.

Tasks need `ray[default]` and the folder `jobs/`, not raypipe.
"""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime, timedelta

from airflow.sdk import dag, task
from airflow.sdk.exceptions import AirflowFailException

PLACE = "/srv/raypipe"
"""Folder with `jobs/` and the configuration; it is sent to the cluster."""
ADDRESS = "http://localhost:8265"
CONFIG = "my.yaml"
SUBMIT = [sys.executable, "jobs/submit.py", "--address", ADDRESS, "--working-dir", ".", "--"]
NIGHT = ["python", "jobs/nightly.py", "--config", CONFIG]

DONE, REFRESH = 0, 4
PERMANENT = {
    2: "bad usage or configuration; see the log",
    3: "scores and snapshot are written, but the scores are too weak for keep-lists; see the log",
}
"""Exit codes that another try does not change; see docs/reference/exit-codes.md."""


@dag(
    schedule="0 2 * * *",
    start_date=datetime(2026, 1, 1, tzinfo=UTC),
    catchup=False,
    max_active_runs=1,
)
def raypipe_nightly() -> None:
    """Score what is new; if a refresh is advised, run the task `refresh`."""

    @task(retries=2, retry_delay=timedelta(minutes=10))
    def night() -> int:
        code = subprocess.run([*SUBMIT, *NIGHT], cwd=PLACE, check=False).returncode
        if code in PERMANENT:
            raise AirflowFailException(PERMANENT[code])
        if code not in (DONE, REFRESH):
            raise RuntimeError(f"the night failed with exit code {code}; the next try resumes it")
        return code

    @task.short_circuit
    def refresh_is_advised(code: int) -> bool:
        return code == REFRESH

    @task
    def refresh() -> None:
        """Replace this by whatever tells your team, or starts a run with a new seed set."""
        print("a new seed set is advised; the reasons are in the log of the night")

    refresh_is_advised(night()) >> refresh()


raypipe_nightly()
