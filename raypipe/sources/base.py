"""`Source`, the base class of all formats."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import islice
from typing import Any, ClassVar, Literal

from raypipe.config import SourceSettings
from raypipe.config.base import Settings
from raypipe.config.parts import NoOptions, validated_options
from raypipe.plugins import SOURCE
from raypipe.sources.cuts import Cuts
from raypipe.sources.formats import LeftOut
from raypipe.sources.types import FileScan, Fragment, IdFilter, Preview, RawSample, SourceFile
from raypipe.text import error_text


class Source(abc.ABC):
    """A dataset in one format.

    To add a format, write one module in `raypipe.sources` with a subclass that defines the class
    attribute `format` and the three abstract methods:

    `files`
        List the files without opening any.
    `scan`
        Open one file, count its samples and divide it into fragments of at most
        `settings.fragment_samples` samples (`cut_fragments` does that).
    `read`
        Yield the samples of one fragment, in order.

    Then register it: one line in `raypipe/sources/__init__.py`, its name in the `format` choices
    of `raypipe/config/source.py`, the settings that it uses in `used_settings.py`, and a rule in
    `raypipe/sources/detect.py` if `format: auto` should recognise it. Add a writer of the format to
    `tests/stages/test_same_scores.py`, which holds all formats to the same pixels and scores.

    Formats whose files hold many samples each should start from `FileSource`, which lists and
    opens the files; tables of rows and columns from `TableSource`, which also finds the image and
    label columns.

    Three rules keep a source safe to use on a cluster:

    - Every worker builds its own source from the settings. Keep no open files and no state that
      another process would need.
    - Reading is repeatable: `read` yields the same samples, with the same ids, for the same
      fragment on every machine. Ids are unique within the source and do not depend on
      `fragment_samples`.
    - Damaged content never raises. A file that cannot be opened as this format becomes one
      fragment with `error` (`unreadable_file`); a damaged sample is yielded with `image=None` and
      a `reason`. Storage faults (network, credentials, disk) do raise, so that the task is retried
      rather than its samples rejected.

    Parameters
    ----------
    settings : SourceSettings
        The section `source` of the configuration.

    Attributes
    ----------
    format : str
        Name of the format in the settings.
    summary : str
        What it reads, in a few words; a source from outside raypipe needs it.
    Options : type of Settings
        Options of a source from outside raypipe, which stand in `source.options` under its name.
    options : Settings
        An instance of `Options`.
    scan_reads : {"nothing", "part", "all"}
        How much of a file `scan` reads; "nothing" if the listing already contains everything that
        a scan reports. Used by cost estimates.
    random_access : bool
        Whether `read` with `keep_id` fetches only the chosen samples, without reading those in
        between.
    labels_by_name : bool
        Whether `read` yields class names, not numbers, if a file states distinct names. Files can
        then number the same classes differently.
    fields_in_samples : bool
        Whether every sample names its own fields, so that no file states which columns exist.
    cuts : Cuts
        Where `files` divides a listing of small files; an existing index sets the rule that it was
        written by.

    Examples
    --------
    A complete source for `.npz` files with an array `images` (uint8 [n, height, width, 3]) and an
    array `labels` (int [n]) each:

    >>> class NpzSource(Source):
    ...     format = "npz"
    ...
    ...     def files(self):
    ...         for info in Location(self.settings).listing():
    ...             yield SourceFile(info.path, info.size, info.stamp)
    ...
    ...     def scan(self, file):
    ...         try:
    ...             labels = self._load(file.path)["labels"]
    ...         except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
    ...             return self.unreadable_file(file, error)
    ...         fragments = self.cut_fragments(file, len(labels))
    ...         return FileScan(fragments, labels=frozenset(labels.tolist()))
    ...
    ...     def read(self, fragment, keep_id=None):
    ...         if not fragment.samples:
    ...             return
    ...         arrays = self._load(fragment.path)
    ...         images, labels = arrays["images"], arrays["labels"]
    ...         for row in range(fragment.start, fragment.stop):
    ...             sample_id = f"{fragment.path}#{row}"
    ...             if keep_id is None or keep_id(sample_id):
    ...                 yield RawSample(sample_id, images[row], int(labels[row]))
    ...
    ...     def _load(self, path):
    ...         uri = Location(self.settings).uri(path)
    ...         return np.load(io.BytesIO(storage.read_bytes(uri)), allow_pickle=False)
    """

    format: ClassVar[str]
    summary: ClassVar[str]
    Options: ClassVar[type[Settings]] = NoOptions
    scan_reads: ClassVar[Literal["nothing", "part", "all"]] = "part"
    random_access: ClassVar[bool] = False
    labels_by_name: ClassVar[bool] = False
    fields_in_samples: ClassVar[bool] = False
    cuts: Cuts = Cuts.LOWEST_HASH

    def __init__(self, settings: SourceSettings) -> None:
        self.settings = settings
        self.options: Any = NoOptions()
        if self.Options is not NoOptions:
            self.options = validated_options(type(self), SOURCE, self.format, settings.options)

    def resolved_settings(self, image_size: int = 0) -> SourceSettings:
        """Return the settings with `auto` and defaults replaced by what they mean for this source.

        The driver calls this once, so that workers need not inspect the source themselves.

        Parameters
        ----------
        image_size : int
            Side in pixels to which images will be decoded; sources that store several sizes pick
            one accordingly.

        Raises
        ------
        SourceError
        """
        return self.settings.model_copy(update={"format": self.format})

    @property
    def left_out(self) -> dict[str, LeftOut]:
        """Files that the last call of `files` left out as they belong to no format, by ending.

        Complete when `files` has been read to its end.
        """
        return {}

    @property
    def ids_can_repeat(self) -> bool:
        """Whether ids come from the data, so that two samples can share one, not from paths."""
        return self.settings.id_column is not None

    @abc.abstractmethod
    def files(self) -> Iterator[SourceFile]:
        """Yield all files, in a stable order, without opening any.

        Raises
        ------
        SourceError
            If there are no files.
        """

    @abc.abstractmethod
    def scan(self, file: SourceFile) -> FileScan:
        """Open one file just far enough to count its samples and divide it into fragments.

        A fragment has at most `settings.fragment_samples` samples. A file that cannot be read
        gives one fragment without samples and with `error` set (see `unreadable_file`). Only
        storage faults raise.
        """

    @abc.abstractmethod
    def read(self, fragment: Fragment, keep_id: IdFilter | None = None) -> Iterator[RawSample]:
        """Yield the samples of a fragment, in order.

        Parameters
        ----------
        fragment : Fragment
            One of those that `scan` returned.
        keep_id : callable, optional
            Yield only samples whose id passes, if possible without reading the images of others.

        Yields
        ------
        RawSample
            Without `keep_id`, exactly `fragment.samples` of them; unreadable samples have a
            `reason`.
        """

    def listed_labels(self, file: SourceFile) -> Counter[int | str | None] | None:
        """Count the stored labels (None: no label) of a file if they are known without opening it.

        Returns None if they are not.
        """
        return None

    def preview(
        self, file: SourceFile, places: int, each: int, draw: random.Random, whole: bool
    ) -> Preview:
        """Read samples from random places of one file, and whatever else it reveals cheaply.

        Parameters
        ----------
        file : SourceFile
        places : int
            Number of random places to read from.
        each : int
            Maximum number of neighbouring samples read at each place.
        draw : random.Random
            Source of randomness.
        whole : bool
            The file is small: count everything, and draw `places * each` single samples from all
            of it.
        """
        scan = self.scan(file)
        error = next((fragment.error for fragment in scan.fragments if fragment.error), "")
        fragments = [fragment for fragment in scan.fragments if fragment.samples]
        if whole or self.random_access:
            drawn = self._draw_single(fragments, places * each, draw)
        else:
            drawn = self._draw_runs(fragments, places, each, draw)
        labels = self.listed_labels(file)
        if labels is None:
            labels = Counter(sample.label for sample in drawn if not sample.reason)
        total = sum(fragment.samples for fragment in fragments)
        return Preview(
            tuple(drawn), total, True, labels, scan.class_names, error, scan.split, scan.padded
        )

    def _draw_single(
        self, fragments: Sequence[Fragment], count: int, draw: random.Random
    ) -> list[RawSample]:
        """Up to `count` single samples from all fragments."""
        ids = _IdCollector()
        for fragment in fragments:
            for _ in self.read(fragment, ids):  # ids keeps no sample: this yields none
                pass
        chosen = set(draw.sample(list(ids.seen), min(len(ids.seen), count)))
        return [
            sample for fragment in fragments for sample in self.read(fragment, chosen.__contains__)
        ]

    def _draw_runs(
        self, fragments: Sequence[Fragment], places: int, each: int, draw: random.Random
    ) -> list[RawSample]:
        """Return the first `each` samples of up to `places` fragments."""
        drawn: list[RawSample] = []
        for fragment in draw.sample(fragments, min(len(fragments), places)):
            with closing(self.read(fragment)) as samples:  # type: ignore[type-var]
                drawn += islice(samples, each)
        return drawn

    def unreadable_file(self, file: SourceFile, error: object) -> FileScan:
        """Return the scan of a file that cannot be read."""
        reason = error_text(error)
        fragment_id = self.fragment_id(file, 0, 0)
        fragment = Fragment(fragment_id, file.path, 0, 0, members=file.members, error=reason)
        return FileScan((fragment,))

    def unreadable_rest(self, file: SourceFile, samples: int, error: object) -> Fragment:
        """Return the last fragment of a file that can be read up to a number of samples."""
        (rest,) = self.unreadable_file(file, f"from row {samples} on: {error}").fragments
        fragment_id = self.fragment_id(file, samples, samples)
        return dataclasses.replace(rest, fragment_id=fragment_id, start=samples, stop=samples)

    def cut_fragments(
        self, file: SourceFile, samples: int, bounds: Sequence[int] = ()
    ) -> tuple[Fragment, ...]:
        """Divide a file into fragments.

        Parameters
        ----------
        file : SourceFile
        samples : int
            Number of samples in the file.
        bounds : sequence of int
            Preferred cuts in ascending order, such as the ends of row groups. The last one within
            reach of `settings.fragment_samples` is used.
        """
        limit, start, result = self.settings.fragment_samples, 0, []
        while start < samples:
            stop = min(start + limit, samples)
            inside = [bound for bound in bounds if start < bound <= stop]
            stop = inside[-1] if inside else stop
            fragment_id = self.fragment_id(file, start, stop)
            result.append(Fragment(fragment_id, file.path, start, stop, members=file.members))
            start = stop
        return tuple(result)

    def fragment_id(self, file: SourceFile, start: int, stop: int) -> str:
        """Return a name that is a valid file name on any storage.

        It begins with something readable and ends with a hash of everything that identifies the
        content.
        """
        identity = "\0".join(
            (
                self.format,
                file.path,
                str(file.size),
                file.stamp,
                str(start),
                str(stop),
                *file.members,
            )
        )
        digest = hashlib.blake2b(
            identity.encode("utf-8", "surrogateescape"), digest_size=8
        ).hexdigest()
        stem = file.path.rsplit("/", 1)[-1].split(".", 1)[0]
        readable = re.sub(r"[^A-Za-z0-9]+", "-", stem).strip("-")[:40]
        return f"{readable or 'file'}-{start:07d}-{digest}"


class _IdCollector:
    """An `IdFilter` that keeps no sample and remembers the ids it was asked about, in order."""

    def __init__(self) -> None:
        self.seen: dict[str, None] = {}

    def __call__(self, sample_id: str) -> bool:
        self.seen[sample_id] = None
        return False
