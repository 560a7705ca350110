"""Where a run lives: its folders, its ledger, its lease, and what has been done already.

A run is one folder (a path or URI). Everything in it is Parquet, JSON, YAML, HTML or safetensors: nothing that executes
code when it is opened.

The ledger, `run.json`, has for every stage: its state, the fingerprint of all settings it depends on, samples, seconds.
What is finished is told by the files themselves: names derive from fragments, so a shard that is there is done.
"""

from __future__ import annotations

import contextlib
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
from raypipe.errors import RunError, TakenOverError
from raypipe.sources.base import ClassMap, Fragment
from raypipe.sources.noise import LabelNoise
from raypipe.storage import fences

FORMAT = 1
"""Version of the layout; a run of another version is refused, not guessed at."""

MOST_CONFIG = 4 << 20
"""Bytes of a configuration."""
FIT_NAME = re.compile(r"[\w-][\w.-]*").fullmatch
"""Of a fragment or a shard, which lead to files by their names: no path."""

STAGE_FOLDERS = {
    "index": ("index", "duplicates"),
    "seed": ("seed",),
    "label": ("labels",),
    "proxy": ("proxy",),
    "measure": ("measured",),
    "rehearse": ("rehearsal",),
    "embed": ("embeddings", "rejects"),
    "extrapolate": ("extrapolator", "scores"),
    "select": ("keep",),
    "report": ("report",),
}
"""What each stage writes, in the order of the stages."""
NOT_IN_EVERY_RUN = {"label", "rehearse"}
"""A ledger without these is whole."""


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


def noise_of(records: Mapping[str, StageRecord]) -> LabelNoise | None:
    """How labels of a run were replaced for a rehearsal, by its ledger; None where they were not."""
    return _noise(records["index"].detail) if "index" in records else None


def _noise(about: Mapping[str, Any]) -> LabelNoise | None:
    found = about.get("inject_noise")
    return LabelNoise(float(found["share"]), int(found["seed"])) if found else None


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
        """Raises TakenOverError, and writes nothing, where another driver took the run over."""
        from raypipe._version import __version__

        stages = {stage: dataclasses.asdict(records[stage]) for stage in STAGE_FOLDERS if stage in records}
        data = {"format": FORMAT, "raypipe": __version__, "updated": now(), "stages": stages}
        uri = self.path("run.json")
        if self.lease is None or storage.is_local(uri):
            storage.write_json(uri, data)
        elif not self._exchange_ledger(uri, storage.json_bytes(data)):
            self.lease.check()
            raise RunError(f"{self.uri}: run.json was changed by somebody while this driver had the run; run again to resume")

    def _exchange_ledger(self, uri: str, content: bytes) -> bool:
        """Write the ledger of an object store unless it changes meanwhile: a request on its way cannot be called back."""
        try:
            known = storage.read_bytes(uri, 0)
        except FileNotFoundError:
            known = None
        if self.lease is not None:
            self.lease.check()
        return storage.create_bytes(uri, content) if known is None else storage.exchange_bytes(uri, known, content)

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
        """The classes of the source; where it has none, the clusters that stand for them, none before they are found."""
        data = storage.read_json(self.path("index", "classes.json"))
        if data.get("clusters"):
            with contextlib.suppress(FileNotFoundError):
                data |= storage.read_json(self.path("labels", "classes.json"))
        return ClassMap(tuple(data["names"]), bool(data["numeric"]), _noise(data), bool(data.get("clusters")))

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
        self._me = {"owner": owner, "host": socket.gethostname(), "pid": os.getpid(), "boot": _boot_id()}
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
        time.sleep(0 if storage.is_local(self._uri) else 1.0)  # for object stores that ignore conditions
        if not taken or _parsed(_read(self._uri)).get("owner") != self._me["owner"]:
            raise RunError(f"{self._run.uri}: another driver took this run over at the same moment; try again")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._run.lease = None
        self._stop.set()
        try:
            if self._thread is not None:
                self._thread.join(timeout=10)
        except KeyboardInterrupt:  # the thread's, at the last moment
            if self._lost is None:
                raise
        fences.put_up({folder: fence for folder, fence in fences.standing().items() if fence is not self._fence})
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
                self._written = content if storage.create_bytes(self._uri, content) else _read(self._uri)
            except OSError:
                continue  # storage that comes back is renewed next time; the stages report what does not
            except TakenOverError as error:
                self._lost = error
                if self._interrupt is not None and not self._stop.is_set():
                    self._interrupt()
                return

    def _content(self, released: bool = False) -> bytes:
        content = {**self._me, "time": time.time(), "date": now(), "released": released, "progress": self.about()}
        return json.dumps(content).encode()


def _read(uri: str) -> bytes:
    try:
        return storage.read_bytes(uri, 0, MOST_LEASE)  # one request; a read without a range asks for the size first
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
