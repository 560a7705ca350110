"""A night of raypipe as an asset of Dagster.

Set the constants, then `dagster dev -f dagster_job.py`. Needs `ray[default]` and the folder
`jobs/`, not raypipe.
"""

import subprocess
import sys

from dagster import (
    AssetCheckResult,
    AssetCheckSeverity,
    AssetCheckSpec,
    Definitions,
    Failure,
    MaterializeResult,
    RetryRequested,
    ScheduleDefinition,
    asset,
    define_asset_job,
)

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
CHECK = "no_refresh_advised"


@asset(check_specs=[AssetCheckSpec(CHECK, asset="keep_lists")])
def keep_lists() -> MaterializeResult:
    """Score what is new and cut the keep-lists again. The check fails if a refresh is advised."""
    code = subprocess.run([*SUBMIT, *NIGHT], cwd=PLACE, check=False).returncode
    if code in PERMANENT:
        raise Failure(PERMANENT[code], allow_retries=False)
    if code not in (DONE, REFRESH):
        raise RetryRequested(max_retries=2, seconds_to_wait=600)
    check = AssetCheckResult(
        check_name=CHECK, passed=code != REFRESH, severity=AssetCheckSeverity.WARN
    )
    return MaterializeResult(metadata={"exit_code": code}, check_results=[check])


night = define_asset_job("night", [keep_lists])
defs = Definitions(
    assets=[keep_lists],
    schedules=[ScheduleDefinition(job=night, cron_schedule="0 2 * * *", execution_timezone="UTC")],
)
