"""Storage that fails for a while, loses or truncates answers, disappears, fills up, or expires."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec.config
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fault_proxy import KINDS, FaultProxy, standing_before
from helpers import digit_pngs, small_config

from raypipe import cli, pipeline, storage
from raypipe.config import Config, SourceSettings, dump_config
from raypipe.distributed.context import Context
from raypipe.errors import StorageError
from raypipe.runs.ledger import StageRecord
from raypipe.runs.run import Run
from raypipe.sources import open_source
from raypipe.stages.base import Stage
from raypipe.storage import faults
from raypipe.storage import s3 as s3_files


@pytest.fixture
def proxy(s3_server: str, s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy without faults, which this process uses as the server, with short retry delays."""
    with standing_before(s3_server) as found:
        monkeypatch.setenv("AWS_ENDPOINT_URL", found.endpoint)
        monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": 1}})
        monkeypatch.setattr(faults, "LONGEST_DELAY", 0.1)
        monkeypatch.setattr(faults, "_gave_up", -100.0)
        storage.places.remote_filesystem.cache_clear()
        yield found
        found.every = ""
    monkeypatch.undo()
    storage.places.remote_filesystem.cache_clear()


@pytest.mark.parametrize("kind", KINDS)
def test_every_fault_is_overcome_and_asked_for_once_more(
    proxy: FaultProxy, s3: str, kind: str
) -> None:
    uri, content = f"{s3}/overcome/{kind}", b"0123456789" * 1000
    storage.filesystem(uri)
    proxy.next = [kind]
    storage.write_bytes(uri, content)
    proxy.next = [kind]
    assert storage.read_bytes(uri, 0) == content
    proxy.next = [kind]
    assert storage.read_bytes(uri, 10, 20) == content[10:20]
    proxy.next = [kind]
    assert storage.names(f"{s3}/overcome") >= {kind}
    with storage.open_read(uri, block=1000) as file:
        assert file.read(4) == b"0123"
        proxy.next = [kind]
        file.seek(5000)
        assert file.read(2005) == content[:2005]
        assert file.fault is None
    proxy.next = [kind]
    assert storage.exchange_bytes(uri, content, b"new") and storage.read_bytes(uri) == b"new"
    proxy.next = [kind]
    assert storage.create_bytes(f"{uri}-lease", b"mine") and not storage.create_bytes(
        f"{uri}-lease", b"yours"
    )
    assert proxy.next == [] and sum(proxy.found.values()) == 7
    assert all(2 <= len(times) < 30 for times in proxy.times.values())


def test_an_upload_whose_every_request_fails_once(proxy: FaultProxy, s3: str) -> None:
    """Includes a lost answer to the completion: the upload is gone, but the object exists."""
    uri, content = f"{s3}/parts", os.urandom(1 << 20) * 6
    proxy.next = ["slow-down", "", "reset", "", "lost"]
    with storage.Upload(uri) as file:
        file.write(content)
    assert proxy.next == [] and proxy.found == {"slow-down": 1, "reset": 1, "lost": 1}
    assert storage.read_bytes(uri) == content
    fs, path = storage.filesystem(s3)
    assert not fs.call_s3("list_multipart_uploads", Bucket=path).get("Uploads")


def test_a_source_is_read_as_if_nothing_had_happened(proxy: FaultProxy, s3: str) -> None:
    images, labels = digit_pngs(24)
    table = pa.table({"image": images, "label": labels})
    for number in range(2):
        storage.write_table(
            f"{s3}/digits/{number}.parquet", table.slice(12 * number, 12), row_group_size=4
        )
    settings = SourceSettings(uri=f"{s3}/digits", format="parquet")

    def read() -> list[Any]:
        source = open_source(settings)
        found = [source.scan(file) for file in source.files()]
        return [
            (item.sample_id, item.label, item.image)
            for scan in found
            for part in scan.fragments
            for item in source.read(part)
        ]

    expected = read()
    asked, proxy.rate, proxy.kinds = proxy.asked, 0.3, ("slow-down", "reset", "truncate")
    assert read() == expected and len(expected) == 24
    assert sum(proxy.found.values()) > 2 and proxy.asked - asked < 5 * asked


def test_clients_that_failed_together_do_not_come_back_together(
    proxy: FaultProxy, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the server's view: after all requests failed at once, retries are spread over time."""
    monkeypatch.setattr(faults, "FIRST_DELAY", 1.0)
    monkeypatch.setattr(faults, "LONGEST_DELAY", 1.0)
    uris = [f"{s3}/herd/{number}" for number in range(16)]
    proxy.next = ["slow-down"] * len(uris)
    for uri, _ in storage.ahead(
        lambda uri: storage.write_bytes(uri, b"x"), uris, uris[0], len(uris)
    ):
        assert storage.name(uri) in uri
    waits = sorted(times[1] - times[0] for times in proxy.times.values())
    count = len(waits)  # a client that is early again may meet the fault meant for one that is late
    assert count >= 12 and waits[-1] < 10
    assert waits[3 * count // 4] - waits[count // 4] > 0.1, (
        "so close together lie half of 12 uniform delays up to 1 s in 1 of 2000 tries"
    )


class Writing(Stage):
    """A stage that writes a file per unit, without Ray."""

    name = "index"

    def settings(self, config: Config) -> dict[str, Any]:
        return {}

    def complete(self, context: Context, record: StageRecord) -> bool:
        return len(context.run.done("index")) == 3

    def execute(self, context: Context, record: StageRecord) -> None:
        for number in range(3):
            if f"{number}" not in context.run.done("index"):
                self.write(context.run.path("index", f"{number}.parquet"), number)
        record.samples = 3

    def write(self, uri: str, number: int) -> None:
        storage.write_bytes(uri, bytes(50_000))


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Any:
    """`raypipe run` of a run whose only stage is `Writing`: exit code and stderr."""

    def run(uri: str, stage: Stage) -> tuple[int, str]:
        monkeypatch.setattr(pipeline, "make_stage", lambda name: stage)
        (tmp_path / "config.yaml").write_text(dump_config(small_config(uri)))
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main(["run", str(tmp_path / "config.yaml"), "--until", "index"])
        return int(ended.value.code or 0), capfd.readouterr().err

    return run


def failed_clearly(outcome: tuple[int, str], *words: str) -> None:
    code, text = outcome
    lines = [line for line in text.splitlines() if line.startswith("raypipe: ")]
    assert (
        code == 1 and len(lines) == 1 and "Traceback" not in text and "Logging error" not in text
    ), text
    for word in (*words, "then run the same command again"):
        assert word in lines[0]


def finished(outcome: tuple[int, str], uri: str) -> None:
    assert outcome[0] == 0, outcome[1]
    assert Run(uri).done("index") == {"0", "1", "2"} and Run(uri).ledger()["index"].state == "done"


@pytest.mark.parametrize(
    ("every", "words"),
    [
        ("slow-down", "storage still fails after 10 attempts"),
        ("expired", "the credentials have expired (The provided token has expired). Renew them"),
        ("denied", "access denied (Access Denied)"),
    ],
)
def test_object_storage_that_goes_away(
    proxy: FaultProxy, s3: str, command: Any, every: str, words: str
) -> None:
    uri = f"{s3}/away/{every}"

    class Loses(Writing):
        def write(self, uri: str, number: int) -> None:
            proxy.every = every if number == 1 else ""
            super().write(uri, number)

    failed_clearly(command(uri, Loses()), uri, words)
    assert proxy.found[every] < 40, "what tidies up does not wait as long again"
    failed_clearly(command(uri, Writing()), uri)  # and so from the start
    proxy.every = ""
    storage.delete(f"{uri}/driver.json")  # which nobody could release, and this process still lives
    finished(command(uri, Writing()), uri)


@contextlib.contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="mounting needs root on Linux"
)
def test_a_disk_that_is_full(tmp_path: Path, command: Any) -> None:
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=128k", "tmpfs"):
        uri = str(tmp_path / "disk" / "run")
        failed_clearly(
            command(uri, Writing()),
            f"{uri}/index/",
            "the disk is full (No space left on device). Free space there",
        )
        assert all(not name.startswith(".") for name in os.listdir(f"{uri}/index")), (
            "no half file is left"
        )
        subprocess.run(["mount", "-o", "remount,size=1m", str(tmp_path / "disk")], check=True)
        finished(command(uri, Writing()), uri)


@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="mounting needs root on Linux"
)
def test_a_folder_that_is_read_only(tmp_path: Path, command: Any) -> None:
    uri = str(tmp_path / "disk" / "run")
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=1m", "tmpfs"):
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
        failed_clearly(
            command(uri, Writing()),
            uri,
            "cannot be written (Read-only file system). Mount it writable",
        )
        subprocess.run(["mount", "-o", "remount,rw", str(tmp_path / "disk")], check=True)
        finished(command(uri, Writing()), uri)


def test_a_folder_whose_owner_is_another(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    if os.geteuid() == 0:
        if subprocess.run(["chattr", "+i", str(folder)], capture_output=True).returncode:
            pytest.skip("root may write everywhere, and there are no immutable folders here")
    else:
        folder.chmod(0o500)
    try:
        with pytest.raises(
            StorageError, match=rf"{folder}/file: no permission to write .*Change the permissions"
        ):
            storage.write_bytes(f"{folder}/file", b"x")
        with (
            pytest.raises(StorageError, match="no permission to write"),
            storage.Upload(f"{folder}/file") as file,
        ):
            file.write(b"x")
    finally:
        if os.geteuid() == 0:
            subprocess.run(["chattr", "-i", str(folder)], check=True)
        folder.chmod(0o700)


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    """Simulate a full disk by a limit on file sizes: the write fails, here in a Parquet writer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # Python ignores SIGXFSZ
    try:
        words = r"big: the file is larger than allowed .*ulimit -f"
        with pytest.raises(StorageError, match=words), storage.Upload(f"{tmp_path}/big") as file:
            pq.write_table(
                pa.table({"a": list(range(50_000))}), file, compression="none", use_dictionary=False
            )
        with pytest.raises(StorageError, match=r"ulimit -f"):
            storage.write_bytes(f"{tmp_path}/big", bytes(50_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == []


def test_time_outs_can_be_set_and_nobody_else_retries(
    s3_server: str, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": 7}})
    made = s3_files.s3()
    assert (made.config_kwargs["read_timeout"], made.config_kwargs["connect_timeout"]) == (
        7,
        s3_files.CONNECT_TIMEOUT,
    )
    assert (
        made.config_kwargs["retries"] == {"total_max_attempts": 1, "mode": "standard"}
        and made.retries == 1
    )
