"""Sources of very many small files: grouping them into units of work, and reading them ahead."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from raypipe import storage
from raypipe.sources.cuts import Cuts, divide
from raypipe.sources.filesource import FILE_VANISHED
from raypipe.sources.types import RawSample, SourceFile
from raypipe.sources.values import number_or_name

READERS, LOOK_AHEAD = 8, 32
"""Files read at the same time, and files held at most: both hide the latency of object storage."""


class Member(NamedTuple):
    """One small file of a unit of work.

    Attributes
    ----------
    path : str
        The sample's id.
    label : int, str or None
        None if there is no label, or if the path implies it.
    reason : str
        Why the file is not read; "" if it is.
    """

    path: str
    label: int | str | None = None
    reason: str = ""

    def packed(self) -> str:
        """Return the member as text; the path alone if there is neither label nor reason."""
        if self.label is None and not self.reason:
            return self.path
        return "\0".join((self.path, "" if self.label is None else str(self.label), self.reason))


def unpack_member(packed: str) -> Member:
    """Return the member from its text. A label that looks like a number becomes a number."""
    if "\0" not in packed:
        return Member(packed)
    path, label, reason = packed.split("\0")
    return Member(path, number_or_name(label), reason)


def file_runs(
    listed: Iterable[tuple[Member, int, str]], limit: int, cuts: Cuts, salt: str = ""
) -> Iterator[SourceFile]:
    """Divide a listing into runs of neighbouring small files.

    Parameters
    ----------
    listed : iterable of (Member, int, str)
        Member, size in bytes and stamp of each file.
    limit : int
        Maximum number of files in a run.
    cuts : Cuts
        Where runs end. Runs without a change keep their fingerprints and are not processed again.
    salt : str
        Part of every fingerprint.
    """
    for run in divide(listed, lambda file: path_hash(file[0].path), limit, cuts):
        stamps = hashlib.blake2b(salt.encode(), digest_size=12)
        for _, size, stamp in run:
            stamps.update(f"{size}\0{stamp}\0".encode())
        yield SourceFile(
            run[0][0].path,
            sum(size for _, size, _ in run),
            stamps.hexdigest(),
            tuple(member.packed() for member, _, _ in run),
        )


def path_hash(path: str) -> int:
    """Return 64 bits that depend on the path alone."""
    digest = hashlib.blake2b(path.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


ImageBytes = tuple[bytes | None, str]
"""The bytes of an image, and ""; or None and why there are none."""


@dataclass
class _Pending:
    """A member that is being read; `future` is None if it is not read at all."""

    member: Member
    future: Future[ImageBytes] | None

    def sample(self) -> RawSample:
        member = self.member
        image, reason = self.future.result() if self.future is not None else (None, member.reason)
        return RawSample(member.path, image, member.label, reason)


def read_members(
    members: Iterable[tuple[Member, str]], missing: str = FILE_VANISHED
) -> Iterator[RawSample]:
    """Yield the samples of some members, in order, while reading ahead.

    Storage faults raise.

    Parameters
    ----------
    members : iterable of (Member, str)
        Members and their URIs.
    missing : str
        Reject reason of a file that does not exist.
    """
    pending: deque[_Pending] = deque()
    with ThreadPoolExecutor(READERS, thread_name_prefix="raypipe-read") as pool:
        try:
            for member, uri in members:
                future = None if member.reason else pool.submit(_fetch, uri, missing)
                pending.append(_Pending(member, future))
                if len(pending) >= LOOK_AHEAD:
                    yield pending.popleft().sample()
            while pending:
                yield pending.popleft().sample()
        finally:
            for item in pending:
                if item.future is not None:
                    item.future.cancel()


def _fetch(uri: str, missing: str) -> ImageBytes:
    """Read one image. Storage faults raise; anything wrong with the file itself is a reason."""
    try:
        if storage.is_local(uri) and not stat.S_ISREG(os.stat(storage.filesystem(uri)[1]).st_mode):
            return None, "a folder or special file"  # reading a pipe would wait for ever
        return _read_whole(uri), ""
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


def _read_whole(uri: str) -> bytes:
    try:
        return storage.read_bytes(uri, 0)  # one request; without a range, one more for the size
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return storage.read_bytes(uri)  # stores refuse a range of an empty object
