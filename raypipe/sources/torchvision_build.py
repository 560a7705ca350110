"""Makes a torchvision dataset from its name: which arguments it takes, whether its files are there, fetching them where it can.

torchvision is imported on use: it brings torch with it, which listing any other source does not need.
"""

from __future__ import annotations

import difflib
import inspect
import os
import pickle
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

import yaml

from raypipe.config import SourceSettings
from raypipe.errors import SourceError

EXAMPLE = "torchvision://CIFAR10 or torchvision://Places365?small=true"
OURS = {
    "root": "source.root",
    "download": "source.download",
    "train": "source.split",
    "loader": "",
    "transform": "",
    "target_transform": "",
    "transforms": "",
}
"""Arguments of the constructors that are not given in the URI, and the setting to use instead."""
SPLITS = {
    "Country211": ("split", {"val": "valid"}),
    "INaturalist": ("version", {"train": "2021_train", "val": "2021_valid"}),
    "OxfordIIITPet": ("split", {"train": "trainval"}),
    "Places365": ("split", {"train": "train-standard"}),
}
"""Classes that call the usual splits otherwise: the argument, and their words. Those words themselves are allowed as well."""
EXPECTED = {
    "ImageNet": (
        "ILSVRC2012_devkit_t12.tar.gz and ILSVRC2012_img_train.tar (or ILSVRC2012_img_val.tar), which image-net.org gives to who "
        "registers there and torchvision cannot download, or meta.bin and the folder train (or val) that torchvision makes of them"
    ),
    "Places365": (
        "categories_places365.txt, places365_train_standard.txt (or the list of another split) and the folder of the images: "
        "data_large_standard, or data_256_standard with small=true"
    ),
}
PLAIN_TYPES = {
    (module, name)
    for package in ("numpy.core", "numpy._core")
    for module, name in (
        (f"{package}.multiarray", "_reconstruct"),
        (f"{package}.multiarray", "scalar"),
        (f"{package}.numeric", "_frombuffer"),
    )
} | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
"""What a pickle of arrays, lists and dictionaries refers to; one that refers to anything else is not opened."""


@dataclass(frozen=True)
class Request:
    """Which dataset: name of the class, folder, split, further arguments of its constructor, and what is allowed."""

    uri: str
    name: str
    root: str
    split: str
    options: tuple[tuple[str, Any], ...]
    download: bool
    verify: bool


class File(NamedTuple):
    """What our loader gives in place of a decoded image."""

    path: str


def parse_request(settings: SourceSettings) -> Request:
    """What the settings ask for. Imports nothing of torchvision. Raises SourceError for a URI that is not of this kind."""
    parts = urlsplit(settings.uri)
    if parts.scheme != "torchvision" or not parts.netloc or parts.path.strip("/"):
        raise SourceError(
            f"{settings.uri}: expected the name of a torchvision dataset, such as {EXAMPLE}"
        )
    options: dict[str, Any] = {}
    for name, text in parse_qsl(parts.query, keep_blank_values=True):
        if name in OURS:
            raise SourceError(
                f"{settings.uri}: {name} is not given in the URI"
                + (f"; set {OURS[name]}" if OURS[name] else "")
            )
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        options[name] = tuple(value) if isinstance(value, list) else value
        if isinstance(value, dict):
            raise SourceError(
                f"{settings.uri}: {name} = {text!r} is not a word, a number or a list"
            )
    root = settings.root or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "raypipe", "torchvision"
    )
    root = root.removeprefix("file://")
    if "://" in root:
        raise SourceError(
            f"{root}: torchvision reads local folders only; set source.root to one that every machine sees"
        )
    root = os.path.abspath(os.path.expanduser(root))
    return Request(
        settings.uri,
        parts.netloc,
        root,
        settings.split or "train",
        tuple(options.items()),
        settings.download,
        settings.verify,
    )


def build(request: Request, *, fetch: bool) -> Any:
    """The dataset. Where its files are missing and `fetch` is true, they are downloaded if that is possible and allowed.

    Raises SourceError: no such class, arguments it does not take, files that are missing or not what was published.
    """
    kind = dataset_class(request)
    arguments = constructor_arguments(request, kind)
    try:
        return _attempt(request, kind, arguments)
    except _Unavailable as error:
        reason = str(error)
        if error.differing and request.verify:
            raise SourceError(
                f"{request.uri}: {_some(error.differing)} in {request.root} differ from what was published (MD5). To read this "
                "copy as it is, set source.verify=false; to download it anew, remove these files first"
            ) from None
    if fetch and request.download and "download" in parameters(kind):
        try:
            return _attempt(request, kind, {**arguments, "download": True})
        except _Unavailable as error:
            reason = f"the download failed: {error}"
    elif fetch and "download" in parameters(kind):
        reason += "; source.download is false"
    if not fetch:
        reason += "; every machine must see the same files in source.root"
    raise SourceError(
        f"{request.uri}: not found in {request.root} ({reason}). Expected there: {_expected(kind, request)}. "
        "Set source.root to the folder that has them"
    )


def dataset_class(request: Request) -> Any:
    """The class of torchvision.datasets with this name. Raises SourceError when there is none."""
    from torchvision import datasets

    if request.name not in datasets.__all__ or not inspect.isclass(getattr(datasets, request.name)):
        near = difflib.get_close_matches(request.name, datasets.__all__, n=3)
        hint = (
            f"; did you mean {', '.join(near)}?"
            if near
            else f"; there are {', '.join(sorted(datasets.__all__))}"
        )
        raise SourceError(f"{request.uri}: torchvision has no dataset {request.name!r}{hint}")
    return getattr(datasets, request.name)


def parameters(kind: Any) -> dict[str, inspect.Parameter]:
    """What the constructor takes, with what it hands on to those of its base classes."""
    found: dict[str, inspect.Parameter] = {}
    for base in kind.__mro__:
        if "__init__" not in vars(base):
            continue
        own = list(inspect.signature(base.__init__).parameters.values())[1:]
        for parameter in own:
            if parameter.kind not in {parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL}:
                found.setdefault(parameter.name, parameter)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in own):
            break
    return found


def has_splits(request: Request, kind: Any) -> bool:
    """Whether `source.split` chooses anything of this class."""
    return request.name in SPLITS or "train" in parameters(kind) or "split" in parameters(kind)


def constructor_arguments(request: Request, kind: Any) -> dict[str, Any]:
    """Arguments of the constructor; nothing is downloaded with them. Raises SourceError for what it does not take or lacks."""
    takes, split = parameters(kind), request.split
    arguments = dict(request.options)
    unknown = [name for name in arguments if name not in takes]
    if unknown:
        allowed = ", ".join(name for name in takes if name not in OURS) or "none"
        raise SourceError(
            f"{request.uri}: {request.name} takes no {unknown[0]!r}; it takes {allowed}"
        )
    named, words = SPLITS.get(request.name, ("split", {}))
    if (
        "train" in takes
    ):  # where there is a `split` as well, as of EMNIST, that is something else and stands in the URI
        if split not in {"train", "test"}:
            raise SourceError(
                f"{request.uri}: source.split = {split!r}, but {request.name} has train and test"
            )
        arguments["train"] = split == "train"
    elif named in takes:
        arguments.setdefault(named, words.get(split, split))
    elif split != "train":
        raise SourceError(
            f"{request.uri}: source.split = {split!r}, but {request.name} has no splits; leave it at train"
        )
    if "root" in takes:
        arguments["root"] = request.root
    if "download" in takes:
        arguments["download"] = False
    if "loader" in takes:
        arguments["loader"] = File
    missing = [
        name
        for name, value in takes.items()
        if value.default is value.empty and name not in arguments
    ]
    if missing:
        raise SourceError(
            f"{request.uri}: {request.name} needs {missing[0]}: torchvision://{request.name}?{missing[0]}=..."
        )
    return arguments


class _Unavailable(Exception):
    """A dataset could not be made; `differing` are files that are there and not what was published."""

    def __init__(self, reason: str, differing: list[str]) -> None:
        super().__init__(reason)
        self.differing = differing


def _attempt(request: Request, kind: Any, arguments: dict[str, Any]) -> Any:
    with _checks(kind, request.verify) as differing:
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
        except (
            Exception
        ) as error:  # anything: each class has checks of its own, and files may hold anything
            words = " ".join(str(error).split())[:300] or type(error).__name__
            if words.startswith("Unknown value"):
                hint = "; set source.split" if "argument split" in words else ""
                raise SourceError(f"{request.uri}: {words}{hint}") from None
            raise _Unavailable(
                words, [os.path.relpath(path, request.root) for path in differing]
            ) from None
    if absent:
        raise _Unavailable(f"its list names files that are not there, such as {absent}", [])
    return dataset


def _absent_file(dataset: Any) -> str:
    """The first of the files that the dataset lists, where none of some of them is there; "" otherwise."""
    looked = [
        first_item(dataset, index)[0]
        for index in range(0, len(dataset), max(1, len(dataset) // 20))
    ]
    files = [image.path for image in looked if isinstance(image, File)]
    return str(files[0]) if files and not any(map(os.path.exists, files)) else ""


def first_item(dataset: Any, index: int) -> tuple[Any, Any]:
    """Image and target of an item; (None, None) where it cannot be read or is no such pair."""
    try:
        image, target = dataset[index]
    except Exception:
        return None, None
    return image, target


_patching = threading.Lock()


@contextmanager
def _checks(kind: Any, verify: bool) -> Iterator[list[str]]:
    """Notes the files whose checksums torchvision finds wrong, lets them pass without `verify`, and opens pickles of arrays only.

    torchvision's classes call `check_integrity` and `pickle.load` by their modules' names; these are replaced for a moment.
    """
    differing: list[str] = []
    modules = {
        sys.modules[base.__module__]
        for base in kind.__mro__
        if base.__module__.startswith("torchvision.datasets.")
    }
    with _patching:
        saved = []
        for module in modules:
            if hasattr(module, "check_integrity"):
                saved.append((module, "check_integrity", module.check_integrity))
                module.check_integrity = _checker(module.check_integrity, verify, differing)  # type: ignore[attr-defined]
            if getattr(module, "pickle", None) is pickle:
                saved.append((module, "pickle", pickle))
                module.pickle = SimpleNamespace(**{**vars(pickle), "load": _load_arrays})  # type: ignore[attr-defined]
        try:
            yield differing
        finally:
            for module, name, value in saved:
                setattr(module, name, value)


def _checker(original: Any, verify: bool, differing: list[str]) -> Any:
    def check_integrity(fpath: Any, md5: str | None = None) -> bool:
        if not original(fpath):
            return False
        if not verify or original(fpath, md5):
            return True
        differing.append(os.fspath(fpath))
        return False

    return check_integrity


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in PLAIN_TYPES:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return super().find_class(module, name)


def _load_arrays(file: Any, **options: Any) -> Any:
    return _ArrayUnpickler(file, **options).load()


def _expected(kind: Any, request: Request) -> str:
    if request.name in EXPECTED:
        return EXPECTED[request.name]
    folder = getattr(kind, "base_folder", None)
    if isinstance(folder, str) and hasattr(kind, "train_list"):
        entries = [name for name, *_ in (*kind.train_list, *getattr(kind, "test_list", ()))]
        return f"the folder {folder} with {_some([*entries, kind.meta['filename']], 8)}"
    if isinstance(getattr(kind, "resources", None), list):
        names = [
            os.path.splitext(entry[0])[0] for entry in kind.resources if isinstance(entry[0], str)
        ]
        return f"the folder {request.name}/raw with {_some(names, 8)}"
    return f"the files that torchvision's documentation of {request.name} names"


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
