"""The files that belong to a file list: images and class names; Places365 is found by its names.

Places365 (B. Zhou et al., Places: A 10 Million Image Database for Scene Recognition, TPAMI 2018)
consists of a list such as `places365_train_standard.txt`, whose lines are
`/a/airfield/00000001.jpg 0`, next to a folder `data_256` or `data_large` (`data_256_standard` and
so on if torchvision unpacked it), and `categories_places365.txt` with the names of the classes.
"""

from __future__ import annotations

from raypipe import storage
from raypipe.errors import SourceError

LIST_EXTENSIONS = (".csv", ".tsv", ".txt")
"""File name endings of file lists."""
CATEGORIES = "categories_places365.txt"
_TRAIN = {"places365_train_standard.txt": "standard", "places365_train_challenge.txt": "challenge"}
"""Training list -> the ending that torchvision gives to its image folders."""
_VALIDATION = "places365_val.txt"
_SIZES = ("256", "large")
_SMALL_PIXELS = 256
"""Side of the smaller images."""


def training_list(uri: str) -> str | None:
    """Return the training list of Places365 in a folder; None if it has none.

    Of two lists, the one whose own image folder exists, else that of Places365-Standard.
    """
    lists = [name for name in _TRAIN if storage.exists(storage.join(uri, name))]
    if len(lists) == 2:
        has_images = {
            name: any(
                storage.exists(storage.join(uri, f"data_{size}_{_TRAIN[name]}")) for size in _SIZES
            )
            for name in lists
        }
        lists.sort(key=lambda name: not has_images[name])  # stable: Standard comes first
    return storage.join(uri, lists[0]) if lists else None


def find_list(uri: str) -> str:
    """Return the list that a file or folder stands for.

    Raises
    ------
    SourceError
        If a folder has no list, or several.
    """
    if uri.lower().endswith(LIST_EXTENSIONS) or storage.is_file(uri):
        return uri
    places = training_list(uri)
    if places is not None:
        return places
    names = sorted(
        name
        for name in storage.names(uri)
        if name.lower().endswith(LIST_EXTENSIONS) and name != CATEGORIES
    )
    if len(names) != 1:
        problem = (
            f"several lists: {', '.join(names[:5])}"
            if names
            else f"no {' or '.join(LIST_EXTENSIONS)} file here"
        )
        raise SourceError(f"{uri}: {problem}; set source.uri to the file list itself")
    return storage.join(uri, names[0])


def image_root(uri: str, image_size: int) -> str:
    """Return the folder that the paths of a list are relative to.

    That is the list's own folder; for Places365, one of the image folders next to it: the smaller
    images, unless `image_size` exceeds their size in pixels.
    """
    folder, name = _folder(uri), storage.name(uri)
    sizes = _SIZES if image_size <= _SMALL_PIXELS else tuple(reversed(_SIZES))
    if name in _TRAIN:
        candidates = [
            f"data_{size}{ending}" for size in sizes for ending in (f"_{_TRAIN[name]}", "")
        ]
    elif name == _VALIDATION:
        candidates = [f"val_{size}" for size in sizes]
    else:
        candidates = []
    for candidate in candidates:
        if storage.exists(storage.join(folder, candidate)):
            return storage.join(folder, candidate)
    return folder


def class_names_file(uri: str) -> str | None:
    """Return the file with the class names next to a list of Places365, if it exists."""
    if storage.name(uri) not in _TRAIN and storage.name(uri) != _VALIDATION:
        return None
    categories = storage.join(_folder(uri), CATEGORIES)
    return categories if storage.exists(categories) else None


def _folder(uri: str) -> str:
    return uri.rpartition("/")[0] or ("/" if uri.startswith("/") else ".")
