"""Datasets of torchvision by name: `torchvision://CIFAR10`, and any other class that yields an image and a class number.

Classes that keep images as files (ImageNet, Places365, Food101, ...) are asked for the files' names only: the encoded images are
read as those of any folder, by workers that need no torchvision. Of the others (CIFAR, MNIST, SVHN, ...) every worker process makes
the dataset once. Only the driver downloads.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import numbers
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image

from raypipe import storage
from raypipe.config import SourceSettings
from raypipe.errors import SourceError
from raypipe.sources.base import FileScan, Fragment, IdFilter, RawSample, Source, SourceFile
from raypipe.sources.common import text
from raypipe.sources.torchvision_build import (
    File,
    Request,
    build,
    dataset_class,
    first_item,
    has_splits,
    parse_request,
)

READERS, AT_ONCE = 8, 32
"""Files read at the same time, and held at most."""
LOOKED_AT = 10
"""Items that may fail before what a dataset yields is given up on."""
NAMED = "names "
"""Starts the stamp of the first run of files: its scan states the class names, for which the dataset is made once more."""
AS_PNG = {"1", "LA", "P", "RGBA", "I;16"}
"""Modes of images that are passed on encoded, since an array would lose transparency or depth."""


class TorchvisionSource(Source):
    """Items of a dataset class. Sample ids are paths below `source.root` where items are files, else "<Name>/<split>/<index>".

    A run of files has as `members` "<label><tab><path>"; a dataset without files is one SourceFile, whose member is its stamp.
    """

    format = "torchvision"

    def __init__(self, settings: SourceSettings) -> None:
        super().__init__(settings)
        self._request = parse_request(settings)

    def files(self) -> Iterator[SourceFile]:
        dataset = build(self._request, fetch=True)
        if _check_items(self._request, dataset):
            yield from self._runs(dataset)
        else:
            stamp = _stamp(self._request, dataset)
            name = self._request.name
            path = (
                f"{name}/{self._request.split}"
                if has_splits(self._request, dataset_class(self._request))
                else name
            )
            yield SourceFile(
                path, getattr(getattr(dataset, "data", None), "nbytes", 0), stamp, (stamp,)
            )

    def scan(self, file: SourceFile) -> FileScan:
        if not _is_run(file.members):
            dataset = _made(self._request, file.members[0])
            names = class_names(dataset)
            labels = _labels(dataset) if names is None else frozenset[int]()
            return FileScan(self.cut(file, len(dataset)), names, labels)
        found = (_split(member)[0] for member in file.members)
        names = (
            class_names(build(self._request, fetch=False)) if file.stamp.startswith(NAMED) else None
        )
        return FileScan(
            self.cut(file, len(file.members)),
            names,
            frozenset(label for label in found if label is not None),
        )

    def read(self, fragment: Fragment, wanted: IdFilter | None = None) -> Iterator[RawSample]:
        if _is_run(fragment.members):
            yield from self._read_files(fragment, wanted)
            return
        dataset = _made(self._request, fragment.members[0])
        digits = len(str(len(dataset) - 1))
        for index in range(fragment.start, fragment.stop):
            sample_id = f"{fragment.path}/{index:0{digits}d}"
            if wanted is None or wanted(sample_id):
                yield _sample(sample_id, dataset, index)

    def _runs(self, dataset: Any) -> Iterator[SourceFile]:
        """Runs of files in the order of the dataset. As in image folders, a hash ends most runs, so that a new file changes few."""
        root, limit = self._request.root, self.settings.fragment_samples
        run: list[str] = []
        first, size, digest = True, 0, hashlib.blake2b(digest_size=12)
        digest.update(repr(class_names(dataset)).encode())  # of the first run, which states them
        for index in range(len(dataset)):
            image, target = dataset[index]
            path = os.path.relpath(image.path, root)
            try:
                state = os.stat(image.path)
                size, stamp = size + state.st_size, f"{state.st_size} {state.st_mtime_ns}"
            except OSError:
                stamp = "missing"
            digest.update(f"{stamp}\0".encode())
            run.append(f"{'' if target is None else int(target)}\t{text(path)}")
            ends = hashlib.blake2b(run[-1].encode(), digest_size=8).digest()
            if (
                len(run) == limit
                or int.from_bytes(ends, "big") % limit == 0
                or index == len(dataset) - 1
            ):
                yield SourceFile(
                    _split(run[0])[1],
                    size,
                    (NAMED if first else "") + digest.hexdigest(),
                    tuple(run),
                )
                run, first, size, digest = [], False, 0, hashlib.blake2b(digest_size=12)

    def _read_files(self, fragment: Fragment, wanted: IdFilter | None) -> Iterator[RawSample]:
        members = map(_split, fragment.members[fragment.start : fragment.stop])
        chosen = (member for member in members if wanted is None or wanted(member[1]))
        with ThreadPoolExecutor(READERS, thread_name_prefix="raypipe-read") as pool:
            while group := list(islice(chosen, AT_ONCE)):
                paths = [os.path.join(self._request.root, path) for _, path in group]
                for (label, path), (image, reason) in zip(
                    group, pool.map(_fetch, paths), strict=True
                ):
                    yield RawSample(path, image, label, reason)


def class_names(dataset: Any) -> tuple[str, ...] | None:
    """Names of the classes in the order of their numbers; None where the dataset states none.

    `class_to_idx` goes before `classes`, whose order differs in Places365. Names that occur twice (two classes of ImageNet are
    "crane") are told apart by their number.
    """
    positions = getattr(dataset, "class_to_idx", None)
    if isinstance(positions, dict) and sorted(positions.values()) == list(range(len(positions))):
        names = [name for name, _ in sorted(positions.items(), key=lambda item: item[1])]
    else:
        listed = (
            getattr(dataset, name, None) for name in ("classes", "categories", "all_categories")
        )
        names = next(
            (list(found) for found in listed if isinstance(found, list | tuple) and found), []
        )
    words = [
        ", ".join(map(str, name)) if isinstance(name, tuple | list) else str(name) for name in names
    ]
    count = Counter(words)
    return (
        tuple(f"{word} ({index})" if count[word] > 1 else word for index, word in enumerate(words))
        or None
    )


@functools.lru_cache(maxsize=1)
def _made(request: Request, stamp: str) -> Any:
    """The dataset in this process. Its stamp is that of the index, so that its checksums need no second look. Raises SourceError."""
    dataset = build(dataclasses.replace(request, verify=False), fetch=False)
    if _stamp(request, dataset) != stamp:
        raise SourceError(
            f"{request.uri}: the files in {request.root} changed since they were indexed; run again"
        )
    return dataset


def _check_items(request: Request, dataset: Any) -> bool:
    """Whether the items are files. Raises SourceError when they are no images with a class number, or none can be read."""
    if not len(dataset):
        raise SourceError(f"{request.uri}: no samples in {request.root}")
    for index in range(min(LOOKED_AT, len(dataset))):
        image, target = first_item(dataset, index)
        if image is None and target is None:
            continue
        if not isinstance(image, Image.Image | File) or not _is_label(target):
            given = f"{type(image).__name__}, {type(target).__name__}"
            raise SourceError(
                f"{request.uri}: {request.name} yields ({given}), not an image and a class number; it is no dataset of classes, "
                f"or an argument makes it one: torchvision://{request.name}?argument=value"
            )
        return isinstance(image, File)
    try:
        image, target = dataset[0]
        reason = f"({type(image).__name__}, {type(target).__name__}) instead of an image and a class number"
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
    raise SourceError(
        f"{request.uri}: none of the first {min(LOOKED_AT, len(dataset))} items can be read: {reason}"
    )


def _is_label(target: Any) -> bool:
    if getattr(target, "shape", None) == () and hasattr(
        target, "item"
    ):  # a tensor or array of one number
        target = target.item()
    return target is None or isinstance(target, numbers.Integral)


def _labels(dataset: Any) -> frozenset[int]:
    """The labels that occur, by going through all items: for the few classes that state no names."""
    found = (first_item(dataset, index)[1] for index in range(len(dataset)))
    return frozenset(int(target) for target in found if target is not None and _is_label(target))


def _stamp(request: Request, dataset: Any) -> str:
    """What identifies the content: of the arrays where the dataset holds them, else of its files' names, sizes and times."""
    digest = hashlib.blake2b(digest_size=12)
    digest.update(repr((request.name, request.options, len(dataset))).encode())
    data = getattr(dataset, "data", None)
    if hasattr(data, "__array__"):
        array = np.asarray(data)
        digest.update(f"{array.dtype} {array.shape}".encode())
        for start in range(
            0, len(array), AT_ONCE
        ):  # CIFAR's is a view in another order: no second copy of it all
            digest.update(np.ascontiguousarray(array[start : start + AT_ONCE]).data)
        targets = next(
            (
                found
                for name in ("targets", "labels")
                if (found := getattr(dataset, name, None)) is not None
            ),
            None,
        )
        digest.update(repr(np.asarray(targets).tolist()).encode())
    else:
        for folder in _folders(request, dataset):
            for file in storage.listing(folder):
                digest.update(f"{text(file.path)}\0{file.size}\0{file.stamp}\0".encode())
    return digest.hexdigest()


def _folders(request: Request, dataset: Any) -> list[str]:
    """The folders below root that belong to a dataset, as far as it says, or that have its name."""
    stated = [
        request.name.lower(),
        *(getattr(dataset, name, None) for name in ("base_folder", "_base_folder", "root")),
    ]
    found = {
        os.path.join(request.root, os.fspath(folder))
        for folder in stated
        if isinstance(folder, str | os.PathLike)
    }
    return sorted(folder for folder in found - {request.root} if os.path.isdir(folder))


def _sample(sample_id: str, dataset: Any, index: int) -> RawSample:
    try:
        image, target = dataset[index]
        if not isinstance(image, Image.Image) or not _is_label(target):
            given = f"({type(image).__name__}, {type(target).__name__})"
            return RawSample(
                sample_id, None, None, f"the item is {given}, not an image and a class number"
            )
        return RawSample(sample_id, _content(image), None if target is None else int(target))
    except Exception as error:
        # each class reads its own way and raises its own errors; what cannot be read is one reject
        return RawSample(
            sample_id,
            None,
            None,
            f"cannot be read: {text(' '.join(str(error).split())[:200]) or type(error).__name__}",
        )


def _content(image: Image.Image) -> np.ndarray | bytes:
    """Encoded bytes where the image is a file that has not been decoded yet, else pixels."""
    path = getattr(image, "filename", "")
    if path and os.path.isfile(path):
        with image:
            return storage.read_bytes(path)
    if image.mode in AS_PNG:
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()
    return np.array(image if image.mode in {"L", "RGB"} else image.convert("RGB"))


def _is_run(members: tuple[str, ...]) -> bool:
    return "\t" in members[0]


def _split(member: str) -> tuple[int | None, str]:
    label, _, path = member.partition("\t")
    return (int(label) if label else None), path


def _fetch(path: str) -> tuple[bytes | None, str]:
    """The bytes of a file, or why there are none. Raises storage faults."""
    try:
        return storage.read_bytes(path), ""
    except FileNotFoundError:
        return None, "no such file, or its name is not UTF-8"
    except (PermissionError, IsADirectoryError) as error:
        return None, f"cannot be read: {error.strerror}"
