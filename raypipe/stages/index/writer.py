"""Write the index files of a run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from raypipe import storage
from raypipe.config import SourceSettings
from raypipe.errors import SourceError
from raypipe.runs.ledger import content_hash
from raypipe.runs.rejects import SHOWN_FILES, UnreadableFiles, nothing_readable
from raypipe.runs.run import Run
from raypipe.runs.sizes import INDEX_FILE_FRAGMENTS, INDEX_FILE_MEMBERS
from raypipe.sources import ClassMap, StatedNames
from raypipe.sources.classes import (
    LabelSpellings,
    lone_classes_note,
    names_note,
    refuse_missing_labels,
    sparse_classes_note,
)
from raypipe.sources.noise import LabelNoise, requested_noise
from raypipe.sources.splits import SplitOfFiles
from raypipe.stages.index.classes import settle_classes, write_classes
from raypipe.stages.index.listing import OrderedDigest
from raypipe.stages.index.rows import CUT_FILE_ID, SCHEMA, IndexRow, limit_samples


@dataclass(frozen=True)
class WrittenIndex:
    """A finished index: what the ledger records of it, and a note on the classes, or ""."""

    detail: dict[str, Any]
    note: str


class IndexWriter:
    """Writes index files one after the other, up to the limit of samples, and sums them up.

    An index file is named after its content. So what an interrupted attempt wrote is reused, and
    stays apart from other content.

    Attributes
    ----------
    samples : int
        Samples in the index so far.
    """

    def __init__(
        self,
        run: Run,
        settings: SourceSettings,
        labels_by_name: bool,
        fields_in_samples: bool = False,
    ) -> None:
        self._run, self._settings, self._labels_by_name = run, settings, labels_by_name
        self._fields_in_samples = fields_in_samples
        self._old = {name for name in storage.names(run.index_folder) if name != "classes.json"}
        self._written: set[str] = set()
        # the index file being filled
        self._rows: list[IndexRow] = []
        self._members = 0
        # the whole index
        self._listing, self._content = OrderedDigest(), OrderedDigest()
        self._labels: set[int | str] = set()
        self._stated = StatedNames(labels_by_name)
        self._last_stated = ""
        self._split = SplitOfFiles()
        self._spellings = LabelSpellings()
        self._problems: list[tuple[str, str]] = []
        self._tally = UnreadableFiles()
        self._counts = {"files": 0, "fragments": 0, "unreadable_files": 0, "bytes": 0}
        self.samples = 0

    @property
    def full(self) -> bool:
        """Whether the limit of samples is reached."""
        return self._settings.limit is not None and self.samples >= self._settings.limit

    def add(self, file_id: str, size: int, rows: list[IndexRow]) -> None:
        """Add the next file of the listing.

        Raises
        ------
        SourceError
            When its class names, its split or its spelling of labels contradict those of the files
            before it.
        """
        self._listing.add(file_id)
        self._counts["files"] += 1
        self._counts["bytes"] += size
        limit = self._settings.limit
        limited = list(limit_samples(rows, None if limit is None else limit - self.samples))
        if limited != rows:
            limited = [{**row, "file_id": CUT_FILE_ID} for row in limited]
        self._tally.add(size, limited)
        for row in limited:
            self._add_row(row)
        if len(self._rows) >= INDEX_FILE_FRAGMENTS or self._members >= INDEX_FILE_MEMBERS:
            self._flush()

    def _add_row(self, row: IndexRow) -> None:
        self._content.add(row["fragment_id"])
        self.samples += row["stop"] - row["start"]
        if row["error"]:
            self._counts["unreadable_files"] += 1
            if len(self._problems) < SHOWN_FILES:
                self._problems.append((row["path"], row["error"]))
        else:
            self._counts["fragments"] += 1
            self._split.add(row["path"], row.get("split") or "")  # none in indices up to 0.2.0
            self._check_class_names(row)
        if row["labels"] != "[]":
            labels = json.loads(row["labels"])
            self._labels.update(labels)
            # not in indices up to 0.2.0
            self._spellings.add(row["path"], labels, (row.get("padded") or "").split())
        self._rows.append(row)
        self._members += len(row["members"])

    def _check_class_names(self, row: IndexRow) -> None:
        if row["class_names"]:
            if row["class_names"] != self._last_stated:
                self._last_stated = row["class_names"]
                self._stated.add(row["path"], tuple(json.loads(row["class_names"])), ())
        elif row["labels"] != "[]":
            self._stated.add(row["path"], None, json.loads(row["labels"]))

    def _flush(self) -> None:
        """Write the index file being filled, unless it exists."""
        content = content_hash(json.dumps(row, sort_keys=True) for row in self._rows)
        name = f"fragments-{len(self._written):05d}-{content}.parquet"
        if name not in self._old:
            table = pa.Table.from_pylist(self._rows, schema=SCHEMA)
            storage.write_table(self._run.index_file(name), table)
        self._written.add(name)
        self._rows, self._members = [], 0

    def close(self) -> WrittenIndex:
        """Finish the index.

        Raises
        ------
        SourceError
            When nothing can be read.
        RejectError
            When too much is in files that cannot be read.
        """
        if self._rows:
            self._flush()
        if not self.samples:
            self._run.clear("index")
            raise SourceError(nothing_readable(self._settings.uri, self._problems))
        if self._fields_in_samples:
            refuse_missing_labels(self._settings, self._labels)
        classes, note = self._classes()
        note = "; ".join(filter(None, (note, *self._notes_on(classes))))
        noise = self._noise(classes)
        write_classes(self._run, dataclasses.replace(classes, noise=noise))
        for name in self._old - self._written:
            storage.delete(self._run.index_file(name))
        self._tally.check(self._settings.max_reject_fraction)
        detail = {
            "listing": self._listing.text(),
            "content": self._content.text(),
            "classes": len(classes.names),
            **self._counts,
            "limited": self.full,
        }
        if noise is not None:
            detail["inject_noise"] = dataclasses.asdict(noise)
        return WrittenIndex(detail, note)

    def _notes_on(self, classes: ClassMap) -> Iterator[str]:
        """Yield warnings of labels that are probably not what they seem; some can be ""."""
        occur = self._labels if self._stated.names is None else classes.names
        yield lone_classes_note(self.samples, len(occur))
        yield names_note(classes.names)
        if self._labels and self._stated.names is None and self._settings.num_classes is None:
            yield sparse_classes_note(self._labels, len(classes.names))

    def _classes(self) -> tuple[ClassMap, str]:
        """Return the classes of the run, and a note on them; without labels, clusters."""
        if self._settings.label_column is None:
            return ClassMap((), numeric=False, clusters=True), ""
        return settle_classes(
            self._run,
            self._stated.names,
            frozenset(self._labels),
            self._settings.num_classes,
            self._labels_by_name,
            self._spellings.mixed,
        )

    def _noise(self, classes: ClassMap) -> LabelNoise | None:
        """Return the label noise of the settings. Raises SourceError with less than 2 classes."""
        noise = requested_noise(self._settings)
        if noise is not None and len(classes.names) < 2:
            self._run.clear("index")
            raise SourceError(
                f"source.inject_noise: {self._settings.uri} has {len(classes.names)} classes, so "
                "no label can be replaced by another; leave it out, or use a source with labels"
            )
        return noise
