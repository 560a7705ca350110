"""Find the file system of a path or URI, and the path on it."""

from __future__ import annotations

import functools
import os

import fsspec
from fsspec.implementations.local import LocalFileSystem

from raypipe.errors import RaypipeError
from raypipe.storage.faults import CREDENTIALS

_EXTRAS = {
    **dict.fromkeys(("gs", "gcs"), "gcs"),
    **dict.fromkeys(("az", "abfs", "abfss"), "azure"),
    "hf": "hf",
}
"""Protocol -> extra of the package that reads it."""


@functools.cache
def remote_filesystem(protocol: str, once: bool = False) -> fsspec.AbstractFileSystem:
    """Return the file system of a protocol. With `once`, requests are not retried.

    Raises RaypipeError for a protocol that is not supported.
    """
    try:
        if protocol in {"s3", "s3a"}:
            from raypipe.storage.s3 import s3

            return s3(once)
        if protocol in {"gs", "gcs"}:
            from raypipe.storage.gcs import RetryingGCS

            return RetryingGCS(once=once, use_listings_cache=False, skip_instance_cache=True)
        if protocol in {"az", "abfs", "abfss"}:
            from raypipe.storage.azure import RetryingAzure

            return RetryingAzure(once=once, use_listings_cache=False, skip_instance_cache=True)
        return fsspec.filesystem(protocol, use_listings_cache=False, skip_instance_cache=True)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        install = f"; pip install 'raypipe[{extra}]'" if extra else ""
        raise RaypipeError(f"{protocol}:// is not supported here: {error}{install}") from None
    except OSError as error:  # of clients that need other programs, such as that of HDFS
        raise RaypipeError(
            f"{protocol}:// cannot be opened here: {error}. Copy the files to a disk, S3, Google "
            "Cloud Storage or Azure"
        ) from None
    except ValueError as error:
        remedy = f". {CREDENTIALS[protocol]}" if protocol in CREDENTIALS else ""
        raise RaypipeError(f"{protocol}:// is not supported here: {error}{remedy}") from None


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a path or URI, and the path on it."""
    protocol, separator, rest = uri.partition("://")
    if not separator:
        return LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
    if protocol in {"file", "local"}:
        return LocalFileSystem(), os.path.abspath(rest)
    fs = remote_filesystem(protocol)
    return fs, fs._strip_protocol(uri)


def single_attempt(uri: str) -> fsspec.AbstractFileSystem:
    """Return the file system of a remote URI, without retries of its own."""
    return remote_filesystem(uri.partition("://")[0], True)


def is_local(uri: str) -> bool:
    """Return whether a path or URI is on a disk of this machine."""
    return isinstance(filesystem(uri)[0], LocalFileSystem)


def join(uri: str, *parts: str) -> str:
    """Return `uri` with path components appended."""
    return "/".join([uri.rstrip("/") if uri != "/" else "", *(part.strip("/") for part in parts)])


def name(uri: str) -> str:
    """Return the last component of a path or URI."""
    return uri.rstrip("/").rsplit("/", 1)[-1]
