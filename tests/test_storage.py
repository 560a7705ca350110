from __future__ import annotations

import errno
import http.client
import io
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pytest

from raypipe import storage
from raypipe.errors import RaypipeError


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
        won = list(pool.map(lambda number: (storage.create_bytes(uri, str(number).encode()), number), range(8)))
    winners = [number for created, number in won if created]
    assert len(winners) == 1
    assert storage.read_bytes(uri) == str(winners[0]).encode()
    assert storage.create_bytes(uri, b"late") is False
    assert [file.path for file in storage.listing(place)] == ["lease"]


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


def test_full_disk_leaves_the_old_file_and_no_debris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = str(tmp_path / "file")
    storage.write_bytes(uri, b"old")
    monkeypatch.setattr(storage, "open", lambda path, mode: FullDisk(path, mode.replace("b", "")), raising=False)
    with pytest.raises(OSError, match="No space left"):
        storage.write_bytes(uri, b"new")
    with pytest.raises(OSError, match="No space left"), storage.Upload(uri) as file:
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
    monkeypatch.setattr(storage, "filesystem", lambda uri: (fs, uri))
    monkeypatch.setattr(storage, "FIRST_DELAY", 0.0)
    return fs


def botocore_error() -> Exception:
    from botocore.exceptions import EndpointConnectionError

    return EndpointConnectionError(endpoint_url="http://storage")


@pytest.mark.parametrize(
    "error", [OSError(errno.EBUSY, "Slow Down"), TimeoutError("slow"), ConnectionResetError("gone"), botocore_error()]
)
def test_passing_faults_are_retried(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    fs = flaky(monkeypatch, storage.RETRIES - 1, error)
    assert storage.read_bytes("s3://bucket/x") == b"content"
    assert fs.asked == storage.RETRIES


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("x"),
        PermissionError("Access Denied"),
        OSError(errno.ENOSPC, "full"),
        OSError(errno.EINVAL, "The requested range is not satisfiable"),
        OSError("The provided token has expired"),
        ValueError("a fault of the program"),
    ],
)
def test_faults_that_stay_are_raised_at_once(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    fs = flaky(monkeypatch, 1, error)
    with pytest.raises(type(error)):
        storage.read_bytes("s3://bucket/x")
    assert fs.asked == 1


def test_the_last_attempt_names_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    fs = flaky(monkeypatch, 99, TimeoutError("slow"))
    with pytest.raises(OSError, match=r"s3://bucket/x: storage still fails after 8 attempts: slow"):
        storage.read_bytes("s3://bucket/x")
    assert fs.asked == storage.RETRIES


def test_delays_grow_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(storage.random, "uniform", lambda low, high: high)
    monkeypatch.setattr(storage.time, "sleep", slept.append)
    monkeypatch.setattr(storage, "filesystem", lambda uri: (Flaky(99, TimeoutError()), uri))
    with pytest.raises(OSError):
        storage.read_bytes("s3://bucket/x")
    assert slept == [0.25, 0.5, 1, 2, 4, 8, 16]


def test_missing_credentials_are_an_oserror_at_once(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(variable)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    storage._remote.cache_clear()
    try:
        with pytest.raises(OSError, match=r"s3://other/x: .*credentials"):
            storage.write_bytes("s3://other/x", b"1")
    finally:
        storage._remote.cache_clear()


class Unsteady(ThreadingHTTPServer):
    """Stands before another server; answers 503, or closes the connection in the middle, as often as told."""

    daemon_threads = True

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), Relay)
        self.target, self.unavailable, self.cut_off = target.removeprefix("http://"), 0, 0


class Relay(BaseHTTPRequestHandler):
    server: Unsteady
    protocol_version = "HTTP/1.1"

    def _relay(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.unavailable > 0:
            self.server.unavailable -= 1
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        connection = http.client.HTTPConnection(self.server.target)
        connection.request(self.command, self.path, body, {key: value for key, value in self.headers.items() if key != "Host"})
        answer = connection.getresponse()
        content = answer.read()
        self.send_response(answer.status)
        for key, value in answer.getheaders():
            if key.lower() not in {"connection", "transfer-encoding", "content-length"}:
                self.send_header(key, value)
        self.send_header("Content-Length", answer.getheader("Content-Length") or str(len(content)))
        self.end_headers()
        if self.server.cut_off > 0 and self.command == "GET" and len(content) > 1:
            self.server.cut_off -= 1
            content = content[: len(content) // 2]
            self.close_connection = True
        self.wfile.write(content)
        connection.close()

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _relay

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def unsteady(s3_server: str, s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Unsteady]:
    server = Unsteady(s3_server)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
    storage._remote.cache_clear()
    yield server
    monkeypatch.undo()
    storage._remote.cache_clear()
    server.shutdown()
    server.server_close()
    thread.join()


def test_s3_that_fails_for_a_while(unsteady: Unsteady, s3: str) -> None:
    uri = f"{s3}/unsteady"
    unsteady.unavailable = 2
    storage.write_bytes(uri, b"0123456789" * 1000)
    assert unsteady.unavailable == 0
    with storage.open_read(uri, block=1000) as file:
        assert file.read(4) == b"0123"
        unsteady.unavailable = unsteady.cut_off = 1
        file.seek(5000)
        assert file.read(2005) == b"0123456789" * 200 + b"01234"
        assert unsteady.unavailable == unsteady.cut_off == 0
        assert file.fault is None


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
    assert [(name, part.to_pydict()) for name, part in found] == [("1.parquet", {"b": [None]}), ("2.parquet", {"b": ["x", None]})]


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_tables_read_ahead_come_in_order(place: str, threads: int) -> None:
    folder = storage.join(place, "ahead")
    for number in range(5):
        storage.write_table(storage.join(folder, f"{number}.parquet"), pa.table({"a": [number]}))
    found = [(name, part["a"].to_pylist()) for name, part in storage.iter_tables(folder, threads=threads)]
    assert found == [(f"{number}.parquet", [number]) for number in range(5)]
    storage.write_bytes(storage.join(folder, "3.parquet"), b"PAR1")
    with pytest.raises(RaypipeError, match=r"3\.parquet"):
        list(storage.iter_tables(folder, threads=threads))
    assert next(storage.iter_tables(folder, threads=threads))[0] == "0.parquet"  # and the rest is not waited for


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"PAR1"])
def test_damaged_files_are_named(tmp_path: Path, content: bytes) -> None:
    uri = str(tmp_path / "damaged")
    storage.write_bytes(uri, content)
    with pytest.raises(RaypipeError, match="damaged"):
        storage.read_json(uri)
    with pytest.raises(RaypipeError, match="damaged"):
        storage.read_table(uri)
