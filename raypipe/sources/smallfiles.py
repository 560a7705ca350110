"""Sources of very many small files: what a unit of work lists of each, where a unit ends, and reading ahead."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from raypipe import storage
from raypipe.sources.base import RawSample, SourceFile
from raypipe.sources.common import number_or_name

READERS, LOOK_AHEAD = 8, 32
"""Files read at the same time, and at most so many held: both hide the latency of object storage."""
GONE = "no such file: deleted since it was listed, or its name is not UTF-8"


class Member(NamedTuple):
    """One small file as its unit lists it.

    path    the sample's id
    label   a number or a name; None where there is none, or where the path says it
    reason  why it is not read; "" when it is
    """

    path: str
    label: int | str | None = None
    reason: str = ""

    def packed(self) -> str:
        """As text: the path alone where there is no more to say."""
        if self.label is None and not self.reason:
            return self.path
        return "\0".join((self.path, "" if self.label is None else str(self.label), self.reason))


def unpacked(text: str) -> Member:
    """A member from its text. Names that are numbers come back as numbers."""
    if "\0" not in text:
        return Member(text)
    path, label, reason = text.split("\0")
    return Member(path, number_or_name(label), reason)


def units(
    listed: Iterable[tuple[Member, int, str]], limit: int, salt: str = ""
) -> Iterator[SourceFile]:
    """Runs of neighbouring small files, of each its member, size and stamp.

    A run ends at `limit` files or at a name whose hash says so. A new file therefore changes the run it falls into and seldom the
    runs after it, which keep their fingerprints and are not processed again.
    salt  what all fingerprints depend on besides
    """
    members: list[str] = []
    first, total, stamps = "", 0, hashlib.blake2b(salt.encode(), digest_size=12)
    for member, size, stamp in listed:
        first = first if members else member.path
        members.append(member.packed())
        total += size
        stamps.update(f"{size}\0{stamp}\0".encode())
        if len(members) == limit or path_hash(member.path) % limit == 0:
            yield SourceFile(first, total, stamps.hexdigest(), tuple(members))
            members, total, stamps = [], 0, hashlib.blake2b(salt.encode(), digest_size=12)
    if members:
        yield SourceFile(first, total, stamps.hexdigest(), tuple(members))


def path_hash(path: str) -> int:
    """64 bits that depend on nothing but the path."""
    return int.from_bytes(
        hashlib.blake2b(path.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big"
    )


def read_ahead(members: Iterable[tuple[Member, str]], missing: str = GONE) -> Iterator[RawSample]:
    """The samples of some members, each with its URI, in order; `missing` is the reason of a file that is not there.

    Raises storage faults.
    """
    pending: deque[tuple[Member, Future[tuple[bytes | None, str]] | None]] = deque()

    def sample() -> RawSample:
        member, future = pending.popleft()
        image, reason = future.result() if future is not None else (None, member.reason)
        return RawSample(member.path, image, member.label, reason)

    with ThreadPoolExecutor(READERS, thread_name_prefix="raypipe-read") as pool:
        try:
            for member, uri in members:
                pending.append(
                    (member, None if member.reason else pool.submit(_fetch, uri, missing))
                )
                if len(pending) >= LOOK_AHEAD:
                    yield sample()
            while pending:
                yield sample()
        finally:
            for _, future in pending:
                if future is not None:
                    future.cancel()


def _fetch(uri: str, missing: str) -> tuple[bytes | None, str]:
    """The bytes of one image, or why there are none. Raises storage faults."""
    try:
        if storage.is_local(uri) and not stat.S_ISREG(os.stat(storage.filesystem(uri)[1]).st_mode):
            return None, "a folder or special file"  # reading a pipe would wait for ever
        try:
            return storage.read_bytes(
                uri, 0
            ), ""  # one request; a read without a range asks for the size first
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return storage.read_bytes(uri), ""  # a range of an empty object is refused
    except (FileNotFoundError, NotADirectoryError):
        return None, missing
    except PermissionError as error:
        if not storage.is_local(uri):
            raise  # expired credentials would reject everything
        return None, f"cannot be read: {error.strerror}"
    except IsADirectoryError:
        return None, "a folder or special file"
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP) or not storage.is_local(uri):
            raise
        return None, f"cannot be read: {error.strerror}"
