"""Image folders: the first folder level below the source's root is the class.

Deeper levels are allowed. A folder without levels gives samples without labels, and so does any
folder with `source.label_column: null`. Sample ids are relative paths.

With a class map (`source.class_map`, see `raypipe.sources.classfile`), the class is that of the
longest folder of the path that the map names.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator

from raypipe.config import SourceSettings
from raypipe.errors import SourceError
from raypipe.sources.base import Source
from raypipe.sources.classfile import ClassFile, read_class_file
from raypipe.sources.formats import LeftOut
from raypipe.sources.location import Location
from raypipe.sources.smallfiles import Member, file_runs, read_members, unpack_member
from raypipe.sources.splits import several_splits, split_folders
from raypipe.sources.types import FileScan, Fragment, IdFilter, RawSample, SourceFile


class ImageFolderSource(Source):
    """Files of one image each."""

    format = "imagefolder"
    scan_reads = "nothing"
    random_access = True

    def __init__(self, settings: SourceSettings) -> None:
        super().__init__(settings)
        self._location = Location(settings)

    @property
    def left_out(self) -> dict[str, LeftOut]:
        return self._location.left_out

    def files(self) -> Iterator[SourceFile]:
        """Yield runs of neighbouring files (see `file_runs`)."""
        self._refuse_splits()
        salt = self._classes.digest if self._classes is not None else ""
        yield from file_runs(self._listed(), self.settings.fragment_samples, self.cuts, salt)

    def scan(self, file: SourceFile) -> FileScan:
        names = self._classes.names if self._classes is not None else None
        labels = (self._with_label(unpack_member(member)).label for member in file.members)
        return FileScan(
            self.cut_fragments(file, len(file.members)),
            names,
            frozenset(label for label in labels if label is not None),
        )

    def listed_labels(self, file: SourceFile) -> Counter[int | str | None] | None:
        return Counter(self._with_label(unpack_member(member)).label for member in file.members)

    def read(self, fragment: Fragment, keep_id: IdFilter | None = None) -> Iterator[RawSample]:
        members = (
            self._with_label(unpack_member(member))
            for member in fragment.members[fragment.start : fragment.stop]
        )
        return read_members(
            (member, self._location.uri(member.path))
            for member in members
            if keep_id is None or keep_id(member.path)
        )

    def _listed(self) -> Iterator[tuple[Member, int, str]]:
        """Member, size and stamp of each file, with its label if there is a class map."""
        if self._classes is None:
            for file in self._location.stream_format(self.format):
                yield Member(file.path), file.size, file.stamp
            return
        any_mapped, unmapped = False, ""
        for file in self._location.stream_format(self.format):
            label, reason = self._classes.of_path(file.path), ""
            if label is None:
                unmapped = file.path.rpartition("/")[0] or file.path
                reason = f"the class map names no folder of it: {unmapped}"
            any_mapped |= label is not None
            yield Member(file.path, label, reason), file.size, file.stamp
        if not any_mapped:
            raise SourceError(
                f"{self.settings.uri}: no folder (such as {unmapped!r}) is in the class map "
                f"{self.settings.class_map}, which names folders such as "
                f"{min(self._classes.index)!r}; fix source.class_map"
            )

    @functools.cached_property
    def _classes(self) -> ClassFile | None:
        if self.settings.class_map is None or self.settings.label_column is None:
            return None
        return read_class_file(self.settings.class_map)

    def _with_label(self, member: Member) -> Member:
        """Label a member with its first folder, unless the unit states a label or reason.

        It is unchanged if the settings say that labels are not read.
        """
        folder, in_folder, _ = member.path.lstrip("/").partition("/")
        if (
            in_folder
            and member.label is None
            and not member.reason
            and self.settings.label_column is not None
        ):
            return member._replace(label=folder)
        return member

    def _refuse_splits(self) -> None:
        folders = self._location.folders()
        splits = split_folders(folders)
        # a single one next to other folders can be a class, such as that of railway trains
        if splits and (len(splits) == len(folders) or several_splits(splits) is not None):
            choices = " or ".join(f"{self.settings.uri.rstrip('/')}/{folder}" for folder in splits)
            raise SourceError(
                f"{self.settings.uri}: {' and '.join(splits)} are not classes; "
                f"set source.uri to {choices}"
            )
        if len(folders) == 1 and self._classes is None and self.settings.label_column is not None:
            self._refuse_only_folder(folders[0])

    def _refuse_only_folder(self, folder: str) -> None:
        """Raise SourceError if the only folder holds the folders of the classes."""
        inner = self._location.folders(folder)
        if len(inner) > 1:
            raise SourceError(
                f"{self.settings.uri}: its only folder, {folder!r}, would be the only class; the "
                f"classes seem to be its {len(inner)} folders, such as {inner[0]!r}: set "
                f"source.uri to {self.settings.uri.rstrip('/')}/{folder}"
            )
