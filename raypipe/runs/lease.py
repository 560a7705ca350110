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
from raypipe.runs.layout import Run
from raypipe.runs.ledger import now
from raypipe.storage import fences

LEASE_SECONDS = 60.0
"""A lease not renewed for so long is stale and may be taken over."""
MOST_LEASE = 1 << 16
"""Bytes of `driver.json` that are looked at."""
DRIVER = "driver.json"
"""Who writes a run, or did so last."""


@dataclasses.dataclass(frozen=True)
class Fence:
    """Lets the driver that has a run, and what works for it on other machines, write there, and nobody else.

    The fencing token (Kleppmann, *How to do distributed locking*, 2016) is the owner in `driver.json`, which is never removed:
    every change below the run looks there first. See `raypipe.storage.fences`.
    """

    run: str
    owner: str

    @property
    def lock(self) -> str:
        """A driver that takes over has the folder locked, so that it comes before a look into `driver.json` or after the change."""
        return storage.filesystem(self.run)[1] if storage.is_local(self.run) else ""

    def check(self) -> None:
        """Raises TakenOverError where another driver has the run. One whose `driver.json` was deleted goes on."""
        holder = _parsed(_read(storage.join(self.run, DRIVER)))
        if holder and holder.get("owner") != self.owner:
            raise TakenOverError(
                f"{self.run}: taken over by another driver, process {holder.get('pid')} on {holder.get('host')}, since this one did "
                f"not answer for {LEASE_SECONDS:.0f} s; this one stops, and what it was about to write is not written"
            )


class Lease:
    """`RUN/driver.json` says who writes the run. A second driver is refused while the first renews its lease.

    A lease that was released, whose process is gone from this machine, or that was not renewed for `LEASE_SECONDS`, is taken over.
    The driver that lost it (it was suspended, or cut off from storage) notices when it renews the lease, and its `Fence` keeps it and
    its tasks from every change: it is interrupted and ends, and with it Ray ends its tasks.
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
        self._fence = Fence(run.uri, owner)
        self._written = b""
        self._lost: TakenOverError | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._interrupt = interrupt_of_main_thread()
        self.about: Callable[[], dict[str, Any]] = dict
        """What `driver.json` says beside: how far the stage under way is."""

    def check(self) -> None:
        """Raises TakenOverError where another driver has the run."""
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
        found = _read(self._uri)
        holder = _parsed(found)
        if holder and not holder.get("released") and _alive(holder):
            raise RunError(
                f"{self._run.uri}: in use by another driver: process {holder.get('pid')} on {holder.get('host')}, "
                f"last heard of {_age(holder):.0f} s ago; wait for it, or stop it (it is forgotten after {LEASE_SECONDS:.0f} s)"
            )
        taken = storage.exchange_bytes(self._uri, found, self._written)
        time.sleep(
            0 if storage.is_local(self._uri) else 1.0
        )  # for object stores that ignore conditions
        if not taken or _parsed(_read(self._uri)).get("owner") != self._me["owner"]:
            raise RunError(
                f"{self._run.uri}: another driver took this run over at the same moment; try again"
            )

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._run.lease = None
        self._stop.set()
        try:
            if self._thread is not None:
                self._thread.join(timeout=10)
        except KeyboardInterrupt:  # the thread's, at the last moment
            if self._lost is None:
                raise
        fences.put_up(
            {
                folder: fence
                for folder, fence in fences.standing().items()
                if fence is not self._fence
            }
        )
        with contextlib.suppress(OSError):  # then it is stale after a while
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
                # somebody deleted it, or wrote into it
                self._written = (
                    content if storage.create_bytes(self._uri, content) else _read(self._uri)
                )
            except OSError:
                continue  # storage that comes back is renewed next time; the stages report what does not
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
        return storage.read_bytes(
            uri, 0, MOST_LEASE
        )  # one request; a read without a range asks for the size first
    except FileNotFoundError:
        return b""


def _parsed(content: bytes) -> dict[str, Any]:
    """What a lease says; nothing where it is damaged or not there."""
    try:
        data = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def interrupt_of_main_thread() -> Callable[[], None] | None:
    """What another thread calls to raise KeyboardInterrupt in this one, where this is the main thread, which alone can be; else None.

    SIGINT will not do: who starts a command in the background often has it ignored, and others have handlers of their own.
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
    """Tells containers and reboots apart that share a host name, since a pid means nothing across them."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip() + ":" + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
