"""Recognise the splits of a dataset by the names of files and folders.

A source is one split. Several in one folder, such as `train-*` and `test-*`, would be scored and
pruned together, so they are refused.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

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
}
"""Word in a name -> split."""
SPLIT_COLUMN = "split"
"""Column of a table that names the split of each row."""
SPLIT_FOLDERS = frozenset(_WORDS)
"""Folders of these names are splits of a dataset, not classes."""
_WORD = re.compile(
    r"(?<![a-z0-9])(" + "|".join(_WORDS) + r")(?:[0-9]{4})?(?![a-z0-9])", re.IGNORECASE
)


def split_of(word: str) -> str:
    """Return the split that a word means: train, validation or test; "" for any other word."""
    return _WORDS.get(word.lower(), "")


def split_word(path: str) -> str:
    """Return the word that names the split of a file; "" if none does, or several do.

    The name of the file counts first, then its folders from the innermost.
    """
    for part in reversed(path.split("/")):
        words = {match[1] for match in _WORD.finditer(part)}
        if words:
            return words.pop() if len(words) == 1 else ""
    return ""


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
