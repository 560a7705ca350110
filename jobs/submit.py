r"""Submit a Ray job, follow it, and end with the exit code of its command.

    export RAY_AUTH_MODE=token
    python jobs/submit.py --address http://localhost:8265 --working-dir . -- \
        python jobs/nightly.py --config my.yaml

Options before -- are those of `ray job submit`, which itself exits with 1 for every failure.
Schedulers need the code: 1 is worth another try, 2 and 3 are not, and 4 of jobs/nightly.py is no
failure. A job is stopped if this program is stopped. It needs `ray[default]`, not raypipe.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from typing import Any

SECONDS = 10
"""Time between two questions for the state of a job that outlived the connection to its log."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Submit the job, and return the exit code of its command."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options, separator, command = _split(given)
    parser = argparse.ArgumentParser(
        description="Submit a Ray job, follow it, and end with the exit code of its command.",
        usage="%(prog)s [options of ray job submit] -- COMMAND",
    )
    parser.add_argument("--address", help="the cluster; default: RAY_ADDRESS, or this machine")
    address = parser.parse_known_args(options)[0].address
    if not separator or not command:
        parser.error("the command is missing; put it after --")
    if {option.partition("=")[0] for option in options} & {"--submission-id", "--no-wait"}:
        parser.error("--submission-id and --no-wait cannot be given: the job is followed by its id")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    submission = f"raypipe-{uuid.uuid4().hex}"
    try:
        submitted = subprocess.run(
            ["ray", "job", "submit", "--submission-id", submission, *given], check=False
        )
        try:
            return _exit_code(_client(address), submission)
        except (ConnectionError, RuntimeError) as error:  # not submitted, or the cluster is gone
            print(f"submit.py: no answer about job {submission} ({error})", file=sys.stderr)
            return submitted.returncode or 1
    except (KeyboardInterrupt, SystemExit):
        with contextlib.suppress(Exception):
            _client(address).stop_job(submission)
        raise


def _split(arguments: list[str]) -> tuple[list[str], bool, list[str]]:
    """Return the arguments before --, whether it is among them, and those after it."""
    if "--" not in arguments:
        return arguments, False, []
    place = arguments.index("--")
    return arguments[:place], True, arguments[place + 1 :]


def _client(address: str | None) -> Any:
    from ray.job_submission import JobSubmissionClient

    return JobSubmissionClient(address)


def _exit_code(client: Any, submission: str) -> int:
    """Return the exit code of a job's command once it has ended; 1 if it has none."""
    job = client.get_job_info(submission)
    while not job.status.is_terminal():  # `ray job submit` lost its connection
        time.sleep(SECONDS)
        job = client.get_job_info(submission)
    if job.status == "SUCCEEDED":
        return 0
    code = job.driver_exit_code
    return code if code is not None and 0 < code < 256 else 1


if __name__ == "__main__":
    sys.exit(main())
