"""Recognise the splits of a dataset by the names of files and folders.

A source is one split. Several in one folder, such as `train-*` and `test-*`, would be scored and
pruned together, so they are refused.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from raypipe.errors import SourceError
from raypipe.text import counted


class Splits(NamedTuple):
    """Several splits among the files of a source.

    Attributes
    ----------
    counts : str
        Such as "test (1 file), train (8 files)".
    include : str
        Pattern that only the files of one split match, the training split if there is one; "" if
        none was found.
    """

    counts: str
    include: str


_WORDS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "holdout": "test",
    "eval": "validation",
}
"""Word in a name -> split."""
SPLIT_COLUMN = "split"
"""Column of a table that names the split of each row, in any case."""
SPLIT_ALIASES = ("subset", "phase", "usage", "is_valid", "is_val", "is_test", "is_train")
"""Other columns that name the split of each row, or tell whether it belongs to one."""
_WORD = re.compile(
    r"(?<![a-z0-9])(" + "|".join(_WORDS) + r")(?:[0-9]{4})?(?![a-z0-9])", re.IGNORECASE
)


def split_of(word: str) -> str:
    """Return the split that a word means: train, validation or test; "" for any other word."""
    return _WORDS.get(word.lower(), "")


def split_of_value(column: str, value: object) -> str:
    """Return the split that a value of a column means; "" for any other value.

    A column such as `is_valid` has true and false, as booleans, numbers or text.
    """
    word = column.lower().removeprefix("is_")
    if word == column.lower():
        return split_of(str(value))
    inside = {"true": True, "1": True, "false": False, "0": False}.get(str(value).lower())
    if inside is None:
        return ""
    return split_of(word) if inside else "test" if word == "train" else "train"


def split_alias(columns: Sequence[str], used: Collection[str | None]) -> str | None:
    """Return the column of `SPLIT_ALIASES` among some columns, or None; see `split_column`."""
    lowered = {name.lower(): name for name in reversed(columns) if name not in used}
    return next((lowered[name] for name in SPLIT_ALIASES if name in lowered), None)


def split_column(columns: Sequence[str], used: Collection[str | None]) -> str | None:
    """Return the column that names the split of each row, or None.

    A column in `used` has another meaning, such as the labels, and is not returned.
    """
    lowered = {name.lower(): name for name in reversed(columns)}
    column = lowered.get(SPLIT_COLUMN)
    return None if column in used else column


class SplitOfFiles:
    """Checks that the rows of all files of a source are of the same split.

    Parameters
    ----------
    remedy : str
        How to read the files of one split, for the message.
    """

    def __init__(
        self, remedy: str = "set source.include to a pattern that only the files of one split match"
    ) -> None:
        self._remedy = remedy
        self._first: tuple[str, str] | None = None

    def add(self, path: str, split: str) -> None:
        """Add a file and the split of its rows, "" if they name none.

        Raises
        ------
        SourceError
            If a file before it is of another split.
        """
        if not split:
            return
        self._first = self._first or (path, split)
        before, of_before = self._first
        if split != of_before:
            raise SourceError(
                f"{path}: its column {SPLIT_COLUMN!r} names the split {split}, but that of "
                f"{before} names {of_before}; {self._remedy}, or drop the column to read all as one"
            )


def split_word(path: str) -> str:
    """Return the word that names the split of a file; "" if none does, or several do.

    The name of the file counts first, then its folders from the innermost.
    """
    for part in reversed(path.split("/")):
        words = {match[1] for match in _WORD.finditer(part)}
        if words:
            return words.pop() if len(words) == 1 else ""
    return ""


def split_folders(folders: Sequence[str]) -> list[str]:
    """Return the folders that are splits of a dataset, not classes.

    They are called as a split, such as `train`, or differ in the word of the split alone, such as
    `seg_train` and `seg_test`.
    """
    alike: dict[str, set[str]] = {}
    for folder in folders:
        if word := split_word(folder):
            rest = _WORD.sub("", folder).lower()
            alike.setdefault(rest, set()).add(split_of(word))
    return [
        folder
        for folder in folders
        if folder.lower() in _WORDS
        or (split_word(folder) and len(alike[_WORD.sub("", folder).lower()]) > 1)
    ]


def several_splits(paths: Sequence[str]) -> Splits | None:
    """Return the splits that the names of files show; None unless there are several."""
    words = [split_word(path) for path in paths]
    by_split: dict[str, list[int]] = {}
    for row, word in enumerate(words):
        if word:
            by_split.setdefault(_WORDS[word.lower()], []).append(row)
    if len(by_split) < 2:
        return None
    largest = max(by_split, key=lambda split: len(by_split[split]))
    chosen = set(by_split["train" if "train" in by_split else largest])
    inside = [path for row, path in enumerate(paths) if row in chosen]
    outside = [path for row, path in enumerate(paths) if row not in chosen]
    return Splits(
        ", ".join(
            f"{split} ({counted(len(by_split[split]), 'file')})" for split in sorted(by_split)
        ),
        _include({words[row] for row in chosen}, inside, outside),
    )


def _include(words: Iterable[str], inside: Sequence[str], outside: Sequence[str]) -> str:
    """Return a pattern that all of some paths match and none of the others; "" if none is found."""
    shapes = ("{}/*", "*/{}/*", "{}-*", "{}_*", "{}.*", "*-{}-*", "*-{}.*", "*_{}_*", "*{}*")
    for pattern in (shape.format(word) for shape in shapes for word in sorted(words)):
        if all(fnmatch.fnmatchcase(path, pattern) for path in inside) and not any(
            fnmatch.fnmatchcase(path, pattern) for path in outside
        ):
            return pattern
    return ""
