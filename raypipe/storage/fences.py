"""Fences: a process that may write in a folder only as long as something holds looks at that before every change it makes there."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import ParamSpec, Protocol, TypeVar

from raypipe.errors import StorageError

P = ParamSpec("P")
R = TypeVar("R")

LOCK_SECONDS = 5.0
"""How long a lock of a folder is waited for: what it is held for takes less than a millisecond."""


class Fence(Protocol):
    """What may be pickled and taken to other processes."""

    def check(self) -> None:
        """Raises where this process may no longer write."""

    @property
    def lock(self) -> str:
        """Local folder to hold a shared lock of from the check to the end of the change; "" where there are no locks."""


_standing: Mapping[str, Fence] = {}


def standing() -> Mapping[str, Fence]:
    """The fences of this process by the URI of their folder."""
    return _standing


def put_up(fences: Mapping[str, Fence]) -> None:
    """Let these be the fences of this process, and no others."""
    global _standing
    _standing = dict(fences)  # at once, since other threads may be about to write


def fenced(function: Callable[P, R]) -> Callable[P, R]:
    """A function that takes the fences of this process with it, to the process that it is sent to and called in."""
    fences = standing()

    @functools.wraps(function, updated=())  # of a class, that would be its methods
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        put_up(fences)
        return function(*args, **kwargs)

    return call


@contextlib.contextmanager
def passed(uri: str) -> Iterator[None]:
    """Within it, `uri` may be changed. Raises what the fence of a folder it is in raises."""
    with contextlib.ExitStack() as stack:
        for folder, fence in standing().items():
            if uri == folder or uri.startswith(folder.rstrip("/") + "/"):
                if fence.lock:
                    stack.enter_context(locked(fence.lock, exclusive=False))
                fence.check()
        yield


@contextlib.contextmanager
def locked(folder: str, exclusive: bool) -> Iterator[None]:
    """Hold a lock of a local folder; of none where there is no such folder, or its file system has no locks (some NFS).

    Raises StorageError where another process has it and does not let go, such as one that was suspended while it had it.
    """
    try:
        file = os.open(folder, os.O_RDONLY)
    except OSError:
        yield
        return
    try:
        end, kind = time.monotonic() + LOCK_SECONDS, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
        while not _locks(file, kind):
            if time.monotonic() > end:
                raise StorageError(
                    f"{folder}: locked by another process; end that one, then run the same command again"
                )
            time.sleep(0.005)
        yield
    finally:
        os.close(file)


def _locks(file: int, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # as far as this file system can
    return True
