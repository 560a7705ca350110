"""Images decoded once: in tasks into RUN/evaluation/pixels/, and from there into an array on each node that trains. No Ray.

A unit is a fragment of the source, or of the test set. Its file has `image`, the bytes of uint8 [3, size, size], and `label`; the array of
a node is memory-mapped, one copy for all trainings beside one another, and as fast as memory where it fits.
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
from typing import Any

import numpy as np
import pyarrow as pa

from raypipe import storage
from raypipe.config import SourceSettings
from raypipe.errors import ResourceError, SourceError, StageError
from raypipe.evaluation.train import statistics_of
from raypipe.runs.duplicates import reject_duplicates
from raypipe.runs.layout import Run
from raypipe.runs.ledger import content_hash, fingerprint
from raypipe.sources import Fragment, open_source
from raypipe.vision.decode import decode_batch

FOLDER = "evaluation/pixels"
ROOM = 0.8
"""Share of a node's memory, and of the free disk below its folder for temporary files, that the array may take."""
TRAIN, TEST = "train", "test"


def bytes_needed(samples: int, size: int) -> int:
    """Of an array of so many decoded images."""
    return samples * 3 * size * size


def check_room(samples: int, size: int, available: float, what: str = "memory") -> None:
    """Raise ResourceError where so many images do not fit into `available` bytes of a node."""
    needed = bytes_needed(samples, size)
    if needed > ROOM * available:
        raise ResourceError(
            f"an evaluation holds all {samples:,} images (of training and test) decoded at {size} pixels on every node that trains: "
            f"{needed / 2**30:.1f} GiB, but the smallest has {available / 2**30:.1f} GiB of {what}, of which {ROOM:.0%} may be used. Lower "
            "image_size, take larger nodes, or evaluate a rehearsal of the run (source.limit)"
        )


@dataclass(frozen=True)
class DecodeUnit:
    """Something to decode.

    part      train or test
    number    place among the units of its part
    fragment  what is read; of the source of the run without its members, which are in the index
    """

    part: str
    number: int
    fragment: Fragment

    @property
    def file(self) -> str:
        return f"{self.part}-{self.number:06d}.parquet"


@dataclass(frozen=True)
class TestSet:
    """What is tested on: fragments, a hash of what they are, and whether the run's own samples are left out."""

    __test__ = False  # no test, whatever pytest makes of the name

    source: SourceSettings
    fragments: tuple[Fragment, ...]
    without_own: bool

    @property
    def digest(self) -> str:
        names = content_hash(fragment.fragment_id for fragment in self.fragments)
        return fingerprint(
            names, sum(fragment.samples for fragment in self.fragments), self.without_own
        )


def list_test_set(source: SourceSettings, run_source: SourceSettings) -> TestSet:
    """The fragments of a test set. Raises SourceError where there are none.

    Of a test set at the same URI and split as the run's source, samples that the run scored are left out; elsewhere equal ids are no sign of
    equal images.
    """
    opened = open_source(source)
    found = [fragment for file in opened.files() for fragment in opened.scan(file).fragments]
    fragments = tuple(
        _first(
            [fragment for fragment in found if fragment.samples and not fragment.error],
            source.limit,
        )
    )
    if not fragments:
        raise SourceError(f"{source.uri}: the test set has no readable samples")
    same = (source.uri, source.split, source.root) == (
        run_source.uri,
        run_source.split,
        run_source.root,
    )
    return TestSet(source, fragments, same)


def _first(fragments: Sequence[Fragment], limit: int | None) -> Iterator[Fragment]:
    """Fragments up to so many samples, the last one cut."""
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
    run_uri: str, source: SourceSettings, size: int, folder: str, unit: DecodeUnit
) -> dict[str, Any]:
    """Decode the labelled samples of a score shard, in its order. Raises StageError where one cannot be read any more."""
    run = Run(run_uri)
    scored = storage.read_table(
        run.path("scores", f"{unit.fragment.fragment_id}.parquet"), ["sample_id", "label"]
    )
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
    pixels, reasons = decode_batch(samples, size, source.max_pixels)
    images, there = np.zeros((len(ids), 3, size, size), np.uint8), np.zeros(len(ids), bool)
    for sample, image, reason in zip(samples, pixels, reasons, strict=True):
        if not reason:
            images[place[sample.sample_id]], there[place[sample.sample_id]] = image, True
    if not there.all():
        example = ids[int(np.flatnonzero(~there)[0])]
        raise StageError(
            f"{int((~there).sum()):,} samples that were scored cannot be read any more, such as {example!r}; run `raypipe run` again"
        )
    _write(storage.join(folder, unit.file), images, labels[labels >= 0])
    return {"samples": len(ids), "left_out": 0}


def decode_test(
    run_uri: str, test: TestSet, size: int, folder: str, unit: DecodeUnit
) -> dict[str, Any]:
    """Decode a fragment of the test set; what is unlabelled, unreadable or the run's own is left out and counted."""
    run = Run(run_uri)
    classes, opened, own = run.classes(), open_source(test.source), set[str]()
    if test.without_own:
        for _, table in storage.iter_tables(run.path("scores"), ["sample_id"]):
            own.update(table["sample_id"].to_pylist())
    samples = list(
        opened.read(unit.fragment, (lambda sample_id: sample_id not in own) if own else None)
    )
    pixels, reasons = decode_batch(samples, size, test.source.max_pixels)
    label = np.array([classes.index(sample.label)[0] for sample in samples], np.int64)
    good = np.array([not reason for reason in reasons], bool) & (label >= 0)
    _write(storage.join(folder, unit.file), pixels[good], label[good])
    return {"samples": int(good.sum()), "left_out": unit.fragment.samples - int(good.sum())}


def _write(uri: str, images: np.ndarray, labels: np.ndarray) -> None:
    width = int(np.prod(images.shape[1:]))
    stored = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(width), len(images), [None, pa.py_buffer(images.tobytes())]
    )
    storage.write_table(
        uri, pa.table({"image": stored, "label": pa.array(labels, pa.int64())}), dictionary=False
    )


@dataclass(frozen=True)
class Arrays:
    """What a node holds: of both parts images uint8 [n, 3, size, size] and labels int64 [n]; mean and standard deviation of the training part."""

    images: np.ndarray
    labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    statistics: tuple[list[float], list[float]]


@dataclass(frozen=True)
class NodeCopy:
    """The arrays on this node's disk.

    folder  of the decoded files;  key: hash of what is in them, with the run's
    counts  samples of each training and each test unit
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
        """Fill it, where no other training on this node has; the others wait. Raises ResourceError where the disk is too full."""
        with self._locked():
            if not os.path.exists(os.path.join(self._place, "complete")):
                self._fill()
        with open(os.path.join(self._place, "complete")) as file:
            statistics = json.load(file)
        loaded = [
            np.load(self._file(part, what), mmap_mode="r")
            for part in (TRAIN, TEST)
            for what in ("images", "labels")
        ]
        return Arrays(
            loaded[0],
            np.array(loaded[1]),
            loaded[2],
            np.array(loaded[3]),
            (statistics["mean"], statistics["std"]),
        )

    def remove(self) -> None:
        """From this node's disk."""
        shutil.rmtree(self._place, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            os.remove(self._prefix + "lock")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self._prefix + "lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # let go when the file is closed, or its process ends
            yield

    def _fill(self) -> None:
        for left in glob.glob(glob.escape(self._prefix) + "*"):
            if os.path.isdir(left):
                shutil.rmtree(left, ignore_errors=True)
        samples = sum(map(sum, self.counts))
        check_room(
            samples,
            self.size,
            shutil.disk_usage(tempfile.gettempdir()).free,
            "free disk for temporary files",
        )
        os.makedirs(self._place)
        for part, counts in zip((TRAIN, TEST), self.counts, strict=True):
            shape = (sum(counts), 3, self.size, self.size)
            images = np.lib.format.open_memmap(self._file(part, "images"), "w+", np.uint8, shape)
            labels = np.lib.format.open_memmap(
                self._file(part, "labels"), "w+", np.int64, shape[:1]
            )
            first = 0
            for number, count in enumerate(counts):
                table = storage.read_table(
                    storage.join(self.folder, f"{part}-{number:06d}.parquet")
                )
                column, width = table["image"].combine_chunks(), bytes_needed(1, self.size)
                if count:
                    pixels = np.frombuffer(
                        column.buffers()[1], np.uint8, count * width, column.offset * width
                    )
                    images[first : first + count] = pixels.reshape(count, *shape[1:])
                    labels[first : first + count] = table["label"].to_numpy()
                first += count
            images.flush()
            labels.flush()
            if part == TRAIN:
                mean, std = statistics_of(images)
        with open(os.path.join(self._place, "complete.new"), "w") as file:
            json.dump({"mean": mean, "std": std}, file)
        os.replace(os.path.join(self._place, "complete.new"), os.path.join(self._place, "complete"))

    def _file(self, part: str, what: str) -> str:
        return os.path.join(self._place, f"{part}-{what}.npy")


def units_of(run: Run, shards: Sequence[tuple[str, int]], test: TestSet) -> list[DecodeUnit]:
    """Everything that is decoded, in the order of score shards and test set."""
    fragments = {fragment.fragment_id: fragment for fragment in run.fragments()}
    absent = [name for name, _ in shards if name not in fragments]
    if absent:
        raise StageError(
            f"scores/{absent[0]}.parquet is of no fragment in the index; run `raypipe run` again"
        )
    own = [DecodeUnit(TRAIN, number, fragments[name]) for number, (name, _) in enumerate(shards)]
    return own + [
        DecodeUnit(TEST, number, fragment) for number, fragment in enumerate(test.fragments)
    ]
