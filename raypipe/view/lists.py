"""The lists of ids that people write on the page, for `select.always_keep` and `never_keep`."""

from __future__ import annotations

import io
import threading
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raypipe import storage
from raypipe.errors import ConfigError
from raypipe.runs.score_stream import read_ids
from raypipe.selection import ALWAYS, NEVER
from raypipe.selection.radix_select import FREE
from raypipe.view.samples import Samples

OPTIONS = {ALWAYS: "always-keep", NEVER: "never-keep"}


@dataclass
class IdFile:
    """A file of ids: text with one id per line, or Parquet.

    Attributes
    ----------
    uri : str
        The file.
    option : str
        The option of the command line that names it, for messages.
    ids : dict of str to None
        Its ids, in order.
    content : bytes or None
        The file as it was last read or written; None before it exists.
    """

    uri: str
    option: str
    ids: dict[str, None] = field(default_factory=dict)
    content: bytes | None = None

    def read(self) -> None:
        """Read the file if it exists. Raises ConfigError if it holds anything but ids."""
        self.content = _content(self.uri)
        if self.content is None:
            return
        ids = read_ids(self.uri, f"--{self.option}")  # refuses a file that cannot be read
        if self._parquet:
            columns = pq.read_schema(pa.BufferReader(self.content)).names
            if columns != ["sample_id"]:
                raise ConfigError(
                    f"--{self.option}: {self.uri} has other columns than sample_id "
                    f"({', '.join(columns)}), which would be lost; name another file"
                )
        self.ids = dict.fromkeys(ids.to_pylist())

    def encoded(self, ids: dict[str, None]) -> bytes:
        """Return the file with other ids.

        Raises
        ------
        ConfigError
            If it cannot hold them, or something else has changed it.
        """
        if _content(self.uri) != self.content:
            raise ConfigError(
                f"{self.uri} was changed by something else; start `raypipe view` again to read it"
            )
        return _parquet(ids) if self._parquet else _text(ids, self.uri)

    def write(self, ids: dict[str, None], data: bytes) -> None:
        """Write the ids, with what `encoded` returned for them."""
        storage.write_bytes(self.uri, data)
        self.ids, self.content = ids, data

    @property
    def _parquet(self) -> bool:
        if self.content:
            return self.content.startswith(b"PAR1")
        return self.uri.endswith(".parquet")


class MarkLists:
    """The marks of all samples, and the files that hold them.

    Parameters
    ----------
    samples : Samples
        The samples of the run.
    always, never : str or None
        URIs of the files. Existing files are read first; ids that the run does not have stay.

    Attributes
    ----------
    marks : numpy.ndarray
        FREE, ALWAYS or NEVER, uint8 [n].
    version : int
        Grows with every change.

    Raises
    ------
    ConfigError
        If a file holds anything but ids, or both hold the same.
    """

    def __init__(self, samples: Samples, always: str | None, never: str | None) -> None:
        self._samples, self._lock = samples, threading.Lock()
        self.files = {
            mark: IdFile(uri, OPTIONS[mark])
            for mark, uri in ((ALWAYS, always), (NEVER, never))
            if uri is not None
        }
        if always is not None and always == never:
            raise ConfigError(
                f"--always-keep and --never-keep are the same file, {always}; name two"
            )
        self.marks = np.full(len(samples), FREE, np.uint8)
        self.version = 0
        for file in self.files.values():
            file.read()
        if len(self.files) == 2 and not self.files[ALWAYS].ids.keys().isdisjoint(
            self.files[NEVER].ids
        ):
            raise ConfigError(f"{always} and {never} share ids; remove each from one of them")
        for mark, file in self.files.items():
            found, _ = samples.ids.find(pa.array(list(file.ids), pa.string()))
            self.marks[found] = mark

    def set(self, rows: np.ndarray, mark: int) -> None:
        """Mark some rows ALWAYS, NEVER or FREE, and write the files that change.

        Raises
        ------
        ConfigError
            If the mark has no file, or the file cannot hold these ids.
        """
        if mark != FREE and mark not in self.files:
            raise ConfigError(
                f"start `raypipe view` with --{OPTIONS[mark]} FILE to write this list"
            )
        ids = dict.fromkeys(self._samples.ids.of_rows(rows))
        with self._lock:
            changes = [
                (file, {name: None for name in file.ids if name not in ids})
                for kind, file in self.files.items()
                if kind != mark and not file.ids.keys().isdisjoint(ids)
            ]  # first, so that no id is ever in both files
            if mark != FREE and not ids.keys() <= self.files[mark].ids.keys():
                changes.append((self.files[mark], self.files[mark].ids | ids))
            encoded = [file.encoded(left) for file, left in changes]
            for (file, left), data in zip(changes, encoded, strict=True):
                file.write(left, data)
            self.marks[rows] = mark
            self.version += 1

    def select_settings(self) -> dict[str, str]:
        """Return the settings of `select` that name the files which exist."""
        return {
            file.option.replace("-", "_"): file.uri
            for file in self.files.values()
            if file.content is not None
        }


def _content(uri: str) -> bytes | None:
    try:
        return storage.read_bytes(uri)
    except FileNotFoundError:
        return None


def _text(ids: dict[str, None], uri: str) -> bytes:
    text = "".join(f"{sample_id}\n" for sample_id in ids)
    data = text.encode()
    if [line for line in data.decode("utf-8-sig").splitlines() if line.strip()] != list(ids):
        raise ConfigError(
            f"{uri}: an id is blank or contains a line break, which a text file cannot hold; start "
            "`raypipe view` with a file that ends in .parquet"
        )
    return data


def _parquet(ids: dict[str, None]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"sample_id": pa.array(list(ids), pa.string())}), buffer)
    return buffer.getvalue()
