"""Image folders: the first folder level below the source's root is the class.

Deeper levels are allowed. A folder without levels gives samples without labels, and so does any
folder with `source.label_column: null`. Sample ids are relative paths.

With a class map (`source.class_map`, see `raypipe.sources.classfile`), the class is that of the
longest folder of the path that the map names.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from raypipe.config import SourceSettings
from raypipe.errors import SourceError
from raypipe.sources.base import Source
from raypipe.sources.classes import shown_names
from raypipe.sources.classfile import ClassFile, read_class_file
from raypipe.sources.formats import LeftOut, copied_name
from raypipe.sources.location import Location
from raypipe.sources.smallfiles import Member, file_runs, read_members, unpack_member
from raypipe.sources.splits import several_splits, split_folders
from raypipe.sources.types import FileScan, Fragment, IdFilter, RawSample, SourceFile

_KINDS = {
    **dict.fromkeys(("images", "image", "imgs", "img", "jpegimages"), "images"),
    **dict.fromkeys(("masks", "mask", "annotations", "annotation", "labels", "depth"), "other"),
    **dict.fromkeys(("segmentationclass", "segmentationobject", "imagesets"), "other"),
}
"""Usual names of folders that hold one kind of file, in lower case -> images or other."""
_UNLABELLED = {"unlabeled", "unlabelled", "unsup", "extra"}
"""Names of folders, next to those of splits, with images that have no class."""
_FOLD = re.compile(r"(?:k?fold|cv|cv[-_ ]?fold)[-_ ]?\d+", re.IGNORECASE)
"""Name of a part of a dataset that is divided for cross-validation."""
_PORTION = re.compile(
    rf"{_FOLD.pattern}|\d{{4}}-\d\d(?:-\d\d)?|20\d{{6}}"
    r"|(?:train|val|test|batch|chunk|part|partition|shard|split|subset|set)[-_ ]?\d+"
    r"|(?:run|session|day|week|site|cam|camera)[-_ ]?\d+",
    re.IGNORECASE,
)
"""Name of a part of a dataset if it holds class folders: a fold, a date, or a number."""


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
        others = {folder.lower() for folder in folders} - {folder.lower() for folder in splits}
        # a single one next to other folders can be a class, such as that of railway trains
        if splits and (others <= _UNLABELLED or several_splits(splits) is not None):
            choices = " or ".join(f"{self.settings.uri.rstrip('/')}/{folder}" for folder in splits)
            raise SourceError(
                f"{self.settings.uri}: {' and '.join(splits)} are not classes; "
                f"set source.uri to {choices}"
            )
        if self._classes is None and self.settings.label_column is not None:
            self._refuse_copies(folders)
        if folders and self._classes is None and self.settings.include == "*":
            self._refuse_folders_of_kinds(folders)
            self._refuse_portions(folders)
            self._refuse_inner_folders(folders)

    def _refuse_copies(self, folders: Sequence[str]) -> None:
        """Raise SourceError if a folder would be a class, but its name says that it is a copy."""
        for folder in folders:
            if copied_name(folder) != folder and copied_name(folder) in folders:
                raise SourceError(
                    f"{self.settings.uri}: {folder!r} would be a class, but seems to be a copy of "
                    f"{copied_name(folder)!r}; remove or rename it"
                )

    def _refuse_folders_of_kinds(self, folders: Sequence[str]) -> None:
        """Raise SourceError if the folders are called after what they hold: images and masks."""
        kinds = {folder: _KINDS.get(folder.lower()) for folder in folders}
        images = [folder for folder, kind in kinds.items() if kind == "images"]
        if len(folders) > 1 and len(images) == 1 and all(kinds.values()):
            raise SourceError(
                f"{self.settings.uri}: {' and '.join(folders)} are not classes; set source.uri to "
                f"{self.settings.uri.rstrip('/')}/{images[0]}"
            )

    def _refuse_portions(self, folders: Sequence[str]) -> None:
        """Raise SourceError if each folder is a part of the dataset, with classes of its own."""
        portions = len(folders) > 1 and all(map(_PORTION.fullmatch, folders))
        if not portions or self.settings.label_column is None:
            return
        shared = sorted(
            set(self._location.folders(folders[0])) & set(self._location.folders(folders[1]))
        )
        uri, first = self.settings.uri.rstrip("/"), folders[0]
        if len(shared) > 1:
            raise SourceError(
                f"{self.settings.uri}: {shown_names(folders)} are not classes: each has the "
                f"folders {shown_names(shared)}. To read one, set source.uri to {uri}/{first}; to "
                "read all, set source.class_map to a JSON file with the number of each folder's "
                f'class, such as {{"{first}/{shared[0]}": 0}}'
            )
        if all(map(_FOLD.fullmatch, folders)):
            raise SourceError(
                f"{self.settings.uri}: {shown_names(folders)} are not classes but parts for "
                "cross-validation, without folders of classes in them. Set source.uri to a list of "
                "the images with their labels, or source.label_column to null and "
                "pseudo_labels.clusters to a number"
            )

    def _refuse_inner_folders(self, folders: Sequence[str]) -> None:
        """Raise SourceError if a folder that would be a class holds classes or splits."""
        inner, folder = self._location.folders(folders[0]), folders[0]
        splits = several_splits(split_folders(inner))
        if splits is not None and len(folders) > 1:
            raise SourceError(
                f"{self.settings.uri}: {folder} has folders of several splits: "
                f"{', '.join(split_folders(inner))}; set source.include to a pattern of one split, "
                f"such as '*/{split_folders(inner)[0]}/*'"
            )
        if len(folders) == 1 and len(inner) > 1 and self.settings.label_column is not None:
            raise SourceError(
                f"{self.settings.uri}: its only folder, {folder!r}, would be the only class; the "
                f"classes seem to be its {len(inner)} folders, such as {inner[0]!r}: set "
                f"source.uri to {self.settings.uri.rstrip('/')}/{folder}"
            )
