"""Construct a torchvision dataset: check that its files exist, and download them if allowed.

torchvision checks checksums and opens pickles itself. Both are intercepted while a dataset is
constructed, so that a copy with other checksums can be read and a pickle cannot run code.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import IO, TYPE_CHECKING, Any

from raypipe.errors import SourceError
from raypipe.sources.torchvision_request import (
    DatasetRequest,
    ImagePath,
    constructor_arguments,
    constructor_parameters,
    dataset_class,
)
from raypipe.text import error_text

if TYPE_CHECKING:
    from torchvision.datasets import VisionDataset

EXPECTED_FILES = {
    "ImageNet": (
        "ILSVRC2012_devkit_t12.tar.gz and ILSVRC2012_img_train.tar (or ILSVRC2012_img_val.tar), "
        "which image-net.org gives to registered users and torchvision cannot download, or "
        "meta.bin and the folder train (or val) that torchvision makes from them"
    ),
    "Places365": (
        "categories_places365.txt, places365_train_standard.txt (or the list of another split) "
        "and the folder of the images: data_large_standard, or data_256_standard with small=true"
    ),
}
"""What the root of a dataset contains, for those whose class does not list it."""
PICKLE_TYPES = {
    (module, name)
    for package in ("numpy.core", "numpy._core")
    for module, name in (
        (f"{package}.multiarray", "_reconstruct"),
        (f"{package}.multiarray", "scalar"),
        (f"{package}.numeric", "_frombuffer"),
    )
} | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
"""Names that a pickle of arrays, lists and dictionaries refers to.

A pickle that refers to any other name is not opened.
"""


def build_dataset(request: DatasetRequest, *, fetch: bool) -> VisionDataset:
    """Construct a dataset.

    Parameters
    ----------
    request : DatasetRequest
    fetch : bool
        Download missing files, if the class can and `source.download` allows it.

    Raises
    ------
    SourceError
        If there is no such class, it does not take the arguments, or files are missing or differ
        from those published.
    """
    kind = dataset_class(request)
    arguments = constructor_arguments(request, kind)
    try:
        return _construct(request, kind, arguments)
    except _Unavailable as error:
        reason = str(error)
        if error.differing and request.verify:
            raise SourceError(
                f"{request.uri}: {_enumerate(error.differing)} in {request.root} do not match "
                "the published checksums (MD5). To read this copy as it is, set "
                "source.verify=false; to download it again, remove these files first"
            ) from None
    can_download = "download" in constructor_parameters(kind)
    if fetch and request.download and can_download:
        try:
            return _construct(request, kind, {**arguments, "download": True})
        except _Unavailable as error:
            reason = f"the download failed: {error}"
    elif fetch and can_download:
        reason += "; source.download is false"
    if not fetch:
        reason += "; every machine must see the same files in source.root"
    raise SourceError(
        f"{request.uri}: not found in {request.root} ({reason}). "
        f"Expected there: {_expected_files(kind, request)}. "
        "Set source.root to the folder that has them"
    )


class _Unavailable(Exception):
    """A dataset cannot be constructed; `differing` lists files that are not as published."""

    def __init__(self, reason: str, differing: list[str]) -> None:
        super().__init__(reason)
        self.differing = differing


def _construct(
    request: DatasetRequest, kind: type[VisionDataset], arguments: dict[str, Any]
) -> VisionDataset:
    with _intercepted(kind, request.verify) as differing:
        try:
            dataset = kind(**arguments)
            absent = _absent_file(dataset)
        except ImportError as error:
            raise SourceError(
                f"{request.uri}: {request.name} needs a package that is not installed: {error}"
            ) from None
        except pickle.UnpicklingError as error:
            raise SourceError(
                f"{request.uri}: a file in {request.root} is not a pickle of arrays: {error}"
            ) from None
        except Exception as error:  # each class has its own checks, and files can hold anything
            reason = error_text(error)
            if reason.startswith("Unknown value"):
                hint = "; set source.split" if "argument split" in reason else ""
                raise SourceError(f"{request.uri}: {reason}{hint}") from None
            differing = [os.path.relpath(path, request.root) for path in differing]
            raise _Unavailable(reason, differing) from None
    if absent:
        raise _Unavailable(f"its list names files that do not exist, such as {absent}", [])
    return dataset


def _absent_file(dataset: VisionDataset) -> str:
    """Return the first of the listed files if all are missing, else ""."""
    images = [
        first_item(dataset, index)[0]
        for index in range(0, len(dataset), max(1, len(dataset) // 20))
    ]
    files = [image.path for image in images if isinstance(image, ImagePath)]
    return str(files[0]) if files and not any(map(os.path.exists, files)) else ""


def first_item(dataset: VisionDataset, index: int) -> tuple[Any, Any]:
    """Return image and target of an item; (None, None) if it is unreadable or not a pair."""
    try:
        image, target = dataset[index]
    except Exception:
        return None, None
    return image, target


_interception_lock = threading.Lock()


@contextmanager
def _intercepted(kind: type[VisionDataset], verify: bool) -> Iterator[list[str]]:
    """Replace checksum tests and unpickling in the modules of a dataset class.

    torchvision's classes call `check_integrity` and `pickle.load` by the names that their modules
    imported. Within this context, these names lead to functions that note files with wrong
    checksums (and accept them unless `verify`), and that open pickles of arrays only.

    Yields
    ------
    list of str
        Grows by the paths of files whose checksums are wrong.
    """
    differing: list[str] = []
    modules = {
        sys.modules[base.__module__]
        for base in kind.__mro__
        if base.__module__.startswith("torchvision.datasets.")
    }
    saved: list[tuple[ModuleType, str, Any]] = []

    def replace(module: ModuleType, name: str, value: Any) -> None:
        saved.append((module, name, getattr(module, name)))
        setattr(module, name, value)

    array_pickle = SimpleNamespace(**{**vars(pickle), "load": _load_arrays})
    with _interception_lock:
        try:
            for module in modules:
                if hasattr(module, "check_integrity"):
                    check = _integrity_check(module.check_integrity, verify, differing)
                    replace(module, "check_integrity", check)
                if getattr(module, "pickle", None) is pickle:
                    replace(module, "pickle", array_pickle)
            yield differing
        finally:
            for module, name, value in saved:
                setattr(module, name, value)


def _integrity_check(
    original: Callable[..., bool], verify: bool, differing: list[str]
) -> Callable[..., bool]:
    """Return a replacement of torchvision's `check_integrity`, with the same signature."""

    def check_integrity(fpath: str | os.PathLike[str], md5: str | None = None) -> bool:
        if not original(fpath):
            return False
        if not verify or original(fpath, md5):
            return True
        differing.append(os.fspath(fpath))
        return False

    return check_integrity


class _ArrayUnpickler(pickle.Unpickler):
    """Refuses every name outside `PICKLE_TYPES`."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in PICKLE_TYPES:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return super().find_class(module, name)


def _load_arrays(file: IO[bytes], **options: Any) -> Any:
    return _ArrayUnpickler(file, **options).load()


def _expected_files(kind: type[VisionDataset], request: DatasetRequest) -> str:
    """Describe what the root of a dataset should contain, as far as its class says."""
    if request.name in EXPECTED_FILES:
        return EXPECTED_FILES[request.name]
    folder = getattr(kind, "base_folder", None)
    if isinstance(folder, str) and hasattr(kind, "train_list"):
        entries = [name for name, *_ in (*kind.train_list, *getattr(kind, "test_list", ()))]
        return f"the folder {folder} with {_enumerate([*entries, kind.meta['filename']], 8)}"
    if isinstance(getattr(kind, "resources", None), list):
        names = [
            os.path.splitext(entry[0])[0] for entry in kind.resources if isinstance(entry[0], str)
        ]
        return f"the folder {request.name}/raw with {_enumerate(names, 8)}"
    return f"the files that torchvision's documentation of {request.name} names"


def _enumerate(names: list[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
