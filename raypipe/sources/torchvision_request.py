"""Which torchvision dataset the settings request, and the arguments of its constructor.

torchvision is imported on use: it brings torch with it, which listing any other source does not
need.
"""

from __future__ import annotations

import difflib
import inspect
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

import yaml

from raypipe.config import SourceSettings
from raypipe.errors import SourceError

if TYPE_CHECKING:
    from torchvision.datasets import VisionDataset

EXAMPLE = "torchvision://CIFAR10 or torchvision://Places365?small=true"
RESERVED_ARGUMENTS = {
    "root": "source.root",
    "download": "source.download",
    "train": "source.split",
    "loader": "",
    "transform": "",
    "target_transform": "",
    "transforms": "",
}
"""Constructor arguments that cannot be given in the URI, and the setting to use instead, if any."""
SPLITS = {
    "Country211": ("split", {"val": "valid"}),
    "INaturalist": ("version", {"train": "2021_train", "val": "2021_valid"}),
    "OxfordIIITPet": ("split", {"train": "trainval"}),
    "Places365": ("split", {"train": "train-standard"}),
}
"""Datasets with other names for the usual splits: the argument, and their names.

`source.split` accepts those names as well.
"""


@dataclass(frozen=True)
class DatasetRequest:
    """A torchvision dataset as the settings describe it.

    Attributes
    ----------
    uri : str
        `source.uri`, for messages.
    name : str
        Name of the class in torchvision.datasets.
    root : str
        Absolute path of the local folder with the files.
    split : str
        `source.split`; "train" by default.
    options : tuple of (str, Any)
        Further arguments of the constructor, from the URI.
    download, verify : bool
        `source.download` and `source.verify`.
    """

    uri: str
    name: str
    root: str
    split: str
    options: tuple[tuple[str, Any], ...]
    download: bool
    verify: bool


class ImagePath(NamedTuple):
    """What the loader that raypipe passes to torchvision returns instead of a decoded image."""

    path: str


def parse_request(settings: SourceSettings) -> DatasetRequest:
    """Return the dataset that the settings request. Does not import torchvision.

    Raises
    ------
    SourceError
        If the URI or `source.root` is not valid.
    """
    parts = urlsplit(settings.uri)
    if parts.scheme != "torchvision" or not parts.netloc or parts.path.strip("/"):
        raise SourceError(
            f"{settings.uri}: expected the name of a torchvision dataset, such as {EXAMPLE}"
        )
    return DatasetRequest(
        settings.uri,
        parts.netloc,
        _local_root(settings.root),
        settings.split or "train",
        tuple(_parse_options(settings.uri, parts.query).items()),
        settings.download,
        settings.verify,
    )


def _parse_options(uri: str, query: str) -> dict[str, Any]:
    """Return the arguments in the query of a URI. Values are YAML: words, numbers and lists."""
    options: dict[str, Any] = {}
    for name, text in parse_qsl(query, keep_blank_values=True):
        if name in RESERVED_ARGUMENTS:
            setting = RESERVED_ARGUMENTS[name]
            hint = f"; set {setting}" if setting else ""
            raise SourceError(f"{uri}: {name} is not given in the URI{hint}")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        if isinstance(value, dict):
            raise SourceError(f"{uri}: {name} = {text!r} is not a word, a number or a list")
        options[name] = tuple(value) if isinstance(value, list) else value
    return options


def _local_root(root: str | None) -> str:
    """Return the absolute path of `source.root`, or of the default folder in the user's cache."""
    if not root:
        cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        root = os.path.join(cache, "raypipe", "torchvision")
    root = root.removeprefix("file://")
    if "://" in root:
        raise SourceError(
            f"{root}: torchvision reads local folders only; "
            "set source.root to one that every machine sees"
        )
    return os.path.abspath(os.path.expanduser(root))


def dataset_class(request: DatasetRequest) -> type[VisionDataset]:
    """Return the class of torchvision.datasets with the requested name.

    Raises
    ------
    SourceError
        If there is none.
    """
    from torchvision import datasets

    if request.name not in datasets.__all__ or not inspect.isclass(getattr(datasets, request.name)):
        near = difflib.get_close_matches(request.name, datasets.__all__, n=3)
        hint = (
            f"; did you mean {', '.join(near)}?"
            if near
            else f"; it has {', '.join(sorted(datasets.__all__))}"
        )
        raise SourceError(f"{request.uri}: torchvision has no dataset {request.name!r}{hint}")
    return getattr(datasets, request.name)


def constructor_parameters(kind: type[VisionDataset]) -> dict[str, inspect.Parameter]:
    """Return the parameters of a constructor, including those it passes on to base classes."""
    parameters: dict[str, inspect.Parameter] = {}
    for base in kind.__mro__:
        constructor = vars(base).get("__init__")
        if constructor is None:
            continue
        own = list(inspect.signature(constructor).parameters.values())[1:]
        for parameter in own:
            if parameter.kind not in {parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL}:
                parameters.setdefault(parameter.name, parameter)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in own):
            break
    return parameters


def has_splits(request: DatasetRequest, kind: type[VisionDataset]) -> bool:
    """Return whether `source.split` makes a difference for this class."""
    parameters = constructor_parameters(kind)
    return request.name in SPLITS or "train" in parameters or "split" in parameters


def constructor_arguments(request: DatasetRequest, kind: type[VisionDataset]) -> dict[str, Any]:
    """Return the arguments of the constructor, with which it downloads nothing.

    Raises
    ------
    SourceError
        If the URI has an unknown argument, lacks a required one, or the split does not exist.
    """
    parameters = constructor_parameters(kind)
    arguments = dict(request.options)
    for name in arguments:
        if name not in parameters:
            allowed = ", ".join(name for name in parameters if name not in RESERVED_ARGUMENTS)
            raise SourceError(
                f"{request.uri}: {request.name} has no argument {name!r}; allowed: "
                f"{allowed or 'none'}"
            )
    _set_split(request, parameters, arguments)
    if "root" in parameters:
        arguments["root"] = request.root
    if "download" in parameters:
        arguments["download"] = False
    if "loader" in parameters:
        arguments["loader"] = ImagePath
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in arguments:
            raise SourceError(
                f"{request.uri}: {request.name} needs {name}: "
                f"torchvision://{request.name}?{name}=..."
            )
    return arguments


def _set_split(
    request: DatasetRequest, parameters: dict[str, inspect.Parameter], arguments: dict[str, Any]
) -> None:
    """Add the argument that selects the split."""
    split = request.split
    name, split_names = SPLITS.get(request.name, ("split", {}))
    if "train" in parameters:
        # A class with both, such as EMNIST, means something else by `split`: that is in the URI.
        if split not in {"train", "test"}:
            raise SourceError(
                f"{request.uri}: source.split = {split!r}, but {request.name} has train and test"
            )
        arguments["train"] = split == "train"
    elif name in parameters:
        arguments.setdefault(name, split_names.get(split, split))
    elif split != "train":
        raise SourceError(
            f"{request.uri}: source.split = {split!r}, but {request.name} has no splits; "
            "leave it at train"
        )
