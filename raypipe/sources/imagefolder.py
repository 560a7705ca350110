"""Image folders: the first folder level below the source's root is the class, deeper levels are allowed.

A folder without levels gives samples without labels. Sample ids are relative paths.
"""

from __future__ import annotations

import errno
import hashlib
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from raypipe import storage
from raypipe.config import SourceSettings
from raypipe.sources.base import FileScan, Fragment, RawSample, Source, SourceFile, Wanted
from raypipe.sources.common import Location
from raypipe.storage import FileInfo

READERS, LOOK_AHEAD = 8, 32
"""Files read at the same time, and at most so many held: both hide the latency of object storage."""


class ImageFolderSource(Source):
    """Files of one image each."""

    format = "imagefolder"
    scan_reads = "nothing"
    reads_singly = True

    def __init__(self, settings: SourceSettings) -> None:
        super().__init__(settings)
        self._location = Location(settings)

    def files(self) -> Iterator[SourceFile]:
        """Runs of neighbouring files.

        A run ends at `fragment_samples` files or at a name whose hash says so. A new file therefore changes the run it
        falls into and seldom the runs after it, which keep their fingerprints and are not processed again.
        """
        run: list[FileInfo] = []
        for file in self._location.files(self.format):
            run.append(file)
            if len(run) == self.settings.fragment_samples or _ends_run(file.path, self.settings.fragment_samples):
                yield _unit(run)
                run = []
        if run:
            yield _unit(run)

    def scan(self, file: SourceFile) -> FileScan:
        labels = {label for label in map(_label, file.members) if label is not None}
        return FileScan(self.cut(file, len(file.members)), None, frozenset(labels))

    def listed_labels(self, file: SourceFile) -> Counter[int | str | None] | None:
        return Counter(map(_label, file.members))

    def read(self, fragment: Fragment, wanted: Wanted | None = None) -> Iterator[RawSample]:
        members = fragment.members[fragment.start : fragment.stop]
        paths = iter([path for path in members if wanted is None or wanted(path)])
        pending: deque[tuple[str, Future[tuple[bytes | None, str]]]] = deque()
        with ThreadPoolExecutor(READERS, thread_name_prefix="raypipe-read") as pool:
            try:
                for path in paths:
                    pending.append((path, pool.submit(_fetch, self._location.uri(path))))
                    if len(pending) >= LOOK_AHEAD:
                        yield _sample(*pending.popleft())
                while pending:
                    yield _sample(*pending.popleft())
            finally:
                for _, future in pending:
                    future.cancel()


def _ends_run(path: str, limit: int) -> bool:
    digest = hashlib.blake2b(path.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % limit == 0


def _unit(run: list[FileInfo]) -> SourceFile:
    digest = hashlib.blake2b(digest_size=12)
    for file in run:
        digest.update(f"{file.size}\0{file.stamp}\0".encode())
    return SourceFile(run[0].path, sum(file.size for file in run), digest.hexdigest(), tuple(file.path for file in run))


def _label(path: str) -> str | None:
    folder, slash, _ = path.partition("/")
    return folder if slash else None


def _fetch(uri: str) -> tuple[bytes | None, str]:
    """The bytes of one image, or why there are none. Raises storage faults."""
    try:
        try:
            return storage.read_bytes(uri, 0), ""  # one request; a read without a range asks for the size first
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return storage.read_bytes(uri), ""  # a range of an empty object is refused
    except FileNotFoundError:
        return None, "no such file: deleted since it was listed, or its name is not UTF-8"
    except PermissionError as error:
        if not storage.is_local(uri):
            raise  # expired credentials would reject everything
        return None, f"cannot be read: {error.strerror}"
    except IsADirectoryError:
        return None, "a folder, not a file"


def _sample(path: str, future: Future[tuple[bytes | None, str]]) -> RawSample:
    image, reason = future.result()
    return RawSample(path, image, _label(path), reason)
