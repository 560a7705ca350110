"""One driver at a time: the lease of a run and the fencing token of its writes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from raypipe import storage
from raypipe.errors import RunError, TakenOverError
from raypipe.runs.ledger import now
from raypipe.runs.run import Run
from raypipe.storage import fences

LEASE_SECONDS = 60.0
"""A lease that was not renewed for this long has expired, and can be taken over."""
MAX_LEASE_BYTES = 1 << 16
"""Bytes of `driver.json` that are read."""
DRIVER = "driver.json"
"""File of the lease: the driver that writes a run, or wrote it last."""


@dataclasses.dataclass(frozen=True)
class FencingToken:
    """Fencing token of a driver: only the holder of the lease and its workers may write to the run.

    The token (Kleppmann, *How to do distributed locking*, 2016) is the owner in `driver.json`, a
    file that is never removed. Every change inside the run folder first compares the token with
    that file. See `raypipe.storage.fences`.

    Attributes
    ----------
    run : str
        URI of the run.
    owner : str
        Random id of the driver.
    """

    run: str
    owner: str

    @property
    def lock(self) -> str:
        """Local folder to lock for a change; "" in an object store.

        A driver that takes over locks the same folder, so that the takeover happens either before
        the token is compared, or after the change.
        """
        return storage.filesystem(self.run)[1] if storage.is_local(self.run) else ""

    def check(self) -> None:
        """Raise TakenOverError if another driver holds the lease.

        If `driver.json` was deleted, the driver continues.
        """
        holder = _parsed(_read(storage.join(self.run, DRIVER)))
        if holder and holder.get("owner") != self.owner:
            raise TakenOverError(
                f"{self.run}: this driver did not renew its lease for {LEASE_SECONDS:.0f} s, so "
                f"another one (process {holder.get('pid')} on {holder.get('host')}) took over the "
                "run. This one stops and writes nothing more"
            )


class Lease:
    """Exclusive right to write a run, recorded in `RUN/driver.json`. Used as a context manager.

    A second driver is refused while the first renews its lease. A lease can be taken over if it was
    released, if its process on this machine has ended, or if it was not renewed for
    `LEASE_SECONDS`.

    A driver can lose its lease when it is suspended or cut off from storage. Its fencing token then
    prevents every change, by the driver and by its tasks. When it next renews the lease, it notices
    the loss and is interrupted; Ray ends its tasks when the driver ends.

    Raises
    ------
    RunError
        On entry, if another driver holds the run.
    TakenOverError
        On exit, if the lease was lost.

    Attributes
    ----------
    about : callable
        Returns the progress that `driver.json` reports in addition: a dict, written as JSON.
    """

    def __init__(self, run: Run) -> None:
        self._uri = run.path(DRIVER)
        self._run = run
        owner = uuid.uuid4().hex
        self._me = {
            "owner": owner,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "boot": _boot_id(),
        }
        self._fence = FencingToken(run.uri, owner)
        self._written = b""
        self._lost: TakenOverError | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._interrupt = interrupt_of_main_thread()
        self.about: Callable[[], dict[str, Any]] = dict

    def check(self) -> None:
        """Raise TakenOverError if another driver has taken over the run."""
        self._fence.check()

    def __enter__(self) -> Lease:
        self._written = self._content()
        if not storage.create_bytes(self._uri, self._written):
            self._take_over()
        self._run.lease = self
        fences.put_up({**fences.standing(), self._run.uri: self._fence})
        self._thread = threading.Thread(target=self._renew, daemon=True, name="raypipe-lease")
        self._thread.start()
        return self

    def _take_over(self) -> None:
        content = _read(self._uri)
        holder = _parsed(content)
        if holder and not holder.get("released") and _alive(holder):
            raise RunError(
                f"{self._run.uri}: in use by another driver: process {holder.get('pid')} on "
                f"{holder.get('host')}, lease renewed {_age(holder):.0f} s ago; wait for it, or "
                f"stop it (its lease expires after {LEASE_SECONDS:.0f} s)"
            )
        taken = storage.exchange_bytes(self._uri, content, self._written)
        # some object stores ignore the condition: the last writer wins, and the others see that
        time.sleep(0 if storage.is_local(self._uri) else 1.0)
        if not taken or _parsed(_read(self._uri)).get("owner") != self._me["owner"]:
            raise RunError(
                f"{self._run.uri}: another driver took over this run at the same moment; try again"
            )

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._run.lease = None
        self._stop.set()
        try:
            if self._thread is not None:
                self._thread.join(timeout=10)
        except KeyboardInterrupt:  # sent by the thread at the last moment
            if self._lost is None:
                raise
        fences.put_up(
            {
                folder: fence
                for folder, fence in fences.standing().items()
                if fence is not self._fence
            }
        )
        with contextlib.suppress(OSError):  # then the lease expires
            storage.exchange_bytes(self._uri, self._written, self._content(released=True))
        if self._lost is not None and kind in (None, KeyboardInterrupt):
            raise self._lost

    def _renew(self) -> None:
        while not self._stop.wait(LEASE_SECONDS / 4):
            try:
                content = self._content()
                if storage.exchange_bytes(self._uri, self._written, content):
                    self._written = content
                    continue
                self.check()
                # the file was deleted or changed, but not by a driver that took over
                self._written = (
                    content if storage.create_bytes(self._uri, content) else _read(self._uri)
                )
            except OSError:
                continue  # try again later; if storage stays unreachable, a stage reports it
            except TakenOverError as error:
                self._lost = error
                if self._interrupt is not None and not self._stop.is_set():
                    self._interrupt()
                return

    def _content(self, released: bool = False) -> bytes:
        content = {
            **self._me,
            "time": time.time(),
            "date": now(),
            "released": released,
            "progress": self.about(),
        }
        return json.dumps(content).encode()


def _read(uri: str) -> bytes:
    try:
        # a read with a range is one request; without one, the size is requested first
        return storage.read_bytes(uri, 0, MAX_LEASE_BYTES)
    except FileNotFoundError:
        return b""


def _parsed(content: bytes) -> dict[str, Any]:
    """Return the content of a lease; empty if it is damaged or missing."""
    try:
        data = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def interrupt_of_main_thread() -> Callable[[], None] | None:
    """Return a function that raises KeyboardInterrupt in the main thread, callable from any thread.

    None if this is not the main thread, because only the main thread can install the handler, or if
    SIGUSR2 is taken. SIGINT is no alternative: it is often ignored in commands started in the
    background, and applications install handlers of their own.
    """
    main = threading.main_thread()
    if threading.current_thread() is not main or signal.getsignal(signal.SIGUSR2) not in (
        signal.SIG_DFL,
        _interrupted,
    ):
        return None
    signal.signal(signal.SIGUSR2, _interrupted)
    return functools.partial(signal.pthread_kill, main.ident or 0, signal.SIGUSR2)


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def _age(holder: Mapping[str, Any]) -> float:
    try:
        return time.time() - float(holder["time"])
    except (KeyError, TypeError, ValueError):
        return float("inf")


def _alive(holder: Mapping[str, Any]) -> bool:
    if _age(holder) > LEASE_SECONDS:
        return False
    if holder.get("host") == socket.gethostname() and holder.get("boot") == _boot_id():
        try:
            os.kill(int(holder["pid"]), 0)
        except ProcessLookupError:
            return False
        except (PermissionError, KeyError, TypeError, ValueError):
            return True
    return True


def _boot_id() -> str:
    """Identify boot and container: a process id is only meaningful within both."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip() + ":" + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
