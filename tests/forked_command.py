"""Commands of raypipe in processes of their own, which start sooner than `python -m raypipe`.

They are forked from a process that has imported torch, Ray and raypipe, which takes 7 s.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["forked_command_imports"])


class ForkedCommand:
    """`raypipe ARGUMENTS`, in a session of its own.

    Parameters
    ----------
    arguments
        Of the command.
    folder
        Where it starts. It is not on the path of modules.
    output
        New file of what it prints on both streams.
    variables
        Added to the environment.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        folder: Path,
        output: Path,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self._output = output
        environment = {**os.environ, **(variables or {})}
        self._process = FORKS.Process(
            target=_command,
            args=(list(arguments), str(folder), str(output), environment),
            daemon=True,  # a test that fails does not wait for it at the end
        )
        self._process.start()

    @property
    def pid(self) -> int:
        """The process, which leads its session."""
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """Return the exit code, negative after a signal; None while the command runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code, once the command has ended; after `timeout` seconds, kill it."""
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            os.killpg(self.pid, signal.SIGKILL)
            raise AssertionError(f"runs after {timeout} s:\n{self.printed}")
        return code

    @property
    def printed(self) -> str:
        """What it has printed so far."""
        return self._output.read_text() if self._output.exists() else ""


def _command(arguments: list[str], folder: str, output: str, environment: dict[str, str]) -> None:
    """Become the command. Runs in the fork."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.argv = ["raypipe", *arguments]
    from raypipe.cli import main

    try:
        main(arguments)
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends without them, and Ray has one
