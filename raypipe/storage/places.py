"""A path or URI -> its filesystem, and the path on that."""

from __future__ import annotations

import functools
import os

import fsspec
from fsspec.implementations.local import LocalFileSystem

from raypipe.errors import RaypipeError


@functools.cache
def _remote(protocol: str, once: bool = False) -> fsspec.AbstractFileSystem:
    """The filesystem of a protocol; `once`, of S3: one whose requests are not retried."""
    try:
        if protocol in {"s3", "s3a"}:
            from raypipe.storage.s3 import s3

            return s3(once)
        return fsspec.filesystem(protocol, use_listings_cache=False, skip_instance_cache=True)
    except (ImportError, ValueError) as error:
        raise RaypipeError(f"{protocol}:// is not supported here: {error}") from None


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of a path or URI and the path on it."""
    protocol, separator, rest = uri.partition("://")
    if not separator:
        return LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
    if protocol in {"file", "local"}:
        return LocalFileSystem(), os.path.abspath(rest)
    fs = _remote(protocol)
    return fs, fs._strip_protocol(uri)


def single_attempt(uri: str) -> fsspec.AbstractFileSystem:
    """The filesystem of a URI that is not local, without retries of its own where it has any."""
    return _remote(uri.partition("://")[0], True)


def is_local(uri: str) -> bool:
    """Whether a path or URI is on this machine's disk."""
    return isinstance(filesystem(uri)[0], LocalFileSystem)


def join(uri: str, *parts: str) -> str:
    """`uri` with path parts appended."""
    return "/".join([uri.rstrip("/") if uri != "/" else "", *(part.strip("/") for part in parts)])


def name(uri: str) -> str:
    """The last part of a path or URI."""
    return uri.rstrip("/").rsplit("/", 1)[-1]
