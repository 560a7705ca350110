"""torchvision datasets by name: `torchvision://CIFAR10`, and any class of images and class numbers.

Classes that store images as files (ImageNet, Places365, Food101, ...) are asked for the names of
the files only: the encoded images are read like those of any folder, by workers that need no
torchvision. Datasets of the other classes (CIFAR, MNIST, SVHN, ...) are constructed once in every
worker process. Only the driver downloads.
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
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from raypipe import storage
from raypipe.config import SourceSettings
from raypipe.errors import SourceError
from raypipe.sources.base import Source
from raypipe.sources.cuts import divide
from raypipe.sources.smallfiles import path_hash
from raypipe.sources.torchvision_build import build_dataset, first_item
from raypipe.sources.torchvision_request import (
    DatasetRequest,
    ImagePath,
    dataset_class,
    has_splits,
    parse_request,
)
from raypipe.sources.types import FileScan, Fragment, IdFilter, RawSample, SourceFile
from raypipe.sources.values import printable
from raypipe.text import error_text

if TYPE_CHECKING:
    from torchvision.datasets import VisionDataset

READERS, FILES_HELD = 8, 32
"""Files read at the same time, and files held at most."""
HASHED_ITEMS = 32
"""Items of an array that are hashed at a time."""
ITEMS_TRIED = 10
"""Items that may fail before a dataset is given up."""
STATES_NAMES = "names "
"""Prefix of the stamp of the first run of files.

Its scan states the class names, for which the dataset is constructed once more.
"""
PNG_MODES = {"1", "LA", "P", "RGBA", "I;16"}
"""Modes of images that are passed on as PNG, since an array would lose transparency or depth."""


class TorchvisionSource(Source):
    """Items of a torchvision dataset.

    Sample ids are paths below `source.root` if items are files, else "<Name>/<split>/<index>".

    The `members` of a run of files are "<label><tab><path>". A dataset without files is a single
    SourceFile whose only member is its stamp.
    """

    format = "torchvision"

    def __init__(self, settings: SourceSettings) -> None:
        super().__init__(settings)
        self._request = parse_request(settings)

    def files(self) -> Iterator[SourceFile]:
        dataset = build_dataset(self._request, fetch=True)
        if _check_items(self._request, dataset):
            yield from self._file_runs(dataset)
            return
        stamp = _content_stamp(self._request, dataset)
        path = self._request.name
        if has_splits(self._request, dataset_class(self._request)):
            path = f"{path}/{self._request.split}"
        size = getattr(getattr(dataset, "data", None), "nbytes", 0)
        yield SourceFile(path, size, stamp, (stamp,))

    def scan(self, file: SourceFile) -> FileScan:
        if not _is_file_run(file.members):
            dataset = _unchanged_dataset(self._request, file.members[0])
            names = class_names(dataset)
            labels = _all_labels(dataset) if names is None else frozenset[int]()
            return FileScan(self.cut_fragments(file, len(dataset)), names, labels)
        stored = (_parse_member(member)[0] for member in file.members)
        names = None
        if file.stamp.startswith(STATES_NAMES):
            names = class_names(build_dataset(self._request, fetch=False))
        return FileScan(
            self.cut_fragments(file, len(file.members)),
            names,
            frozenset(label for label in stored if label is not None),
        )

    def read(self, fragment: Fragment, keep_id: IdFilter | None = None) -> Iterator[RawSample]:
        if _is_file_run(fragment.members):
            yield from self._read_files(fragment, keep_id)
            return
        dataset = _unchanged_dataset(self._request, fragment.members[0])
        digits = len(str(len(dataset) - 1))
        for index in range(fragment.start, fragment.stop):
            sample_id = f"{fragment.path}/{index:0{digits}d}"
            if keep_id is None or keep_id(sample_id):
                yield _read_item(sample_id, dataset, index)

    def _file_runs(self, dataset: VisionDataset) -> Iterator[SourceFile]:
        """Yield runs of files in the order of the dataset."""
        limit, names = self.settings.fragment_samples, repr(class_names(dataset))
        runs = divide(self._members(dataset), lambda file: path_hash(file[0]), limit, self.cuts)
        for number, run in enumerate(runs):
            prefix, stated = (STATES_NAMES, names) if not number else ("", "")
            digest = hashlib.blake2b(stated.encode(), digest_size=12)
            for _, _, stamp in run:
                digest.update(f"{stamp}\0".encode())
            yield SourceFile(
                _parse_member(run[0][0])[1],
                sum(size for _, size, _ in run),
                prefix + digest.hexdigest(),
                tuple(member for member, _, _ in run),
            )

    def _members(self, dataset: VisionDataset) -> Iterator[tuple[str, int, str]]:
        """Yield member, size in bytes and stamp of each file, in the order of the dataset."""
        for index in range(len(dataset)):
            image, target = dataset[index]
            path = os.path.relpath(image.path, self._request.root)
            try:
                state = os.stat(image.path)
                size, stamp = state.st_size, f"{state.st_size} {state.st_mtime_ns}"
            except OSError:
                size, stamp = 0, "missing"
            yield f"{'' if target is None else int(target)}\t{printable(path)}", size, stamp

    def _read_files(self, fragment: Fragment, keep_id: IdFilter | None) -> Iterator[RawSample]:
        members = map(_parse_member, fragment.members[fragment.start : fragment.stop])
        chosen = (member for member in members if keep_id is None or keep_id(member[1]))
        with ThreadPoolExecutor(READERS, thread_name_prefix="raypipe-read") as pool:
            while group := list(islice(chosen, FILES_HELD)):
                paths = [os.path.join(self._request.root, path) for _, path in group]
                images = pool.map(_fetch, paths)
                for (label, path), (image, reason) in zip(group, images, strict=True):
                    yield RawSample(path, image, label, reason)


def class_names(dataset: VisionDataset) -> tuple[str, ...] | None:
    """Return the names of the classes by class number; None if the dataset states none.

    `class_to_idx` takes precedence over `classes`, whose order differs in Places365. The number is
    added to names that occur twice (two classes of ImageNet are "crane").
    """
    positions = getattr(dataset, "class_to_idx", None)
    names: list[Any] = []
    if isinstance(positions, dict) and sorted(positions.values()) == list(range(len(positions))):
        names = [name for name, _ in sorted(positions.items(), key=lambda item: item[1])]
    else:
        for attribute in ("classes", "categories", "all_categories"):
            listed = getattr(dataset, attribute, None)
            if isinstance(listed, list | tuple) and listed:
                names = list(listed)
                break
    texts = [
        ", ".join(map(str, name)) if isinstance(name, tuple | list) else str(name) for name in names
    ]
    count = Counter(texts)
    unique = tuple(
        f"{text} ({index})" if count[text] > 1 else text for index, text in enumerate(texts)
    )
    return unique or None


@functools.lru_cache(maxsize=1)
def _unchanged_dataset(request: DatasetRequest, stamp: str) -> VisionDataset:
    """Return the dataset, constructed in this process.

    Its stamp must be that of the index, so checksums need not be verified again. Raises
    SourceError if it differs.
    """
    dataset = build_dataset(dataclasses.replace(request, verify=False), fetch=False)
    if _content_stamp(request, dataset) != stamp:
        raise SourceError(
            f"{request.uri}: the files in {request.root} changed since they were indexed; rerun"
        )
    return dataset


def _check_items(request: DatasetRequest, dataset: VisionDataset) -> bool:
    """Whether the items are files.

    Raises SourceError if they are not images with a class number, or none can be read.
    """
    if not len(dataset):
        raise SourceError(f"{request.uri}: no samples in {request.root}")
    tried = min(ITEMS_TRIED, len(dataset))
    for index in range(tried):
        image, target = first_item(dataset, index)
        if image is None and target is None:
            continue
        if not isinstance(image, Image.Image | ImagePath) or not _is_label(target):
            types = f"({type(image).__name__}, {type(target).__name__})"
            raise SourceError(
                f"{request.uri}: {request.name} yields {types}, not an image and a class number; "
                "either it has no classes, or it needs an argument: "
                f"torchvision://{request.name}?argument=value"
            )
        return isinstance(image, ImagePath)
    try:
        image, target = dataset[0]
        types = f"({type(image).__name__}, {type(target).__name__})"
        reason = f"{types} instead of an image and a class number"
    except Exception as error:
        reason = error_text(error, 200)
    raise SourceError(f"{request.uri}: none of the first {tried} items can be read: {reason}")


def _is_label(target: Any) -> bool:
    if getattr(target, "shape", None) == () and hasattr(target, "item"):
        target = target.item()  # a tensor or array of one number
    return target is None or isinstance(target, numbers.Integral)


def _all_labels(dataset: VisionDataset) -> frozenset[int]:
    """Collect the labels in a pass over all items, for the few datasets without class names."""
    targets = (first_item(dataset, index)[1] for index in range(len(dataset)))
    return frozenset(int(target) for target in targets if target is not None and _is_label(target))


def _content_stamp(request: DatasetRequest, dataset: VisionDataset) -> str:
    """Hash of the content: of the arrays if the dataset holds them, else of its file listing."""
    digest = hashlib.blake2b(digest_size=12)
    digest.update(repr((request.name, request.options, len(dataset))).encode())
    data = getattr(dataset, "data", None)
    if hasattr(data, "__array__"):
        array = np.asarray(data)
        digest.update(f"{array.dtype} {array.shape}".encode())
        # in steps: CIFAR's is a view in another order, and a second copy of all would be large
        for start in range(0, len(array), HASHED_ITEMS):
            digest.update(np.ascontiguousarray(array[start : start + HASHED_ITEMS]).data)
        targets = getattr(dataset, "targets", None)
        if targets is None:
            targets = getattr(dataset, "labels", None)
        digest.update(repr(np.asarray(targets).tolist()).encode())
    else:
        for folder in _dataset_folders(request, dataset):
            for file in storage.listing(folder):
                digest.update(f"{printable(file.path)}\0{file.size}\0{file.stamp}\0".encode())
    return digest.hexdigest()


def _dataset_folders(request: DatasetRequest, dataset: VisionDataset) -> list[str]:
    """Return the folders below the root that a dataset can use: those it states, and its name."""
    stated = [
        request.name.lower(),
        *(getattr(dataset, name, None) for name in ("base_folder", "_base_folder", "root")),
    ]
    folders = {
        os.path.join(request.root, os.fspath(folder))
        for folder in stated
        if isinstance(folder, str | os.PathLike)
    }
    return sorted(folder for folder in folders - {request.root} if os.path.isdir(folder))


def _read_item(sample_id: str, dataset: VisionDataset, index: int) -> RawSample:
    try:
        image, target = dataset[index]
        if not isinstance(image, Image.Image) or not _is_label(target):
            types = f"({type(image).__name__}, {type(target).__name__})"
            reason = f"the item is {types}, not an image and a class number"
            return RawSample(sample_id, None, None, reason)
        return RawSample(sample_id, _image_content(image), None if target is None else int(target))
    except Exception as error:
        # Each class reads and fails in its own way; an unreadable item is one reject.
        message = printable(error_text(error, 200))
        return RawSample(sample_id, None, None, f"cannot be read: {message}")


def _image_content(image: Image.Image) -> np.ndarray | bytes:
    """Return encoded bytes if the image is a file that is not decoded yet, else pixels."""
    path = getattr(image, "filename", "")
    if path and os.path.isfile(path):
        with image:
            return storage.read_bytes(path)
    if image.mode in PNG_MODES:
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()
    return np.array(image if image.mode in {"L", "RGB"} else image.convert("RGB"))


def _is_file_run(members: tuple[str, ...]) -> bool:
    return "\t" in members[0]


def _parse_member(member: str) -> tuple[int | None, str]:
    """Label and path of a member of a run of files."""
    label, _, path = member.partition("\t")
    return (int(label) if label else None), path


def _fetch(path: str) -> tuple[bytes | None, str]:
    """Return (bytes of a file, ""), or (None, reason). Raises storage faults."""
    try:
        return storage.read_bytes(path), ""
    except FileNotFoundError:
        return None, "no such file, or its name is not UTF-8"
    except (PermissionError, IsADirectoryError) as error:
        return None, f"cannot be read: {error.strerror}"
