"""Read and write stored files piece by piece."""

from __future__ import annotations

import contextlib
import io
import os
import uuid
from typing import IO, Any

from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractBufferedFile

from raypipe.storage.faults import explaining, retrying
from raypipe.storage.fences import passed
from raypipe.storage.places import filesystem


class Reader(io.BufferedReader):
    """A stored file that is open for reading.

    Attributes
    ----------
    fault : Exception or None
        The storage fault that ended a read. Libraries for file formats also raise OSError for
        damaged content; `fault` distinguishes the two.
    """

    raw: Ranges

    @property
    def fault(self) -> Exception | None:
        return self.raw.fault

    def end_at(self, position: int) -> bool:
        """Treat `position` as the end of the file. Return whether the file is longer than that."""
        return self.raw.end_at(position)


class Ranges(io.RawIOBase):
    """A stored file as a raw stream without read-ahead. Every read is retried."""

    def __init__(self, file: Any, uri: str) -> None:
        self._file, self._uri = file, uri
        self._whole = self._size = int(file.seek(0, os.SEEK_END))
        self._position = 0
        self.fault: Exception | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = max(
            0,
            offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence],
        )
        return self._position

    def tell(self) -> int:
        return self._position

    def end_at(self, position: int) -> bool:
        self._size = min(position, self._whole)
        return self._size < self._whole

    def readinto(self, buffer: Any) -> int:
        length = min(len(buffer), self._size - self._position)
        if length <= 0:
            return 0
        try:
            data = retrying(lambda: self._fetch(length), self._uri)
        except Exception as error:
            self.fault = error
            raise
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _fetch(self, length: int) -> bytes:
        self._file.seek(self._position)
        data = self._file.read(length)
        if len(data) < length and isinstance(self._file, AbstractBufferedFile):
            raise OSError(f"{length:,} bytes were requested, but {len(data):,} received")
        return data

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


class Upload:
    """A file written piece by piece. It appears when the `with` block ends without an error."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._fs, self._path = filesystem(uri)
        self._local = isinstance(self._fs, LocalFileSystem)

    def __enter__(self) -> IO[bytes]:
        if self._local:
            with explaining(self._uri, writing=True):
                self._temporary = temporary_of(self._path)
                self._file: Any = open(self._temporary, "wb")
        else:
            self._file = self._fs.open(self._path, "wb", autocommit=False)
        return self._file

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: object
    ) -> None:
        if value is not None:
            with contextlib.suppress(Exception):  # the original error is the one to report
                self._discard()
            if isinstance(value, OSError):
                with explaining(self._uri):
                    raise value
            return
        try:
            with explaining(self._uri, writing=True):
                self._finish()
        except BaseException:
            with contextlib.suppress(Exception):
                self._discard()
            raise

    def _finish(self) -> None:
        if getattr(self._fs, "commits_on_close", False):
            with passed(self._uri):
                try:
                    self._file.close()
                except RuntimeError as error:  # adlfs 2026.8.0 wraps the error of the store in it
                    raise (error.__cause__ or error) from None
            return
        if not self._local:
            self._file.close()
            with passed(self._uri):
                self._file.commit()
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        with passed(self._uri):
            os.replace(self._temporary, self._path)

    def _discard(self) -> None:
        if not self._local:
            try:
                self._file.discard()  # removes the parts sent so far
            finally:
                self._file.closed = True  # otherwise it sends the rest when it is garbage collected
            return
        try:
            self._file.close()
        finally:
            if os.path.exists(self._temporary):
                os.unlink(self._temporary)


def temporary_of(path: str) -> str:
    """Return a hidden temporary name next to a local file, and create the folder if necessary."""
    folder, base = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    return os.path.join(folder, f".{base[:100]}.{uuid.uuid4().hex}")
