"""Decode images once: in tasks to RUN/evaluation/pixels/, and from there to arrays on each node.

No Ray.

A unit is a fragment of the source or of the test set. Its file has `image`, the bytes of uint8
[3, size, size], and `label`. The arrays of a node are memory-mapped: one copy serves all trainings
on the node, and is as fast as memory if it fits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raypipe import storage
from raypipe.config import SourceSettings
from raypipe.errors import ResourceError, SourceError, StageError
from raypipe.evaluation.held_out import options_named
from raypipe.runs.duplicates import reject_duplicates
from raypipe.runs.ledger import content_hash, fingerprint
from raypipe.runs.run import Run
from raypipe.selection.hashing import canonical_hashes
from raypipe.sources import ClassMap, Fragment, StatedNames, class_map, open_source
from raypipe.sources.classes import MatchedClasses, match_classes
from raypipe.sources.cuts import Cuts
from raypipe.sources.splits import SplitOfFiles
from raypipe.vision.decode import decode_batch
from raypipe.vision.fitting import statistics_of
from raypipe.vision.own_code import transform_of

MAX_SHARE = 0.8
"""Share of a node's memory, and of its free disk for temporary files, that arrays can take."""
TRAIN, TEST = "train", "test"
"""Parts of the data."""
COMPLETE = "complete"
"""File that marks finished arrays; it holds the statistics of the training part."""


def bytes_needed(samples: int, size: int, channels: int = 3) -> int:
    """Return the bytes of decoded images."""
    return samples * channels * size * size


def check_room(
    samples: int, size: int, available: float, what: str = "memory", channels: int = 3
) -> None:
    """Raise ResourceError if the images do not fit into `available` bytes of a node."""
    needed = bytes_needed(samples, size, channels)
    if needed > MAX_SHARE * available:
        raise ResourceError(
            f"every node that trains holds all {samples:,} images (training and test), decoded at "
            f"{size} pixels: {needed / 2**30:.1f} GiB. The smallest node has "
            f"{available / 2**30:.1f} GiB of {what}, and {MAX_SHARE:.0%} of it can be used. Lower "
            "image_size, use larger nodes, or evaluate a smaller run (source.limit)"
        )


@dataclass(frozen=True)
class DecodeUnit:
    """A fragment to decode.

    Attributes
    ----------
    part
        train or test.
    number
        Position among the units of its part.
    fragment
        What is read. A fragment of the run's source has no members here; they are in the index.
    """

    part: str
    number: int
    fragment: Fragment

    @property
    def file(self) -> str:
        """Name of the file with its images."""
        return _unit_file(self.part, self.number)


def _unit_file(part: str, number: int) -> str:
    return f"{part}-{number:06d}.parquet"


class UnitCounts(TypedDict):
    """Decoded samples of a unit, and those that were left out; stored as JSON."""

    samples: int
    left_out: int


@dataclass(frozen=True)
class TestSet:
    """What is tested on.

    Attributes
    ----------
    source, fragments
        The samples.
    classes
        Its classes as classes of the run.
    without_own
        Whether samples that the run scored are left out.
    unreadable
        Path and error of each file that cannot be read and is left out.
    """

    __test__ = False  # tells pytest that this is not a test

    source: SourceSettings
    fragments: tuple[Fragment, ...]
    classes: MatchedClasses
    without_own: bool
    unreadable: tuple[tuple[str, str], ...] = ()

    @property
    def digest(self) -> str:
        """Hash of what is tested on."""
        names = content_hash(fragment.fragment_id for fragment in self.fragments)
        places = [] if self.classes.same_numbers else [list(self.classes.places)]
        return fingerprint(
            names, sum(fragment.samples for fragment in self.fragments), self.without_own, *places
        )


def list_test_set(source: SourceSettings, run_source: SourceSettings, classes: ClassMap) -> TestSet:
    """List the fragments of a test set, and match its classes with those of the run.

    If it is at the same URI and of the same split as the run's source, samples that the run scored
    are left out. Elsewhere, equal ids do not mean equal images.

    Raises
    ------
    SourceError
        If the test set has no readable samples, or its classes cannot be matched.
    """
    with options_named():
        return _listed_test_set(source, run_source, classes)


def _listed_test_set(
    source: SourceSettings, run_source: SourceSettings, classes: ClassMap
) -> TestSet:
    opened = open_source(source)
    opened.cuts = Cuts.MARKED  # evaluations are stored by a digest of the fragments
    readable: list[Fragment] = []
    unreadable: list[tuple[str, str]] = []
    stated, labels = StatedNames(opened.labels_by_name), set[int | str]()
    split = SplitOfFiles()
    for file in opened.files():
        scan = opened.scan(file)
        good = [item for item in scan.fragments if item.samples and not item.error]
        if good:
            stated.add(file.path, scan.class_names, scan.labels)
            split.add(file.path, scan.split)
        readable += good
        unreadable += [(item.path, item.error) for item in scan.fragments if item.error]
        labels |= scan.labels
    fragments = tuple(_first(readable, source.limit))
    if not fragments:
        reason = f" ({': '.join(unreadable[0])})" if unreadable else ""
        raise SourceError(f"{source.uri}: the test set has no readable samples{reason}")
    try:
        matched = match_classes(classes, class_map(stated.names, frozenset(labels), None))
    except SourceError as error:
        raise SourceError(f"test set {source.uri}: {error}") from None
    same = (source.uri, source.split, source.root) == (
        run_source.uri,
        run_source.split,
        run_source.root,
    )
    return TestSet(source, fragments, matched, same, tuple(unreadable))


def _first(fragments: Sequence[Fragment], limit: int | None) -> Iterator[Fragment]:
    """Yield fragments up to `limit` samples; the last one is cut."""
    left = sum(fragment.samples for fragment in fragments) if limit is None else limit
    for fragment in fragments:
        if left <= 0:
            return
        yield (
            fragment
            if fragment.samples <= left
            else dataclasses.replace(fragment, stop=fragment.start + left)
        )
        left -= fragment.samples


def decode_train(
    run_uri: str,
    source: SourceSettings,
    size: int,
    folder: str,
    unit: DecodeUnit,
    channels: int = 3,
) -> UnitCounts:
    """Decode the labelled samples of a score shard, in its order.

    Raises
    ------
    StageError
        If one of them can no longer be read.
    """
    run = Run(run_uri)
    scored = storage.read_table(run.score_shard(unit.fragment.fragment_id), ["sample_id", "label"])
    labels = scored["label"].fill_null(-1).to_numpy().astype(np.int64)
    ids = [
        name
        for name, label in zip(scored["sample_id"].to_pylist(), labels, strict=True)
        if label >= 0
    ]
    place = {name: position for position, name in enumerate(ids)}
    opened = open_source(source)
    read = reject_duplicates(
        run,
        unit.fragment,
        opened.read(run.with_members(unit.fragment), place.__contains__),
        opened.ids_can_repeat,
    )
    samples = [sample for sample in read if not sample.reason and sample.sample_id in place]
    pixels, reasons = decode_batch(
        samples,
        size,
        source.max_pixels,
        bit_depth=source.bit_depth,
        transform=transform_of(source),
        channels=channels,
    )
    images = np.zeros((len(ids), channels, size, size), np.uint8)
    read_ids = np.zeros(len(ids), bool)
    for sample, image, reason in zip(samples, pixels, reasons, strict=True):
        if not reason:
            row = place[sample.sample_id]
            images[row], read_ids[row] = image, True
    if not read_ids.all():
        example = ids[int(np.flatnonzero(~read_ids)[0])]
        raise StageError(
            f"{int((~read_ids).sum()):,} samples that were scored can no longer be read, such as "
            f"{example!r}; run `raypipe run` again"
        )
    _write(storage.join(folder, unit.file), images, labels[labels >= 0], canonical_hashes(ids))
    return {"samples": len(ids), "left_out": 0}


def decode_test(
    run_uri: str, test: TestSet, size: int, folder: str, unit: DecodeUnit, channels: int = 3
) -> UnitCounts:
    """Decode a fragment of the test set.

    Samples that are unlabelled, unreadable, of a class that the run does not have, or scored by
    the run are left out and counted.
    """
    run = Run(run_uri)
    opened, own = open_source(test.source), set[str]()
    if test.without_own:
        for _, table in storage.iter_tables(run.scores_folder, ["sample_id"]):
            own.update(table["sample_id"].to_pylist())
    samples = list(
        opened.read(unit.fragment, (lambda sample_id: sample_id not in own) if own else None)
    )
    pixels, reasons = decode_batch(
        samples,
        size,
        test.source.max_pixels,
        bit_depth=test.source.bit_depth,
        transform=transform_of(test.source),
        channels=channels,
    )
    label = np.array([test.classes.index(sample.label) for sample in samples], np.int64)
    good = np.array([not reason for reason in reasons], bool) & (label >= 0)
    _write(storage.join(folder, unit.file), pixels[good], label[good])
    return {"samples": int(good.sum()), "left_out": unit.fragment.samples - int(good.sum())}


def _write(
    uri: str, images: np.ndarray, labels: np.ndarray, keys: np.ndarray | None = None
) -> None:
    width = int(np.prod(images.shape[1:]))
    stored = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(width), len(images), [None, pa.py_buffer(images.tobytes())]
    )
    columns = {"image": stored, "label": pa.array(labels, pa.int64())}
    if keys is not None:
        columns["key"] = pa.array(keys, pa.uint64())
    storage.write_table(uri, pa.table(columns), dictionary=False)


@dataclass(frozen=True)
class Arrays:
    """What a node holds.

    Attributes
    ----------
    images, labels, keys
        Of the training part: uint8 [n, channels, size, size], int64 [n], and a hash of each id,
        uint64 [n].
    test_images, test_labels
        The same of the test part.
    statistics
        Mean and standard deviation of the channels of the training part.
    """

    images: np.ndarray
    labels: np.ndarray
    keys: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    statistics: tuple[list[float], list[float]]


@dataclass(frozen=True)
class NodeCopy:
    """The arrays on this node's disk.

    Attributes
    ----------
    run
        URI of the run.
    folder
        URI of the decoded files.
    key
        Hash of what is in them.
    size
        Pixels a side.
    counts
        Samples of each training unit and of each test unit.
    """

    run: str
    folder: str
    key: str
    size: int
    counts: tuple[tuple[int, ...], tuple[int, ...]]

    @property
    def _prefix(self) -> str:
        owner = hashlib.blake2b(self.run.encode(), digest_size=8).hexdigest()
        return os.path.join(tempfile.gettempdir(), f"raypipe-evaluation-{owner}-")

    @property
    def _place(self) -> str:
        return self._prefix + self.key

    def open(self) -> Arrays:
        """Open the arrays; the first training on this node fills them, and the others wait.

        Raises
        ------
        ResourceError
            If the disk is too full.
        """
        with self._locked():
            if not os.path.exists(os.path.join(self._place, COMPLETE)):
                self._fill()
        with open(os.path.join(self._place, COMPLETE)) as file:
            statistics = json.load(file)
        loaded = [
            np.load(self._file(part, what), mmap_mode="r")
            for part, arrays in (
                (TRAIN, ("images", "labels", "keys")),
                (TEST, ("images", "labels")),
            )
            for what in arrays
        ]
        return Arrays(
            loaded[0],
            np.array(loaded[1]),
            np.array(loaded[2]),
            loaded[3],
            np.array(loaded[4]),
            (statistics["mean"], statistics["std"]),
        )

    def remove(self) -> None:
        """Delete the arrays from this node's disk."""
        shutil.rmtree(self._place, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            os.remove(self._prefix + "lock")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self._prefix + "lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed or the process ends
            yield

    def _fill(self) -> None:
        for leftover in glob.glob(glob.escape(self._prefix) + "*"):
            if os.path.isdir(leftover):
                shutil.rmtree(leftover, ignore_errors=True)
        free = shutil.disk_usage(tempfile.gettempdir()).free
        check_room(sum(map(sum, self.counts)), self.size, free, "free disk for temporary files")
        os.makedirs(self._place)
        train, test = self.counts
        mean, std = statistics_of(self._fill_part(TRAIN, train))
        self._fill_part(TEST, test)
        complete = os.path.join(self._place, COMPLETE)
        with open(f"{complete}.new", "w") as file:
            json.dump({"mean": mean, "std": std}, file)
        os.replace(f"{complete}.new", complete)

    def _image_bytes(self, part: str) -> int:
        """Return the bytes of an image of a part."""
        with storage.open_read(storage.join(self.folder, _unit_file(part, 0))) as file:
            return pq.read_schema(file).field("image").type.byte_width

    def _fill_part(self, part: str, counts: Sequence[int]) -> np.ndarray:
        """Copy the decoded files of a part into its arrays; return the images."""
        width = self._image_bytes(part)
        shape = (sum(counts), width // self.size**2, self.size, self.size)
        images = np.lib.format.open_memmap(self._file(part, "images"), "w+", np.uint8, shape)
        labels = np.lib.format.open_memmap(self._file(part, "labels"), "w+", np.int64, shape[:1])
        keys = np.zeros(shape[0], np.uint64)
        first = 0
        for number, count in enumerate(counts):
            table = storage.read_table(storage.join(self.folder, _unit_file(part, number)))
            column = table["image"].combine_chunks()
            if count:
                pixels = np.frombuffer(
                    column.buffers()[1], np.uint8, count * width, column.offset * width
                )
                images[first : first + count] = pixels.reshape(count, *shape[1:])
                labels[first : first + count] = table["label"].to_numpy()
                if part == TRAIN:
                    keys[first : first + count] = table["key"].to_numpy()
            first += count
        images.flush()
        labels.flush()
        if part == TRAIN:
            np.save(self._file(part, "keys"), keys)
        return images

    def _file(self, part: str, what: str) -> str:
        return os.path.join(self._place, f"{part}-{what}.npy")


def units_of(run: Run, shards: Sequence[tuple[str, int]], test: TestSet) -> list[DecodeUnit]:
    """Return everything to decode, in the order of score shards and test set."""
    fragments = {fragment.fragment_id: fragment for fragment in run.fragments()}
    absent = [name for name, _ in shards if name not in fragments]
    if absent:
        raise StageError(
            f"scores/{absent[0]}.parquet belongs to no fragment of the index; "
            "run `raypipe run` again"
        )
    own = [DecodeUnit(TRAIN, number, fragments[name]) for number, (name, _) in enumerate(shards)]
    return own + [
        DecodeUnit(TEST, number, fragment) for number, fragment in enumerate(test.fragments)
    ]
