"""Fences: before every change in a folder, check that this process is still allowed to write there.

A run folder belongs to one driver at a time. Its fence fails once another driver has taken the run
over, so that a suspended process or a late worker cannot overwrite anything.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import ParamSpec, Protocol, TypeVar

from raypipe.errors import StorageError
from raypipe.plugins import allow_code, allows_code

P = ParamSpec("P")
R = TypeVar("R")

LOCK_SECONDS = 5.0
"""Maximum time to wait for the lock of a folder. A lock is held for less than a millisecond."""


class Fence(Protocol):
    """A permission to write. It can be pickled and sent to other processes."""

    def check(self) -> None:
        """Raise an error if this process may no longer write."""

    @property
    def lock(self) -> str:
        """Local folder to lock (shared) from the check to the end of the change; "" for no lock."""


_standing: Mapping[str, Fence] = {}


def standing() -> Mapping[str, Fence]:
    """Return the fences of this process by the URI of their folder."""
    return _standing


def put_up(fences: Mapping[str, Fence]) -> None:
    """Replace the fences of this process."""
    global _standing
    _standing = dict(fences)  # in one step, because other threads can be writing


def fenced(function: Callable[P, R]) -> Callable[P, R]:
    """Return a function that carries permissions of this process to the process that calls it.

    These are the fences, and whether code from outside raypipe can be imported.
    """
    fences, code = standing(), allows_code()

    @functools.wraps(function, updated=())  # for a class this would copy its methods
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        put_up(fences)
        allow_code(code)
        return function(*args, **kwargs)

    return call


@contextlib.contextmanager
def passed(uri: str) -> Iterator[None]:
    """Check the fences of all folders above `uri`, and hold their locks during the `with` block.

    Raises what a fence raises.
    """
    with contextlib.ExitStack() as stack:
        for folder, fence in standing().items():
            if uri == folder or uri.startswith(folder.rstrip("/") + "/"):
                if fence.lock:
                    stack.enter_context(locked(fence.lock, exclusive=False))
                fence.check()
        yield


@contextlib.contextmanager
def locked(folder: str, exclusive: bool) -> Iterator[None]:
    """Hold a lock of a local folder during the `with` block.

    Nothing is locked if the folder does not exist, or if its file system has no locks (some NFS).

    Raises
    ------
    StorageError
        If another process does not release the lock within `LOCK_SECONDS`, for example because it
        was suspended while it held the lock.
    """
    try:
        file = os.open(folder, os.O_RDONLY)
    except OSError:
        yield
        return
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        while not _try_lock(file, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH):
            if time.monotonic() > deadline:
                raise StorageError(
                    f"{folder}: locked by another process; end that process, then run the same "
                    "command again"
                )
            time.sleep(0.005)
        yield
    finally:
        os.close(file)


def _try_lock(file: int, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # this file system has no locks
    return True
