"""Class map files (`source.class_map`): which class a folder, or a label in text, stands for.

JSON: {"n01440764": "tench", ...} or {"cat": 0, "dog": 1}. Text: one class per line, the folder
followed by the class's name or number (`n01440764 tench, Tinca tinca`, as in ImageNet's
LOC_synset_mapping.txt; `/a/airfield 0`, as in Places365's categories_places365.txt).

If every class has a number, that is its index; otherwise the order of the file counts. Folders with
equal numbers are one class. Folders with equal names are not, since ImageNet has two classes called
crane.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from raypipe import storage
from raypipe.errors import SourceError
from raypipe.sources.classes import MAX_CLASSES

_Pairs = Sequence[tuple[str, int | str]]
"""Folder or label, and the name or number of its class."""


@dataclass(frozen=True)
class ClassFile:
    """Content of a class map file.

    Attributes
    ----------
    index : dict of str to int
        Folder or label -> class 0 .. C-1.
    names : tuple of str
        One per class.
    """

    index: dict[str, int]
    names: tuple[str, ...]

    def of_path(self, path: str) -> int | None:
        """Return the class of the longest folder of a path that is listed.

        For a file in no folder, the part of its name before the first `_` counts.
        """
        folder, slash, name = path.rpartition("/")
        if not slash:
            return self.index.get(name.partition("_")[0])
        while folder:
            if folder in self.index:
                return self.index[folder]
            folder = folder.rpartition("/")[0]
        return None

    @functools.cached_property
    def digest(self) -> str:
        """Hash of the content."""
        return hashlib.blake2b(
            json.dumps([self.index, self.names]).encode(), digest_size=12
        ).hexdigest()


def read_class_file(uri: str) -> ClassFile:
    """Read a class map file. Raises SourceError if it is missing or malformed."""
    try:
        content = storage.read_bytes(uri).decode("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError):
        raise SourceError(f"{uri}: no such file; set source.class_map") from None
    except UnicodeDecodeError as error:
        raise SourceError(f"{uri}: the class map is not UTF-8 ({error})") from None
    is_json = uri.lower().endswith(".json") or content.lstrip().startswith("{")
    pairs = _parse_json(uri, content) if is_json else _parse_lines(content)
    if not pairs:
        raise SourceError(f"{uri}: the class map names no class")
    for folder, count in Counter(folder for folder, _ in pairs).items():
        if count > 1:
            raise SourceError(f"{uri}: the class map names {folder!r} twice")
    numbers = {folder: value for folder, value in pairs if isinstance(value, int)}
    if len(numbers) == len(pairs):
        return _from_numbers(uri, numbers)
    if numbers:
        raise SourceError(
            f"{uri}: the class map gives numbers (such as of {min(numbers)!r}) and names; "
            "use one kind"
        )
    return _from_names(pairs)


def _from_names(pairs: _Pairs) -> ClassFile:
    """Classes in the order of the file; repeated names are followed by their folder."""
    counts = Counter(name for _, name in pairs)
    names = [f"{name} ({folder})" if counts[name] > 1 else str(name) for folder, name in pairs]
    return ClassFile({folder: number for number, (folder, _) in enumerate(pairs)}, tuple(names))


def _from_numbers(uri: str, numbers: dict[str, int]) -> ClassFile:
    """Classes by number; each is named after its first folder."""
    for folder, number in numbers.items():
        if not 0 <= number < MAX_CLASSES:
            raise SourceError(
                f"{uri}: the class map gives {folder!r} the number {number}; numbers begin at 0 "
                f"and end below {MAX_CLASSES}"
            )
    names = [str(number) for number in range(max(numbers.values()) + 1)]
    for folder, number in reversed(numbers.items()):
        names[number] = folder
    return ClassFile(numbers, tuple(names))


def _parse_json(uri: str, content: str) -> _Pairs:
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{uri}: the class map is not valid JSON ({error})") from None
    if not isinstance(data, dict) or not all(type(value) in (int, str) for value in data.values()):
        raise SourceError(f"{uri}: the class map should be {{folder: name or number, ...}}")
    return [(folder.strip("/"), value) for folder, value in data.items()]


def _parse_lines(content: str) -> _Pairs:
    lines = [line.strip() for line in content.splitlines() if line.strip()]
    ends = [line.rsplit(None, 1) for line in lines]
    if all(len(end) == 2 and end[1].isdecimal() for end in ends):
        return [(folder.rstrip(",").strip().strip("/"), int(number)) for folder, number in ends]
    pairs = []
    for line in lines:
        folder, *name = line.split("\t" if "\t" in line else None, 1)
        folder = folder.strip().strip("/")
        pairs.append((folder, name[0].strip() if name else folder))
    return pairs
