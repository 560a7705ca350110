"""Read tar files from front to back, as groups of members that share a key.

The standard library's reader takes a damaged header for the end of the archive and would drop
everything after it. This one reports the damage and continues at the next valid header.
"""

from __future__ import annotations

import gzip
import re
import tarfile
import zlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field

from raypipe.sources.formats import HEAD_BYTES, format_of
from raypipe.sources.values import damage_reason
from raypipe.storage import Reader, hidden

BLOCK = 512
MAX_EXTENSION_BYTES = 1 << 20
"""Bytes of an extended header; a larger one is damage, or an attack."""

_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)
_PAX_RECORD = re.compile(rb"(\d{1,7}) ([^=\n]+)=")
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
_SPARSE = b"S"

LoadMember = Callable[[str, str, int], bool]
"""A function (key, extension, bytes) -> whether to read the member's content."""


@dataclass
class Group:
    """Consecutive members with one key.

    Attributes
    ----------
    key : str
    offset : int
        Byte of the first member's header, at which reading can begin.
    names : dict of str to str
        Extension -> name of the member in the tar, in order.
    contents : dict of str to bytes
        Extension -> content, of the members that were loaded.
    reason : str
        Why the group cannot be trusted; "" if nothing is wrong with it.
    """

    key: str
    offset: int
    names: dict[str, str] = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)
    reason: str = ""


def read_groups(file: Reader, offset: int, compressed: bool, load: LoadMember) -> Iterator[Group]:
    """Yield the groups of a tar from a header on.

    If the tar is damaged, the group before the damage has a reason. Links, devices, absolute names
    and names with '..' are never followed; their group has a reason. A member without an extension
    belongs to the sample of its name, with the extension "", if its content is an image. Others,
    hidden members and folders belong to no sample. Only storage faults raise.

    Parameters
    ----------
    file : Reader
    offset : int
        Byte of the (uncompressed) tar at which to begin.
    compressed : bool
        Whether the file is compressed with gzip.
    load : callable
        Decides which members to load.
    """
    group: Group | None = None
    for item in _Members(file, offset, compressed):
        if isinstance(item, _Problem):
            group = group or Group(f"byte-{item.offset}", item.offset)
            group.reason = group.reason or item.reason
            continue
        key, extension, unsafe = _parse_name(item.name, item.type)
        key = key or _key_of_image(item)
        if not key or (not unsafe and hidden(key)):
            continue
        if group is None or group.key != key or extension in group.names:
            if group is not None:
                yield group
            group = Group(key, item.offset)
        group.reason = group.reason or unsafe
        group.names[extension] = item.name
        if not group.reason and load(key, extension, item.size):
            content = item.read()
            if content is not None:  # otherwise the next item is the problem
                group.contents[extension] = content
    if group is not None:
        yield group


def _parse_name(name: str, type: bytes) -> tuple[str, str, str]:
    """Key, extension and why following the member would be unsafe.

    The key is empty if the member belongs to no sample.
    """
    if type == tarfile.DIRTYPE or name.endswith("/"):
        return "", "", ""
    unsafe = ""
    if type not in _REGULAR:
        unsafe = f"{name}: a link or special file, which is not followed"
    elif name.startswith("/") or ".." in name.split("/"):
        unsafe = f"{name}: a path out of the tar, which is not followed"
    while name.startswith("./"):
        name = name[2:]
    match = _KEY.fullmatch(name)
    if match is not None:
        return match[1], match[2].lower(), unsafe
    return (name if unsafe else ""), "", unsafe


def _key_of_image(member: _Member) -> str:
    """Return the name of a member without an extension if its content is an image, else ""."""
    name = member.name.removeprefix("./")
    if member.type not in _REGULAR or "." in name.rpartition("/")[2] or name.endswith("/"):
        return ""
    return name if format_of(member.peek(HEAD_BYTES)) == "imagefolder" else ""


@dataclass(frozen=True)
class _Problem:
    """Damage, or a missing end, at a byte of the tar."""

    offset: int
    reason: str


@dataclass
class _Member:
    """One member of a tar. `read` works until the next member is requested.

    Attributes
    ----------
    name : str
    type : bytes
        As in `tarfile.TarInfo`.
    size : int
        Bytes of content.
    offset : int
        Byte of its first header, which is an extended one if it has any.
    data_at : int
        Byte of its content.
    cut_off : bool
        Whether `read` met the end of the tar.
    head : bytes
        The first bytes of the content, if `peek` has read them.
    """

    tar: _Members
    name: str
    type: bytes
    size: int
    offset: int
    data_at: int
    cut_off: bool = False
    head: bytes = b""

    def peek(self, size: int) -> bytes:
        """Return the first bytes of the content; b"" if the tar ends within them."""
        content = self.tar.read_content(self.data_at, min(size, self.size))
        self.head, self.cut_off = content or b"", content is None
        return self.head

    def read(self) -> bytes | None:
        """Return the content; None if the tar ends within it."""
        read = len(self.head)
        content = self.tar.read_content(self.data_at + read, self.size - read)
        self.cut_off = content is None
        return None if content is None else self.head + content


class _Members:
    """The members of a tar, one after the other, with the problems between them.

    `_start` is where the headers of the next member begin, and `_overrides` are the fields that its
    extended headers replace.
    """

    def __init__(self, file: Reader, offset: int, compressed: bool) -> None:
        self._stream: Reader | _Gunzip = _Gunzip(file) if compressed else file
        self._size = None if compressed else file.seek(0, 2)
        self._position = offset
        self._seek(offset)
        self._start = self._position
        self._overrides: dict[str, str] = {}

    def __iter__(self) -> Iterator[_Member | _Problem]:
        while (header := (yield from self._next_header())) is not None:
            if header.type in _EXTENDED:
                if not self._read_extension(header):
                    yield _Problem(self._start, "the tar is cut off in or after this sample")
                    return
                continue
            header_at = self._position - BLOCK
            member = self._member(header)
            yield member
            if member.cut_off or not self._seek(member.data_at + _padded(member.size)):
                yield _Problem(header_at, "the tar is cut off in this sample")
                return
            self._begin_member()

    def _next_header(self) -> Generator[_Problem, None, tarfile.TarInfo | None]:
        """Skip to the next valid header and return it; None at the end of the tar.

        Yields the damage that was skipped, once. Blocks after an end marker (zeros) are damage only
        if a header follows them, so reporting those waits for it.
        """
        after_end_marker = damaged = False
        unreported: _Problem | None = None
        while True:
            position = self._position
            block = self._read(BLOCK)
            if len(block) < BLOCK:
                if not after_end_marker and (block.strip(b"\0") or not block):
                    yield _Problem(
                        position,
                        "the tar is cut off in or after this sample: its end marker is missing",
                    )
                return None
            if not block.strip(b"\0"):
                after_end_marker, self._start = True, self._position
                continue
            header = _parse_header(block)
            if header is not None:
                if unreported is not None:
                    yield unreported
                return header
            self._begin_member()
            if not damaged:
                damaged = True
                problem = _Problem(
                    position,
                    f"the tar is damaged in or after this sample: bad header at byte {position}",
                )
                if after_end_marker:
                    unreported = problem
                else:
                    yield problem

    def _begin_member(self) -> None:
        """Note that the next header begins a member."""
        self._overrides, self._start = {}, self._position

    def _read_extension(self, header: tarfile.TarInfo) -> bool:
        """Read an extended header. False if the tar ends within it."""
        data_at = self._position
        content = self._read(header.size)
        if len(content) < header.size:
            return False
        self._seek(data_at + _padded(header.size))
        self._overrides |= _extension(header.type, content)
        return True

    def _member(self, header: tarfile.TarInfo) -> _Member:
        """Return the member of a header and of the extended headers before it."""
        overrides = self._overrides
        is_sparse = any(name.startswith("GNU.sparse") for name in overrides)
        type = _SPARSE if is_sparse else header.type
        size = 0 if type in _NO_CONTENT else _number(overrides.get("size"), header.size)
        name = overrides.get("path", header.name)
        return _Member(self, name, type, size, self._start, self._position)

    def read_content(self, data_at: int, size: int) -> bytes | None:
        """Return `size` bytes, at byte `data_at`; None if the tar ends within them."""
        content = self._read(size)
        whole = len(content) == size and self._position == data_at + size
        return content if whole else None

    def _read(self, size: int) -> bytes:
        """Up to `size` bytes; fewer at the end, or if the compression is damaged."""
        if self._size is not None:
            size = max(0, min(size, self._size - self._position))
        content = self._stream.read(size)
        self._position += len(content)
        return content

    def _seek(self, position: int) -> bool:
        """Go forward to a byte. False if the tar ends before it."""
        self._position = self._stream.seek(position)
        return self._position == position and (self._size is None or position <= self._size)


class _Gunzip:
    """A gzip file read forward; it ends where the compression is damaged.

    It is decompressed in steps of fixed size, so that a damaged file ends at the same byte however
    it is read.
    """

    STEP = 1 << 16

    def __init__(self, file: Reader) -> None:
        self._file, self._gzip = file, gzip.GzipFile(fileobj=file, mode="rb")
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
        """Go forward to a byte, or to the end if that is before it; return the position."""
        while self._position < position and self.read(min(self.STEP, position - self._position)):
            pass
        return self._position

    def _step(self) -> bool:
        """Decompress the next step. False at the end."""
        if not self._ended:
            try:
                self._held, self._used = self._gzip.read1(self.STEP), 0
                self._ended = not self._held
            except (OSError, EOFError, zlib.error) as error:
                damage_reason(self._file, error)
                self._ended = True
        return not self._ended


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _number(text: str | None, default: int) -> int:
    return int(text) if text is not None and text.isdecimal() and len(text) < 19 else default


def _parse_header(block: bytes) -> tarfile.TarInfo | None:
    """Return the header in a block; None if it is damaged."""
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError, OverflowError):
        return None
    limit = MAX_EXTENSION_BYTES if header.type in _EXTENDED else 1 << 62
    return header if 0 <= header.size <= limit else None


def _extension(type: bytes, content: bytes) -> dict[str, str]:
    """Return the fields, such as path and size, that an extended header sets for its member."""
    if type == tarfile.GNUTYPE_LONGNAME:
        return {"path": content.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    if type not in {tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE}:
        return {}
    fields, position = {}, 0
    while record := _PAX_RECORD.match(content, position):
        end = position + int(record[1])
        if end <= record.end() or end > len(content):
            break
        name = record[2].decode("utf-8", "replace")
        fields[name] = content[record.end() : end - 1].decode("utf-8", "surrogateescape")
        position = end
    return fields
