"""Class map files (`source.class_map`): which class a folder, or a label in words, stands for.

JSON: {"n01440764": "tench", ...} or {"cat": 0, "dog": 1}. Text: a line per class, the folder and then the class's name or number
(`n01440764 tench, Tinca tinca`, as ImageNet's LOC_synset_mapping.txt; `/a/airfield 0`, as Places365's categories_places365.txt).
Where every class has a number, that is its index; else the order of the file. Folders with equal numbers are one class; folders with
equal names are not, since ImageNet has two classes that are called crane.
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
from raypipe.sources.base import MOST_CLASSES


@dataclass(frozen=True)
class ClassFile:
    """index: folder or label -> class 0 .. C-1; names: one per class."""

    index: dict[str, int]
    names: tuple[str, ...]

    def of_path(self, path: str) -> int | None:
        """The class of the longest folder of a path that is listed. Of a file in no folder, what precedes the first `_` of its name counts."""
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
        """Changes when a class does."""
        return hashlib.blake2b(
            json.dumps([self.index, self.names]).encode(), digest_size=12
        ).hexdigest()


def read_class_file(uri: str) -> ClassFile:
    """Raises SourceError where the file is missing or says nothing that can be understood."""
    try:
        text = storage.read_bytes(uri).decode("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError):
        raise SourceError(f"{uri}: no such file; set source.class_map") from None
    except UnicodeDecodeError as error:
        raise SourceError(f"{uri}: the class map is not UTF-8 ({error})") from None
    pairs = (
        _from_json(uri, text)
        if uri.lower().endswith(".json") or text.lstrip().startswith("{")
        else _from_lines(text)
    )
    if not pairs:
        raise SourceError(f"{uri}: the class map names no class")
    repeated = [
        folder for folder, count in Counter(folder for folder, _ in pairs).items() if count > 1
    ]
    if repeated:
        raise SourceError(f"{uri}: the class map names {repeated[0]!r} twice")
    numbers = {folder: value for folder, value in pairs if isinstance(value, int)}
    if len(numbers) == len(pairs):
        return _numbered(uri, numbers)
    if numbers:
        raise SourceError(
            f"{uri}: the class map gives numbers (such as of {min(numbers)!r}) and names; use one kind"
        )
    words = Counter(value for _, value in pairs)
    names = [f"{value} ({folder})" if words[value] > 1 else str(value) for folder, value in pairs]
    return ClassFile({folder: number for number, (folder, _) in enumerate(pairs)}, tuple(names))


Pairs = Sequence[tuple[str, int | str]]


def _numbered(uri: str, numbers: dict[str, int]) -> ClassFile:
    wrong = [folder for folder, number in numbers.items() if not 0 <= number < MOST_CLASSES]
    if wrong:
        raise SourceError(
            f"{uri}: the class map gives {wrong[0]!r} the number {numbers[wrong[0]]}; 0 is the first"
        )
    names = [str(number) for number in range(max(numbers.values()) + 1)]
    for folder, number in reversed(numbers.items()):
        names[number] = folder
    return ClassFile(numbers, tuple(names))


def _from_json(uri: str, text: str) -> Pairs:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{uri}: the class map is not valid JSON ({error})") from None
    if not isinstance(data, dict) or not all(type(value) in (int, str) for value in data.values()):
        raise SourceError(f"{uri}: the class map should be {{folder: name or number, ...}}")
    return [(folder.strip("/"), value) for folder, value in data.items()]


def _from_lines(text: str) -> Pairs:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    ends = [line.rsplit(None, 1) for line in lines]
    if all(len(end) == 2 and end[1].isdecimal() for end in ends):
        return [(folder.rstrip(",").strip().strip("/"), int(number)) for folder, number in ends]
    split = [line.split("\t" if "\t" in line else None, 1) for line in lines]
    return [
        (
            parts[0].strip().strip("/"),
            parts[-1].strip() if len(parts) == 2 else parts[0].strip().strip("/"),
        )
        for parts in split
    ]
