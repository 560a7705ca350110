"""MosaicML's MDS shards (`streaming`): folders of shards that an `index.json` lists."""

from __future__ import annotations

import posixpath
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from raypipe import storage
from raypipe.config import SourceSettings
from raypipe.errors import RaypipeError, SourceError, StorageError
from raypipe.sources.arrow_images import ImageOrReason
from raypipe.sources.columns import (
    AUTO,
    IMAGE_NAMES,
    LABEL_NAMES,
    NEVER_LABELS,
    ColumnError,
    find_column,
    split_of_rows,
)
from raypipe.sources.filesource import FILE_VANISHED, FileSource, no_content, other_content
from raypipe.sources.formats import has_ending
from raypipe.sources.location import MISSING, Location
from raypipe.sources.mds_shard import (
    NotAShard,
    Shard,
    image_decoder,
    open_shard,
    value_decoder,
)
from raypipe.sources.splits import split_column
from raypipe.sources.table_source import reject_repeated_ids
from raypipe.sources.types import FileScan, Fragment, IdFilter, Preview, RawSample, SourceFile
from raypipe.sources.values import damage_reason, printable, stored_label
from raypipe.storage import FileInfo, Reader

INDEX_FILE = "index.json"
NOT_READABLE = "not a readable MDS shard"


class MdsSource(FileSource):
    """Samples of MDS shards.

    Sample ids are "<relative path of the shard>#<number in the shard>", or the id column's values.
    """

    format = "mds"
    scan_reads = "all"
    random_access = True

    def __init__(self, settings: SourceSettings) -> None:
        super().__init__(settings)
        self._samples_by_folder: dict[str, dict[str, int]] = {}

    def listed(self) -> list[FileInfo]:
        # the index files have to be seen whatever source.include is
        everything = Location(self.settings.model_copy(update={"include": "*"})).listing()
        indexes = _outermost([file.path for file in everything])
        if not indexes:
            if self._location.chooses_files or storage.is_file(self.settings.uri):
                return super().listed()
            raise SourceError(
                f"{self.settings.uri}: no {INDEX_FILE}: the writer of these MDS shards has not "
                "finished; finish it, or name the shards in source.uri with braces"
            )
        files = {file.path: file for file in everything}
        listed = {  # a shard counts once, however often an index names it
            pair: None for index in indexes for pair in _shards_of(self._location.uri(index), index)
        }
        # a shard next to listed ones is what a writer that was killed left; a folder of its own is
        # a dataset that somebody misses
        folders = {posixpath.dirname(path) for path, _ in listed}
        unlisted = [
            path
            for path in files
            if has_ending(path, "mds")
            and posixpath.dirname(path) not in folders
            and self._location.includes(path)
        ]
        if folders and unlisted:
            raise SourceError(
                f"{self.settings.uri}: no {INDEX_FILE} lists the shards in the folder of "
                f"{printable(min(unlisted))}: their writer has not finished; finish it, or choose "
                "the other shards with source.include"
            )
        shards = [
            files.get(path) or files.get(raw) or FileInfo(path, 0, MISSING) for path, raw in listed
        ]
        shards = sorted(file for file in shards if self._location.includes(file.path))
        if not listed:
            raise SourceError(
                f"{self.settings.uri}: {INDEX_FILE} lists no shard; write the dataset again"
            )
        if not shards:
            raise SourceError(
                f"{self.settings.uri}: no shard in {INDEX_FILE} matches source.include = "
                f"{self.settings.include!r}; correct it"
            )
        if all(file.stamp == MISSING for file in shards):
            raise SourceError(
                f"{self.settings.uri}: none of the {len(shards)} shards in {INDEX_FILE} exists, "
                f"such as {printable(shards[0].path)}"
            )
        return shards

    def scan(self, file: SourceFile) -> FileScan:
        if file.stamp == MISSING:
            return self.unreadable_file(file, f"no such file, although {INDEX_FILE} lists it")
        return super().scan(file)

    def scan_stored(self, file: SourceFile, stored: Reader) -> FileScan:
        labels: set[int | str] = set()
        try:
            shard = open_shard(stored, file.path)
            columns = choose(shard.columns, self.settings)
            split = _split_of(stored, shard, columns, range(len(shard)))
        except ColumnError as error:
            return self.unreadable_file(file, error)
        except Exception as error:
            return self.unreadable_file(file, f"{NOT_READABLE}: {damage_reason(stored, error)}")
        if columns.label is not None:
            samples = _samples(stored, shard, columns, file.path, range(len(shard)))
            labels = {sample.label for sample in samples if sample.label is not None}
        fragments = self.cut_fragments(file, len(shard))
        listed = self._listed_samples(posixpath.dirname(file.path)).get(file.path, 0)
        if listed > len(shard):
            reason = f"{INDEX_FILE} lists {listed:,} samples, but the shard has {len(shard):,}"
            fragments = (*fragments, self.unreadable_rest(file, len(shard), reason))
        return FileScan(fragments, None, frozenset(labels), self.checked_split(split))

    def _listed_samples(self, folder: str) -> dict[str, int]:
        """Return the number of samples that the index in a folder lists, by path of the shard.

        A merged dataset has such an index in every folder. Empty without an index.
        """
        if folder not in self._samples_by_folder:
            prefix = f"{folder}/" if folder else ""
            samples: dict[str, int] = {}
            try:
                index = storage.read_json(self._location.uri(prefix + INDEX_FILE))
                for shard in index["shards"]:
                    for kind in ("raw_data", "zip_data"):
                        if shard.get(kind):
                            samples[prefix + shard[kind]["basename"]] = int(shard["samples"])
            except StorageError:
                raise
            except (FileNotFoundError, NotADirectoryError, RaypipeError):
                pass
            except (KeyError, TypeError, ValueError, AttributeError):
                samples = {}  # the listing reports what is wrong with an index
            self._samples_by_folder[folder] = samples
        return self._samples_by_folder[folder]

    def read(self, fragment: Fragment, keep_id: IdFilter | None = None) -> Iterator[RawSample]:
        if not fragment.samples:
            return
        samples = self._read(fragment, keep_id)
        yield from reject_repeated_ids(samples) if self.settings.id_column else samples

    def preview(
        self, file: SourceFile, places: int, each: int, draw: random.Random, whole: bool
    ) -> Preview:
        if whole or file.stamp == MISSING:
            return super().preview(file, places, each, draw, whole)
        if reason := no_content(file):
            return Preview(error=reason)
        try:
            opened = self.open(file.path)
        except FileNotFoundError:
            return Preview(error=FILE_VANISHED)
        with opened as stored:
            if reason := other_content(file, stored):
                return Preview(error=reason)
            try:
                shard = open_shard(stored, file.path)
                columns = choose(shard.columns, self.settings)
                numbers = sorted(draw.sample(range(len(shard)), min(len(shard), places * each)))
                split = _split_of(stored, shard, columns, numbers)
            except ColumnError as error:
                return Preview(error=str(error))
            except Exception as error:
                return Preview(error=f"{NOT_READABLE}: {damage_reason(stored, error)}")
            drawn = tuple(_samples(stored, shard, columns, file.path, numbers))
        labels = Counter(sample.label for sample in drawn if not sample.reason)
        split = self.checked_split(split)
        return Preview(drawn, len(shard), True, labels, split=split)

    def _read(self, fragment: Fragment, keep_id: IdFilter | None) -> Iterator[RawSample]:
        path = fragment.path
        numbers: Sequence[int] = range(fragment.start, fragment.stop)
        if keep_id is not None and self.settings.id_column is None:
            numbers = [number for number in numbers if keep_id(f"{path}#{number}")]
        reason = "the shard has fewer samples than when it was indexed"
        samples: Iterator[RawSample] = iter(())
        with self.open(path) as stored:
            try:
                shard = open_shard(stored, path)
                columns = choose(shard.columns, self.settings)
            except ColumnError as error:
                reason = str(error)
            except Exception as error:
                reason = f"{NOT_READABLE}: {damage_reason(stored, error)}"
            else:
                there = [number for number in numbers if number < len(shard)]
                numbers = numbers[len(there) :]
                samples = _samples(stored, shard, columns, path, there)
            for sample in samples:
                if keep_id is None or keep_id(sample.sample_id):
                    yield sample
        for number in numbers:
            sample_id = f"{path}#{number}"
            if keep_id is None or keep_id(sample_id):
                yield RawSample(sample_id, None, None, reason)


@dataclass(frozen=True)
class Columns:
    """Names of the columns; None if labels are not read, or if ids are numbers."""

    image: str
    label: str | None
    identity: str | None


def choose(encodings: dict[str, str], settings: SourceSettings) -> Columns:
    """Return the columns that the settings name or `auto` finds.

    Raises
    ------
    ColumnError
        If a column is missing, ambiguous or of an unsuitable encoding.
    """
    image, label = settings.image_column, settings.label_column
    identity, names = settings.id_column, list(encodings)
    if image == AUTO:
        image = find_column(
            names,
            "image",
            IMAGE_NAMES,
            accepts=lambda name: image_decoder(encodings[name]) is not None,
            suggests=lambda name: image_decoder(encodings[name]) is not None,
            wrong_type=lambda name: _wrong_encoding(encodings, name, "image"),
            is_text=lambda name: encodings[name] == "str",
        )
    if label == AUTO:
        others = {image, identity}
        label = find_column(
            names,
            "label",
            LABEL_NAMES,
            accepts=lambda name: value_decoder(encodings[name]) is not None and name not in others,
            suggests=lambda name: "int" in encodings[name],
            wrong_type=lambda name: _wrong_encoding(encodings, name, "label"),
            is_text=lambda name: encodings[name] == "str",
            excluded=others | {name for name in names if name.lower() in NEVER_LABELS},
        )
    for kind, name, decoder in (
        ("image", image, image_decoder),
        ("label", label, value_decoder),
        ("id", identity, value_decoder),
    ):
        if name is None:
            continue
        if name not in encodings:
            raise ColumnError(
                f"there is no column {name!r}; columns are {', '.join(encodings)}; "
                f"set source.{kind}_column"
            )
        if decoder(encodings[name]) is None or (kind == "id" and "float" in encodings[name]):
            raise ColumnError(_wrong_encoding(encodings, name, kind))
    return Columns(image, label, identity)


def _wrong_encoding(encodings: dict[str, str], column: str, kind: str) -> str:
    return (
        f"column {column!r} is encoded as {encodings[column]}, which is not read as {kind}; "
        f"set source.{kind}_column"
    )


def _samples(
    stored: Reader, shard: Shard, columns: Columns, path: str, numbers: Sequence[int]
) -> Iterator[RawSample]:
    """Yield the samples with these numbers."""
    decode_image = image_decoder(shard.columns[columns.image])
    assert decode_image is not None  # `choose` has checked it
    for number in numbers:
        sample_id = f"{path}#{number}"
        image: ImageOrReason
        label: int | str | None = None
        try:
            values = shard.sample(number)
            if columns.identity is not None:
                stored_id = _decoded(shard, columns.identity, values)
                sample_id = printable(str(stored_id))
            if columns.label is not None:
                label, reason = stored_label(_decoded(shard, columns.label, values))
                image = decode_image(values[columns.image]) if not reason else (None, reason)
            else:
                image = decode_image(values[columns.image])
        except NotAShard as error:
            image = None, str(error)
        except Exception as error:
            image = None, f"the sample cannot be read: {damage_reason(stored, error)}"
        yield RawSample(sample_id, image[0], label, image[1])


def _split_of(stored: Reader, shard: Shard, columns: Columns, numbers: Sequence[int]) -> str:
    """Return the split that the samples with these numbers name; "" if they name none.

    Raises
    ------
    ColumnError
        If they name several.
    """
    column = split_column([*shard.columns], {columns.image, columns.label, columns.identity})
    decode = value_decoder(shard.columns[column]) if column is not None else None
    if column is None or decode is None:
        return ""
    values = set()
    for number in numbers:
        try:
            values.add(decode(shard.sample(number)[column]))
        except Exception as error:  # reading the sample makes it a reject
            damage_reason(stored, error)
    return split_of_rows(values)


def _decoded(shard: Shard, column: str, values: dict[str, bytes]) -> Any:
    decode = value_decoder(shard.columns[column])
    assert decode is not None  # `choose` has checked it
    return decode(values[column])


def _outermost(paths: Sequence[str]) -> list[str]:
    """Return the index files that lie below the folder of no other.

    The index of merged datasets lists the shards of all folders below it, which have their own.
    """
    indexes = [path for path in paths if storage.name(path) == INDEX_FILE]
    folders = {path.removesuffix(INDEX_FILE) for path in indexes}
    return [
        path
        for path in indexes
        if not any(path.startswith(folder) and path != folder + INDEX_FILE for folder in folders)
    ]


def _shards_of(uri: str, index: str) -> list[tuple[str, str]]:
    """Return the relative paths of the shards that an index lists, compressed and raw."""
    folder = index.removesuffix(INDEX_FILE)
    try:
        shards = storage.read_json(uri)["shards"]
        pairs = []
        for shard in shards:
            if shard["format"] != "mds":
                raise SourceError(
                    f"{uri}: shards of the format {shard['format']}; only mds is read; write them "
                    "with MDSWriter"
                )
            raw = shard["raw_data"]["basename"]
            packed = shard["zip_data"]["basename"] if shard.get("zip_data") else raw
            pairs.append((packed, raw))
    except (KeyError, TypeError) as error:
        raise SourceError(
            f"{uri}: not the index of MDS shards: no {error}; "
            "source.uri must be a folder that MDSWriter wrote"
        ) from None
    except RaypipeError:
        raise
    except OSError as error:
        raise SourceError(f"{uri}: cannot be read: {error}") from None
    for name in (name for pair in pairs for name in pair):
        if not isinstance(name, str) or not name or {"", ".", ".."} & set(name.split("/")):
            raise SourceError(f"{uri}: {name!r} is not a path in this folder")
    return [(folder + packed, folder + raw) for packed, raw in pairs]
