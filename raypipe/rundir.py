"""Where a run lives: its folders, its ledger, its lease, and what has been done already.

A run is one folder (a path or URI). Everything in it is Parquet, JSON, YAML, HTML or safetensors: nothing that executes
code when it is opened.

The ledger, `run.json`, has for every stage: its state, the fingerprint of all settings it depends on, samples, seconds.
What is finished is told by the files themselves: names derive from fragments, so a shard that is there is done.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from raypipe import storage
from raypipe.config import Config, dump_config, parse_config
from raypipe.errors import RunError
from raypipe.sources.base import ClassMap, Fragment

FORMAT = 1
"""Version of the layout; a run of another version is refused, not guessed at."""

MOST_CONFIG = 4 << 20
"""Bytes of a configuration."""
FIT_NAME = re.compile(r"[\w-][\w.-]*").fullmatch
"""Of a fragment or a shard, which lead to files by their names: no path."""

STAGE_FOLDERS = {
    "index": ("index", "duplicates"),
    "seed": ("seed",),
    "proxy": ("proxy",),
    "measure": ("measured",),
    "embed": ("embeddings", "rejects"),
    "extrapolate": ("extrapolator", "scores"),
    "select": ("keep",),
    "report": ("report",),
}
"""What each stage writes, in the order of the stages."""


@dataclasses.dataclass
class StageRecord:
    """What the ledger says of one stage. Seconds add up over interrupted attempts; detail is the stage's own."""

    state: str = "running"
    fingerprint: str = ""
    samples: int = 0
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    gpu_seconds: float = 0.0
    attempts: int = 0
    finished: str = ""
    error: str = ""
    detail: dict[str, Any] = dataclasses.field(default_factory=dict)


def checked_record(record: StageRecord) -> StageRecord:
    """The record, where every field has the type and range it should. Raises ValueError naming the first that has not."""
    for item in dataclasses.fields(StageRecord):
        value, default = getattr(record, item.name), StageRecord().__dict__[item.name]
        kind: Any = (int, float) if isinstance(default, float) else type(default)
        if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, (int, float)) and not 0 <= value < 1e18):
            raise ValueError(f"{item.name} is {str(value)[:60]!r}")
    return record


def tables_of(records: Mapping[str, StageRecord]) -> dict[str, str]:
    """What `raypipe extrapolate` made a folder from (embeddings, scores, score_column), by its ledger; empty for a run."""
    return records["extrapolate"].detail.get("tables", {}) if "extrapolate" in records else {}


class Run:
    """One run folder. Creating the object touches nothing."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/") if "://" in uri else os.path.abspath(os.path.expanduser(uri))
        self.lease: Lease | None = None
        """While this process is the one that writes the run."""

    def path(self, *parts: str) -> str:
        """URI of something in the run."""
        return storage.join(self.uri, *parts)

    def exists(self) -> bool:
        return storage.exists(self.path("run.json"))

    # -- ledger ---------------------------------------------------------------------------------------------------

    def ledger(self) -> dict[str, StageRecord]:
        """Records by stage. Raises RunError where there is no run or its ledger cannot be understood."""
        try:
            data = storage.read_json(self.path("run.json"))
        except FileNotFoundError:
            raise RunError(f"{self.uri}: no run here (run.json is missing)") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise RunError(f"{self.uri}: run.json has format {found!r}; this raypipe reads format {FORMAT}")
        fields = {field.name for field in dataclasses.fields(StageRecord)}
        try:
            return {
                stage: checked_record(StageRecord(**{key: value for key, value in record.items() if key in fields}))
                for stage, record in data["stages"].items()
                if stage in STAGE_FOLDERS
            }
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise RunError(f"{self.uri}: run.json is damaged ({error})") from None

    def write_ledger(self, records: Mapping[str, StageRecord]) -> None:
        """Raises RunError, and writes nothing, where another driver took the run over."""
        from raypipe._version import __version__

        if self.lease is not None:
            self.lease.check()
        stages = {stage: dataclasses.asdict(records[stage]) for stage in STAGE_FOLDERS if stage in records}
        data = {"format": FORMAT, "raypipe": __version__, "updated": now(), "stages": stages}
        storage.write_json(self.path("run.json"), data)

    def record(self, stage: str) -> StageRecord:
        """The record of a finished stage. Raises RunError when it is not finished."""
        found = self.ledger().get(stage)
        if found is None or found.state != "done":
            raise RunError(f"{self.uri}: stage {stage} is not finished; run `raypipe run` again to resume")
        return found

    def clear(self, stage: str) -> None:
        """Remove everything a stage wrote."""
        for folder in STAGE_FOLDERS[stage]:
            storage.delete(self.path(folder))

    # -- configuration --------------------------------------------------------------------------------------------

    def write_config(self, config: Config, sections: Mapping[str, Any] | None = None) -> None:
        """Write all settings, or those of some sections."""
        storage.write_bytes(self.path("config.yaml"), dump_config(config, sections).encode())

    def config(self) -> Config:
        """The configuration this run was made with."""
        import yaml

        try:
            return parse_config(yaml.safe_load(storage.read_whole(self.path("config.yaml"), MOST_CONFIG)))
        except FileNotFoundError:
            raise RunError(f"{self.uri}: no run here (config.yaml is missing)") from None
        except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
            raise RunError(f"{self.uri}: config.yaml is damaged ({error})") from None

    # -- index ----------------------------------------------------------------------------------------------------

    def fragments(self) -> list[Fragment]:
        """All fragments in the order of the source, without their `members` (see `with_members`)."""
        result = []
        columns = ["fragment_id", "path", "start", "stop", "offset", "error"]
        for part, table in storage.iter_tables(self.path("index"), columns):
            result += [Fragment(**row, part=part) for row in table.to_pylist()]
        for fragment in result:
            if not FIT_NAME(fragment.fragment_id):  # a file of the run is named after it
                raise RunError(f"{self.uri}: index/ is damaged: {fragment.fragment_id!r} is no name of a fragment")
        return result

    def with_members(self, fragment: Fragment) -> Fragment:
        """The fragment with the names of its small files, ready to be read. Workers call this; the driver never holds them all."""
        table = storage.read_table(self.path("index", fragment.part), ["fragment_id", "members"])
        row = table["fragment_id"].to_pylist().index(fragment.fragment_id)
        return dataclasses.replace(fragment, members=tuple(table["members"][row].as_py()))

    def classes(self) -> ClassMap:
        data = storage.read_json(self.path("index", "classes.json"))
        return ClassMap(tuple(data["names"]), bool(data["numeric"]))

    def done(self, folder: str) -> set[str]:
        """Stems of the Parquet files in a folder: the fragments (or seed shards) that are finished."""
        return {file.removesuffix(".parquet") for file in storage.names(self.path(folder)) if file.endswith(".parquet")}


def fingerprint(*parts: Any) -> str:
    """A short hash of anything JSON can hold."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def content_hash(names: Iterable[str]) -> str:
    """A short hash of a set of names."""
    digest = hashlib.blake2b(digest_size=8)
    for item in sorted(names):
        digest.update(item.encode() + b"\0")
    return digest.hexdigest()


def now() -> str:
    """The time, UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# -- one driver at a time -----------------------------------------------------------------------------------------

LEASE_SECONDS = 60.0
"""A lease not renewed for so long is stale and may be taken over."""


class Lease:
    """`RUN/driver.json` says who writes the run. A second driver is refused while the first renews its lease.

    A lease whose process is gone from this machine, or that was not renewed for `LEASE_SECONDS`, is taken over. The driver that lost
    it (it was suspended, or cut off from storage) notices when it renews the lease or writes the ledger: it is interrupted, writes the
    ledger no more, and with it Ray ends its tasks.
    """

    def __init__(self, run: Run) -> None:
        self._uri = run.path("driver.json")
        self._run = run
        self._me = {"owner": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid(), "boot": _boot_id()}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._interrupt = interrupt_of_main_thread()
        self.about: Callable[[], dict[str, Any]] = dict
        """What `driver.json` says beside: how far the stage under way is."""

    def check(self) -> None:
        """Raises RunError where another driver has the run."""
        holder = self._holder()
        if holder is not None and holder.get("owner") != self._me["owner"]:
            raise RunError(
                f"{self._run.uri}: taken over by another driver, process {holder.get('pid')} on {holder.get('host')}, since this one did "
                f"not answer for {LEASE_SECONDS:.0f} s; this one stops"
            )

    def __enter__(self) -> Lease:
        if not storage.create_bytes(self._uri, self._content()):
            holder = self._holder()
            if holder is not None and _alive(holder):
                raise RunError(
                    f"{self._run.uri}: in use by another driver: process {holder.get('pid')} on {holder.get('host')}, "
                    f"last heard of {_age(holder):.0f} s ago; wait for it, or stop it (it is forgotten after {LEASE_SECONDS:.0f} s)"
                )
            storage.write_bytes(self._uri, self._content())
            time.sleep(0 if storage.is_local(self._uri) else 1.0)
            if (self._holder() or {}).get("owner") != self._me["owner"]:
                raise RunError(f"{self._run.uri}: another driver took this run over at the same moment; try again")
        self._run.lease = self
        self._thread = threading.Thread(target=self._renew, daemon=True, name="raypipe-lease")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._run.lease = None
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=10)
        if (self._holder() or {}).get("owner") == self._me["owner"]:
            storage.delete(self._uri)

    def _renew(self) -> None:
        while not self._stop.wait(LEASE_SECONDS / 4):
            try:
                self.check()
                storage.write_bytes(self._uri, self._content())
            except OSError:
                continue  # storage that comes back is renewed next time; the stages report what does not
            except RunError:
                if self._interrupt is not None:
                    self._interrupt()
                return

    def _content(self) -> bytes:
        return json.dumps({**self._me, "time": time.time(), "date": now(), "progress": self.about()}).encode()

    def _holder(self) -> dict[str, Any] | None:
        try:
            data = json.loads(storage.read_whole(self._uri, 1 << 16))
        except (FileNotFoundError, ValueError, RecursionError):
            return None
        return data if isinstance(data, dict) else None


def interrupt_of_main_thread() -> Callable[[], None] | None:
    """What another thread calls to raise KeyboardInterrupt in this one, where this is the main thread, which alone can be; else None.

    SIGINT will not do: who starts a command in the background often has it ignored, and others have handlers of their own.
    """
    main = threading.main_thread()
    if threading.current_thread() is not main or signal.getsignal(signal.SIGUSR2) not in (signal.SIG_DFL, _interrupted):
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
