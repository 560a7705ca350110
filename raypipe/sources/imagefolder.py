"""Image folders: the first folder level below the source's root is the class, deeper levels are allowed.

A folder without levels gives samples without labels, and so does any with `source.label_column: null`. Sample ids are relative paths.
With a class map (`source.class_map`, see
`raypipe.sources.classfile`) the class is that of the longest folder of the path that the map names.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator

from raypipe.config import SourceSettings
from raypipe.errors import SourceError
from raypipe.sources.base import FileScan, Fragment, IdFilter, RawSample, Source, SourceFile
from raypipe.sources.classfile import ClassFile, read_class_file
from raypipe.sources.common import Location
from raypipe.sources.smallfiles import Member, read_ahead, units, unpacked

SPLITS = frozenset({"train", "val", "valid", "validation", "test"})
"""Folders of these names are parts of a dataset, not classes."""


class ImageFolderSource(Source):
    """Files of one image each."""

    format = "imagefolder"
    scan_reads = "nothing"
    reads_singly = True

    def __init__(self, settings: SourceSettings) -> None:
        super().__init__(settings)
        self._location = Location(settings)

    def files(self) -> Iterator[SourceFile]:
        """Runs of neighbouring files, see `units`."""
        self._refuse_splits()
        salt = self._classes.digest if self._classes is not None else ""
        yield from units(self._listed(), self.settings.fragment_samples, salt)

    def scan(self, file: SourceFile) -> FileScan:
        names = self._classes.names if self._classes is not None else None
        labels = (self._labelled(unpacked(member)).label for member in file.members)
        return FileScan(
            self.cut(file, len(file.members)),
            names,
            frozenset(label for label in labels if label is not None),
        )

    def listed_labels(self, file: SourceFile) -> Counter[int | str | None] | None:
        return Counter(self._labelled(unpacked(member)).label for member in file.members)

    def read(self, fragment: Fragment, wanted: IdFilter | None = None) -> Iterator[RawSample]:
        members = (
            self._labelled(unpacked(member))
            for member in fragment.members[fragment.start : fragment.stop]
        )
        return read_ahead(
            (member, self._location.uri(member.path))
            for member in members
            if wanted is None or wanted(member.path)
        )

    def _listed(self) -> Iterator[tuple[Member, int, str]]:
        if self._classes is None:
            for file in self._location.of_format(self.format):
                yield Member(file.path), file.size, file.stamp
            return
        known, unknown = False, ""
        for file in self._location.of_format(self.format):
            label, reason = self._classes.of_path(file.path), ""
            if label is None:
                unknown = file.path.rpartition("/")[0] or file.path
                reason = f"no folder of it is in the class map: {unknown}"
            known |= label is not None
            yield Member(file.path, label, reason), file.size, file.stamp
        if not known:
            raise SourceError(
                f"{self.settings.uri}: no folder (such as {unknown!r}) is in the class map {self.settings.class_map}, which names "
                f"such as {min(self._classes.index)!r}"
            )

    @functools.cached_property
    def _classes(self) -> ClassFile | None:
        if self.settings.class_map is None or self.settings.label_column is None:
            return None
        return read_class_file(self.settings.class_map)

    def _labelled(self, member: Member) -> Member:
        """With the first folder as its label where the unit states no other and labels are wanted."""
        folder, slash, _ = member.path.partition("/")
        told = (
            bool(slash)
            and member.label is None
            and not member.reason
            and self.settings.label_column is not None
        )
        return member._replace(label=folder) if told else member

    def _refuse_splits(self) -> None:
        folders = self._location.folders()
        if folders and all(folder.lower() in SPLITS for folder in folders):
            choices = " or ".join(f"{self.settings.uri.rstrip('/')}/{folder}" for folder in folders)
            raise SourceError(
                f"{self.settings.uri}: {' and '.join(folders)} are not classes; set source.uri to {choices}"
            )
