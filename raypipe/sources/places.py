"""Which list, which folder of images and which class names belong together in a folder; that of Places365 is known by its names.

Places365 (B. Zhou et al., Places: A 10 Million Image Database for Scene Recognition, TPAMI 2018) comes as a list such as
`places365_train_standard.txt`, whose lines are `/a/airfield/00000001.jpg 0`, beside `data_256` or `data_large` (`data_256_standard`
and so on where torchvision unpacked it), and `categories_places365.txt` with the names of the classes.
"""

from __future__ import annotations

from raypipe import storage
from raypipe.errors import SourceError

ENDINGS = (".csv", ".tsv", ".txt")
CATEGORIES = "categories_places365.txt"
_TRAIN = {"places365_train_standard.txt": "standard", "places365_train_challenge.txt": "challenge"}
_VALIDATION = "places365_val.txt"
_SIZES = ("256", "large")
_PIXELS = 256
"""Side of the smaller images."""


def places_list(uri: str) -> str | None:
    """The training list of Places365 in a folder; of two the one whose own images are there, else that of Places365-Standard."""
    found = [name for name in _TRAIN if storage.exists(storage.join(uri, name))]
    if len(found) == 2:
        own = {
            name: any(
                storage.exists(storage.join(uri, f"data_{size}_{_TRAIN[name]}")) for size in _SIZES
            )
            for name in found
        }
        found = sorted(found, key=lambda name: (not own[name], list(_TRAIN).index(name)))
    return storage.join(uri, found[0]) if found else None


def find_list(uri: str) -> str:
    """The list that a file or folder stands for. Raises SourceError where a folder has none, or several."""
    if uri.lower().endswith(ENDINGS) or storage.is_file(uri):
        return uri
    places = places_list(uri)
    if places is not None:
        return places
    names = sorted(
        name for name in storage.names(uri) if name.lower().endswith(ENDINGS) and name != CATEGORIES
    )
    if len(names) != 1:
        found = (
            f"several lists: {', '.join(names[:5])}"
            if names
            else f"no {' or '.join(ENDINGS)} file here"
        )
        raise SourceError(f"{uri}: {found}; set source.uri to the file list itself")
    return storage.join(uri, names[0])


def root_of(uri: str, image_size: int) -> str:
    """The folder that a list's paths are below: its own, but of Places365 the images that are there.

    Of the smaller and the larger ones the smaller, unless `image_size` pixels are more than these have.
    """
    folder, name = _folder(uri), storage.name(uri)
    sizes = _SIZES if image_size <= _PIXELS else reversed(_SIZES)
    kinds = (f"_{_TRAIN[name]}", "") if name in _TRAIN else ()
    folders = (
        [f"data_{size}{kind}" for size in sizes for kind in kinds]
        if kinds
        else [f"val_{size}" for size in sizes]
    )
    if kinds or name == _VALIDATION:
        for candidate in folders:
            if storage.exists(storage.join(folder, candidate)):
                return storage.join(folder, candidate)
    return folder


def class_file(uri: str) -> str | None:
    """The file with the class names of a list of Places365, where it lies beside it."""
    if storage.name(uri) not in _TRAIN and storage.name(uri) != _VALIDATION:
        return None
    categories = storage.join(_folder(uri), CATEGORIES)
    return categories if storage.exists(categories) else None


def _folder(uri: str) -> str:
    return uri.rpartition("/")[0] or ("/" if uri.startswith("/") else ".")
