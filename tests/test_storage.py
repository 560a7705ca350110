from __future__ import annotations

import errno
import io
import os
import pickle
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from raypipe import storage
from raypipe.errors import RaypipeError, StorageError
from raypipe.storage import faults, streams
from raypipe.storage.file_info import file_info


def test_write_read_overwrite_delete(place: str) -> None:
    uri = storage.join(place, "deep", "er", "file.bin")
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(uri)
    storage.write_bytes(uri, b"0123456789")
    assert storage.read_bytes(uri) == b"0123456789"
    assert storage.read_bytes(uri, 2, 5) == b"234"
    assert storage.info(uri).size == 10 and storage.exists(uri) and storage.is_file(uri)
    assert not storage.is_file(storage.join(place, "deep"))
    storage.write_bytes(uri, b"")
    assert storage.read_bytes(uri) == b""
    storage.delete(uri)
    storage.delete(uri)
    assert not storage.exists(uri)


def test_delete_takes_a_folder_and_leaves_its_neighbour(place: str) -> None:
    storage.write_bytes(storage.join(place, "a", "x"), b"1")
    storage.write_bytes(storage.join(place, "ab", "x"), b"1")
    storage.delete(storage.join(place, "a"))
    assert [file.path for file in storage.listing(place)] == ["ab/x"]


def test_listing_is_sorted_relative_and_without_hidden_files(place: str) -> None:
    for path in ("b/2", "a", "b/1", ".hidden", "b/.c/3", "b-/4"):
        storage.write_bytes(storage.join(place, "root", path), path.encode())
    storage.write_bytes(storage.join(place, "root2"), b"")
    found = storage.listing(storage.join(place, "root") + "/")
    assert [file.path for file in found] == ["a", "b-/4", "b/1", "b/2"]
    assert [file.size for file in found] == [1, 4, 3, 3]
    assert all(file.stamp for file in found)
    assert storage.listing(storage.join(place, "none")) == []
    assert storage.names(storage.join(place, "root")) == {"a", "b", "b-"}
    assert storage.names(storage.join(place, "none")) == set()


def test_folder_markers_of_s3_consoles_are_no_files(s3: str) -> None:
    fs, path = storage.filesystem(f"{s3}/marked")
    fs.pipe_file(path + "/sub/", b"")
    storage.write_bytes(f"{s3}/marked/sub/x", b"1")
    assert [file.path for file in storage.listing(f"{s3}/marked")] == ["sub/x"]
    assert [file.path for file in storage.matching(f"{s3}/marked/**")] == ["sub/x"]


def test_stamp_changes_with_content(place: str) -> None:
    uri = storage.join(place, "file")
    storage.write_bytes(uri, b"1")
    if storage.is_local(uri):
        os.utime(uri, (1, 1))
    first = storage.info(uri)
    storage.write_bytes(uri, b"2")
    assert storage.info(uri).stamp != first.stamp


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.bin", ["1.bin"]),
        ("*/*.bin", ["d/2.bin"]),
        ("**/*.bin", ["1.bin", "d/2.bin", "d/e/3.bin"]),
        ("d/[23].bin", ["2.bin"]),
        ("x*", []),
    ],
)
def test_matching(place: str, pattern: str, expected: list[str]) -> None:
    for path in ("1.bin", "d/2.bin", "d/e/3.bin", "d/4.txt", ".h.bin", ".h/5.bin"):
        storage.write_bytes(storage.join(place, path), b"x")
    found = storage.matching(storage.join(place, pattern))
    assert [file.path for file in found] == expected
    assert all(file.size == 1 and file.stamp for file in found)


def test_glob_root() -> None:
    assert storage.glob_root("s3://bucket/a/b*/c") == "s3://bucket/a"
    assert storage.glob_root("s3://bucket/*") == "s3://bucket"
    assert storage.glob_root("/*.tar") == "/"
    assert storage.glob_root("*.tar") == "."
    assert storage.glob_root("/data/plain") == "/data/plain"


def test_file_uri_and_plain_path_are_one_place(tmp_path: Path) -> None:
    storage.write_bytes(f"file://{tmp_path}/x", b"1")
    assert storage.read_bytes(str(tmp_path / "x")) == b"1"
    assert storage.is_local(f"file://{tmp_path}") and not storage.is_local("s3://bucket/x")


def test_unknown_protocol_is_a_clear_error() -> None:
    with pytest.raises(RaypipeError, match=r"nosuch:// is not supported"):
        storage.read_bytes("nosuch://bucket/x")


def test_exactly_one_of_many_creates(place: str) -> None:
    uri = storage.join(place, "lease")
    with ThreadPoolExecutor(8) as pool:
        won = list(
            pool.map(
                lambda number: (storage.create_bytes(uri, str(number).encode()), number), range(8)
            )
        )
    winners = [number for created, number in won if created]
    assert len(winners) == 1
    assert storage.read_bytes(uri) == str(winners[0]).encode()
    assert storage.create_bytes(uri, b"late") is False
    assert [file.path for file in storage.listing(place)] == ["lease"]


def test_exactly_one_of_many_exchanges(place: str) -> None:
    uri = storage.join(place, "driver.json")
    assert not storage.exchange_bytes(uri, b"", b"x") and not storage.exists(uri)
    storage.write_bytes(uri, b"old")
    with ThreadPoolExecutor(8) as pool:
        won = list(
            pool.map(
                lambda number: (storage.exchange_bytes(uri, b"old", str(number).encode()), number),
                range(8),
            )
        )
    winners = [number for exchanged, number in won if exchanged]
    assert len(winners) == 1
    assert storage.read_bytes(uri) == str(winners[0]).encode()
    assert not storage.exchange_bytes(uri, b"old", b"late")


def test_upload_appears_whole_or_not_at_all(place: str) -> None:
    uri = storage.join(place, "new", "big")
    content = os.urandom(1 << 20) * 6  # more than one part on S3
    with pytest.raises(KeyError), storage.Upload(uri) as file:
        file.write(content)
        raise KeyError("in the middle")
    assert not storage.exists(uri) and storage.listing(place) == []
    with storage.Upload(uri) as file:
        file.write(content)
        file.write(b"end")
        assert not storage.exists(uri)
    assert storage.read_bytes(uri) == content + b"end"
    with storage.Upload(uri):
        pass
    assert storage.read_bytes(uri) == b""


def test_upload_leaves_the_old_file_when_it_fails(place: str) -> None:
    uri = storage.join(place, "file")
    storage.write_bytes(uri, b"old")
    with pytest.raises(KeyError), storage.Upload(uri) as file:
        file.write(b"new")
        raise KeyError
    assert storage.read_bytes(uri) == b"old"


def test_a_discarded_upload_is_closed_and_leaves_no_parts_on_s3(s3: str) -> None:
    with pytest.raises(KeyError), storage.Upload(f"{s3}/discarded") as file:
        file.write(b"x")
        raise KeyError
    assert file.closed  # an open one would start an upload when it is collected
    fs, _ = storage.filesystem(s3)
    assert not fs.call_s3("list_multipart_uploads", Bucket=storage.name(s3)).get("Uploads")


class FullDisk(io.FileIO):
    """A file on a disk that fills up."""

    def write(self, data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_leaves_the_old_file_and_no_debris(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = str(tmp_path / "file")
    storage.write_bytes(uri, b"old")
    for module in (storage.files, streams):
        monkeypatch.setattr(
            module, "open", lambda path, mode: FullDisk(path, mode.replace("b", "")), raising=False
        )
    with pytest.raises(
        StorageError, match=rf"{uri}: the disk is full \(No space left on device\)\. Free space"
    ):
        storage.write_bytes(uri, b"new")
    with pytest.raises(StorageError, match="the disk is full"), storage.Upload(uri) as file:
        file.write(b"new")
    monkeypatch.undo()
    assert storage.read_bytes(uri) == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_reader_seeks_reads_and_closes(place: str) -> None:
    uri = storage.join(place, "file")
    content = bytes(range(256)) * 64
    storage.write_bytes(uri, content)
    with storage.open_read(uri, block=100) as file:
        assert file.read(3) == content[:3]
        assert file.seek(-5, os.SEEK_END) == len(content) - 5
        assert file.read() == content[-5:]
        assert file.read(10) == b""
        file.seek(250)
        assert file.read(1000) == content[250:1250]
        assert file.seek(len(content) + 50) and file.read(5) == b""
        assert file.fault is None
    assert file.closed
    with pytest.raises(FileNotFoundError):
        storage.open_read(storage.join(place, "none"))


class Flaky:
    """A filesystem that fails a number of times, then answers."""

    def __init__(self, failures: int, error: Exception) -> None:
        self.failures, self.error, self.asked = failures, error, 0

    def cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        self.asked += 1
        if self.asked <= self.failures:
            raise self.error
        return b"content"


def flaky(monkeypatch: pytest.MonkeyPatch, failures: int, error: Exception) -> Flaky:
    fs = Flaky(failures, error)
    monkeypatch.setattr(storage.files, "filesystem", lambda uri: (fs, uri))
    monkeypatch.setattr(faults, "FIRST_DELAY", 0.0)
    monkeypatch.setattr(faults, "_gave_up", -100.0)
    return fs


def botocore_error() -> Exception:
    from botocore.exceptions import EndpointConnectionError

    return EndpointConnectionError(endpoint_url="http://storage")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EBUSY, "Slow Down"),
        TimeoutError("slow"),
        ConnectionResetError("gone"),
        botocore_error(),
    ],
)
def test_passing_faults_are_retried(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    fs = flaky(monkeypatch, faults.RETRIES - 1, error)
    assert storage.read_bytes("s3://bucket/x") == b"content"
    assert fs.asked == faults.RETRIES


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file", "/data/expired-credentials"),
        PermissionError(errno.EACCES, "Permission denied", "/data/expired"),
        OSError(errno.EINVAL, "The requested range is not satisfiable"),
        ValueError("a fault of the program"),
    ],
)
def test_faults_that_stay_are_raised_at_once(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    fs = flaky(monkeypatch, 1, error)
    with pytest.raises(type(error)) as raised:
        storage.read_bytes("s3://bucket/x")
    assert fs.asked == 1 and raised.value is error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            PermissionError("Access Denied"),
            r"access denied \(Access Denied\)\. Renew the credentials if they have expired",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            r"the disk is full \(No space left on device\)\. Free space",
        ),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), r"the disk is full"),
        (
            OSError(errno.EROFS, "Read-only file system"),
            r"cannot be written \(Read-only file system\)\. Mount it writable",
        ),
        (OSError(errno.EFBIG, "File too large"), r"ulimit -f"),
        (
            OSError("The provided token has expired."),
            r"the credentials have expired \(The provided token has expired\)\. Renew them",
        ),
        (
            PermissionError("The AWS Access Key Id (InvalidAccessKeyId) does not exist"),
            r"missing or wrong",
        ),
    ],
)
def test_faults_that_one_has_to_mend_say_how(
    monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    fs = flaky(monkeypatch, 1, error)
    with pytest.raises(
        StorageError, match=rf"^s3://bucket/x: .*{words}.*, then run the same command again$"
    ) as raised:
        storage.read_bytes("s3://bucket/x")
    assert fs.asked == 1 and raised.value.__cause__ is error
    assert isinstance(raised.value, PermissionError) == isinstance(error, PermissionError)
    assert pickle.loads(pickle.dumps(raised.value)).args == raised.value.args, (
        "it comes back from workers"
    )


def test_the_last_attempt_names_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    fs = flaky(monkeypatch, 99, TimeoutError("slow"))
    with pytest.raises(
        StorageError,
        match=r"s3://bucket/x: storage still fails after 10 attempts: slow\. Check that",
    ):
        storage.read_bytes("s3://bucket/x")
    assert fs.asked == faults.RETRIES
    with pytest.raises(StorageError, match="after 2 attempts"):
        storage.read_bytes("s3://bucket/y")  # what tidies up does not wait as long again
    fs.failures = 0
    assert storage.read_bytes("s3://bucket/x") == b"content"
    fs.failures = 99 + fs.asked
    with pytest.raises(StorageError, match="after 10 attempts"):
        storage.read_bytes("s3://bucket/x")


def test_delays_grow_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    flaky(monkeypatch, 99, TimeoutError())
    monkeypatch.setattr(faults, "FIRST_DELAY", 0.25)
    monkeypatch.setattr(faults.random, "uniform", lambda low, high: high)
    monkeypatch.setattr(faults.time, "sleep", slept.append)
    with pytest.raises(StorageError):
        storage.read_bytes("s3://bucket/x")
    assert slept == [0.25, 0.5, 1, 2, 4, 8, 16, 20, 20]


def test_delays_of_many_clients_are_spread_over_all_of_their_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(faults, "random", random.Random(0))
    for attempt, bound in ((0, 0.25), (3, 2.0), (9, 20.0)):
        delays = sorted(faults.delay(attempt) for _ in range(400))
        assert delays[0] >= 0 and delays[-1] <= bound
        # no two of the twenty twentieths of the bound have less than 3 or more than 50 of the 400 (20 are expected)
        assert all(
            3 < sum(part <= value / bound * 20 < part + 1 for value in delays) < 50
            for part in range(20)
        )


def test_missing_credentials_are_an_oserror_at_once(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(variable)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    storage.places.remote_filesystem.cache_clear()
    try:
        with pytest.raises(
            StorageError, match=r"s3://other/x: the credentials are missing or wrong"
        ):
            storage.write_bytes("s3://other/x", b"1")
    finally:
        storage.places.remote_filesystem.cache_clear()


def test_an_object_replaced_while_it_is_read_is_a_fault(s3: str) -> None:
    uri = f"{s3}/replaced"
    storage.write_bytes(uri, b"old" * 1000)
    with storage.open_read(uri, block=10) as file:
        assert file.read(3) == b"old"
        storage.write_bytes(uri, b"new" * 1000)
        file.seek(1500)
        with pytest.raises(OSError):
            file.read(3)
        assert file.fault is not None


def test_json_and_tables(place: str) -> None:
    storage.write_json(storage.join(place, "x.json"), {"a": [1, "é"]})
    assert storage.read_json(storage.join(place, "x.json")) == {"a": [1, "é"]}
    table = pa.table({"a": [1, 2], "b": ["x", None]})
    storage.write_table(storage.join(place, "t", "2.parquet"), table)
    storage.write_table(storage.join(place, "t", "1.parquet"), table.slice(1))
    storage.write_bytes(storage.join(place, "t", "note.txt"), b"no table")
    found = list(storage.iter_tables(storage.join(place, "t"), ["b"]))
    assert [(name, part.to_pydict()) for name, part in found] == [
        ("1.parquet", {"b": [None]}),
        ("2.parquet", {"b": ["x", None]}),
    ]


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_tables_read_ahead_come_in_order(place: str, threads: int) -> None:
    folder = storage.join(place, "ahead")
    for number in range(5):
        storage.write_table(storage.join(folder, f"{number}.parquet"), pa.table({"a": [number]}))
    found = [
        (name, part["a"].to_pylist()) for name, part in storage.iter_tables(folder, threads=threads)
    ]
    assert found == [(f"{number}.parquet", [number]) for number in range(5)]
    storage.write_bytes(storage.join(folder, "3.parquet"), b"PAR1")
    with pytest.raises(RaypipeError, match=r"3\.parquet"):
        list(storage.iter_tables(folder, threads=threads))
    assert (
        next(storage.iter_tables(folder, threads=threads))[0] == "0.parquet"
    )  # and the rest is not waited for


@pytest.mark.parametrize(
    ("where", "most"), [("s3://bucket/run", 5), ("/tmp/run", storage.LOCAL_READERS)]
)
def test_of_a_local_disk_few_files_are_read_at_a_time(where: str, most: int) -> None:
    meeting = threading.Barrier(most)
    assert list(storage.ahead(lambda _: meeting.wait(30) >= 0, range(2 * most), where, 5)) == [
        (n, True) for n in range(2 * most)
    ]
    names = {
        name
        for _, name in storage.ahead(
            lambda _: threading.current_thread().name, range(100), where, 5
        )
    }
    assert len(names) <= most


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"PAR1"])
def test_damaged_files_are_named(tmp_path: Path, content: bytes) -> None:
    uri = str(tmp_path / "damaged")
    storage.write_bytes(uri, content)
    with pytest.raises(RaypipeError, match="damaged"):
        storage.read_json(uri)
    with pytest.raises(RaypipeError, match="damaged"):
        storage.read_table(uri)


@pytest.mark.parametrize(
    ("uri", "module", "extra"),
    [
        ("gs://b/x", "gcsfs", "gcs"),
        ("az://b/x", "adlfs", "azure"),
        ("hf://b/x", "huggingface_hub", "hf"),
    ],
)
def test_a_missing_package(
    monkeypatch: pytest.MonkeyPatch, uri: str, module: str, extra: str
) -> None:
    for name in [name for name in sys.modules if name.startswith((module, "raypipe.storage.gcs"))]:
        monkeypatch.delitem(sys.modules, name)
    for name in (module, f"{module}.core"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("raypipe.storage.gcs", "raypipe.storage.azure"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    storage.places.remote_filesystem.cache_clear()
    with pytest.raises(RaypipeError, match=rf"pip install 'raypipe\[{extra}\]'"):
        storage.read_bytes(uri)


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("gs://b/x", "GOOGLE_APPLICATION_CREDENTIALS"),
        ("az://b/x", "AZURE_STORAGE_CONNECTION_STRING"),
    ],
)
def test_wrong_credentials_name_the_variables_of_the_store(uri: str, words: str) -> None:
    with pytest.raises(StorageError, match=rf"^{uri}: the credentials are missing .*{words}"):
        storage.retrying(_raising(http_error(401)), uri)


@pytest.mark.parametrize(
    ("status", "transient"), [(429, True), (503, True), (400, False), (401, False), (404, False)]
)
def test_statuses_that_pass(status: int, transient: bool) -> None:
    assert faults.is_transient(http_error(status)) == transient


@pytest.mark.parametrize("bucket", ["expired", "credentials", "signature", "forbidden"])
def test_the_name_of_a_bucket_is_no_cause(bucket: str) -> None:
    from botocore.exceptions import EndpointConnectionError, ReadTimeoutError

    url = f"https://{bucket}.example.com/{bucket}/run.json?list-type=2"
    assert faults.is_transient(ReadTimeoutError(endpoint_url=url))
    assert faults.advice(EndpointConnectionError(endpoint_url=url)).endswith(
        "Check endpoint, region and network"
    )


def test_the_stamp_of_a_file_on_the_hub_is_its_content() -> None:
    detail = {"name": "a", "size": 1, "blob_id": "0123", "last_commit": None}
    assert file_info("a", detail).stamp == "0123"


def http_error(status: int) -> Exception:
    """An error like that of gcsfs."""

    class HttpError(Exception):
        code: Any = status

    HttpError.__module__ = "gcsfs.retry"
    return HttpError("Anonymous caller")


def _raising(error: Exception) -> Any:
    def action() -> None:
        raise error

    return action


def test_a_client_that_needs_other_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError("Unable to load libjvm")

    monkeypatch.setattr("fsspec.filesystem", fails)
    with pytest.raises(RaypipeError, match=r"^hdfs:// cannot be opened here: .*libjvm\. Copy"):
        storage.exists("hdfs://host/a")
