"""Groups of tar members that share a key, read front to back.

The standard library's reader takes a damaged header for the end of the archive and would drop what follows; this one says
what is damaged and goes on at the next good header.
"""

from __future__ import annotations

import gzip
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from raypipe.sources.common import damage
from raypipe.storage import Reader

BLOCK = 512
LARGEST_NAME = 1 << 20
"""Bytes of an extended header; a larger one is damage, or an attack."""

_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)
_NO_CONTENT = {
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
}
_REGULAR = {tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE}
_EXTENDED = {
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.XGLTYPE,
}

Load = Callable[[str, str, int], bool]
"""(key, extension, bytes) -> whether the member's content is wanted."""


@dataclass
class Group:
    """Consecutive members with one key.

    offset    of the first member's header, where reading may begin
    names     extension -> name of the member in the tar, in order
    contents  extension -> content of the members that were wanted
    reason    why the group cannot be trusted; "" when nothing is wrong with it
    """

    key: str
    offset: int
    names: dict[str, str] = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)
    reason: str = ""


def groups(file: Reader, offset: int, compressed: bool, load: Load) -> Iterator[Group]:
    """The groups of a tar from a header at `offset` on. Where the tar is damaged, the group before the damage has a reason.

    Links, devices, absolute names and names with '..' are never followed; their group has a reason. Members without an
    extension, hidden ones and folders belong to no sample. Raises storage faults only.
    """
    group: Group | None = None
    for member in _Members(file, offset, compressed):
        if member.problem:
            group = group or Group(f"byte-{member.offset}", member.offset)
            group.reason = group.reason or member.problem
            continue
        key, extension, unsafe = _parse(member.name, member.type)
        if not key:
            continue
        if group is None or group.key != key or extension in group.names:
            if group is not None:
                yield group
            group = Group(key, member.offset)
        group.reason = group.reason or unsafe
        group.names[extension] = member.name
        if not group.reason and load(key, extension, member.size):
            content = member.read()
            if content is not None:  # else the next item says what is wrong
                group.contents[extension] = content
    if group is not None:
        yield group


def _parse(name: str, type: bytes) -> tuple[str, str, str]:
    """Key, extension and what is dangerous; an empty key for what belongs to no sample."""
    if type == tarfile.DIRTYPE or name.endswith("/"):
        return "", "", ""
    unsafe = ""
    if type not in _REGULAR:
        unsafe = f"{name}: a link or special file, which is not followed"
    elif name.startswith("/") or ".." in name.split("/"):
        unsafe = f"{name}: a path out of the tar, which is not followed"
    while name.startswith("./"):
        name = name[2:]
    found = _KEY.fullmatch(name)
    if found is not None:
        return found[1], found[2].lower(), unsafe
    return (name if unsafe else ""), "", unsafe


@dataclass
class _Member:
    name: str
    type: bytes
    size: int
    offset: int
    read: Callable[[], bytes | None]
    problem: str = ""


class _Members:
    """The members of a tar one after the other; damage and a missing end are items with a `problem`."""

    def __init__(self, file: Reader, offset: int, compressed: bool) -> None:
        self._stream: Reader | _Gunzip = _Gunzip(file) if compressed else file
        self._size = None if compressed else file.seek(0, 2)
        self._position = offset
        self._seek(offset)

    def __iter__(self) -> Iterator[_Member]:
        ended, start = False, self._position
        damaged_at: int | None = None
        reported = False
        overrides: dict[str, str] = {}
        while True:
            header_at = self._position
            block = self._read(BLOCK)
            if len(block) < BLOCK:
                if not ended and (block.strip(b"\0") or not block):
                    yield _problem(
                        header_at,
                        "the tar is cut off in or after this sample: its end marker is missing",
                    )
                return
            if not block.strip(b"\0"):
                ended, start = True, self._position
                continue
            header = _header(block)
            if header is None:
                damaged_at = header_at if damaged_at is None else damaged_at
                overrides, start = {}, self._position
            # What follows the end marker is only damage when there is a header after it
            if damaged_at is not None and not reported and (header is not None or not ended):
                yield _problem(
                    damaged_at,
                    f"the tar is damaged in or after this sample: bad header at byte {damaged_at}",
                )
                reported = True
            if header is None:
                continue
            ended, damaged_at, reported = False, None, False
            size = header.size
            if header.type in _EXTENDED:
                content = self._read(size)
                if len(content) < size:
                    yield _problem(start, "the tar is cut off in or after this sample")
                    return
                self._seek(header_at + BLOCK + _padded(size))
                overrides |= _extension(header.type, content)
                continue
            size = _number(overrides.get("size"), size)
            name = overrides.get("path", header.name)
            type = (
                b"S" if any(field.startswith("GNU.sparse") for field in overrides) else header.type
            )
            size = 0 if type in _NO_CONTENT else size
            data_at, whole = self._position, [True]

            def read(
                data_at: int = data_at, size: int = size, whole: list[bool] = whole
            ) -> bytes | None:
                content = self._read(size)
                whole[0] = len(content) == size and self._position == data_at + size
                return content if whole[0] else None

            yield _Member(name, type, size, start, read)
            if not whole[0] or not self._seek(data_at + _padded(size)):
                yield _problem(header_at, "the tar is cut off in this sample")
                return
            overrides, start = {}, self._position

    def _read(self, size: int) -> bytes:
        """Up to `size` bytes; fewer at the end and where the compression is damaged."""
        if self._size is not None:
            size = max(0, min(size, self._size - self._position))
        content = self._stream.read(size)
        self._position += len(content)
        return content

    def _seek(self, position: int) -> bool:
        """Go forward to a byte. False when the tar ends before it."""
        self._position = self._stream.seek(position)
        return self._position == position and (self._size is None or position <= self._size)


class _Gunzip:
    """A gzip file read forward; it ends where the compression is damaged.

    Unpacked in steps of fixed size, so that a damaged file ends at the same byte however it is read.
    """

    STEP = 1 << 16

    def __init__(self, file: Reader) -> None:
        self._file, self._unpacked = file, gzip.GzipFile(fileobj=file, mode="rb")
        self._held, self._used, self._position, self._ended = b"", 0, 0, False

    def read(self, size: int) -> bytes:
        parts = []
        while size > 0 and (self._used < len(self._held) or self._step()):
            part = self._held[self._used : self._used + size]
            parts.append(part)
            self._used += len(part)
            size -= len(part)
        content = b"".join(parts)
        self._position += len(content)
        return content

    def seek(self, position: int) -> int:
        """Go forward as far as there are bytes; where that is."""
        while self._position < position and self.read(min(self.STEP, position - self._position)):
            pass
        return self._position

    def _step(self) -> bool:
        if not self._ended:
            try:
                self._held, self._used = self._unpacked.read1(self.STEP), 0
                self._ended = not self._held
            except (OSError, EOFError, zlib.error) as error:
                damage(self._file, error)
                self._ended = True
        return not self._ended


def _problem(offset: int, problem: str) -> _Member:
    return _Member("", b"", 0, offset, lambda: None, problem)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _number(text: str | None, default: int) -> int:
    return int(text) if text is not None and text.isdecimal() and len(text) < 19 else default


def _header(block: bytes) -> tarfile.TarInfo | None:
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError, OverflowError):
        return None
    largest = LARGEST_NAME if header.type in _EXTENDED else 1 << 62
    return header if 0 <= header.size <= largest else None


def _extension(type: bytes, content: bytes) -> dict[str, str]:
    """What an extended header says of the next member: its path, its size."""
    if type == tarfile.GNUTYPE_LONGNAME:
        return {"path": content.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    if type not in {tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE}:
        return {}
    result, position = {}, 0
    while found := re.compile(rb"(\d{1,7}) ([^=\n]+)=").match(content, position):
        end = position + int(found[1])
        if end <= found.end() or end > len(content):
            break
        result[found[2].decode("utf-8", "replace")] = content[found.end() : end - 1].decode(
            "utf-8", "surrogateescape"
        )
        position = end
    return result
