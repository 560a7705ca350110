"""Expand brace patterns in names, as shells and WebDataset write them.

Such as `{000..127}` and `{a,b}`; a name can have several, also nested.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

MAX_NAMES = 1_000_000
"""A pattern that stands for more names is taken for a mistake."""

_NUMBERS = re.compile(r"(-?[0-9]{1,18})\.\.(-?[0-9]{1,18})(?:\.\.(-?[0-9]{1,18}))?")
_LETTERS = re.compile(r"([A-Za-z])\.\.([A-Za-z])")


def first_brace(text: str) -> int:
    """Return the position of the first brace that stands for several names.

    -1 if there is none, as in `{1}` or `a{b`.
    """
    return next((start for start, _, _ in _braces(text)), -1)


def expand(pattern: str) -> list[str]:
    """Return every name that a pattern stands for, in order; a name without braces as it is.

    `{1..3}` counts, also downwards and in steps (`{0..9..3}`). If a limit has leading zeros, all
    numbers are as wide as the wider limit. `{a..e}` are letters, `{train,val}` alternatives.

    Raises
    ------
    ValueError
        If the pattern stands for more than `MAX_NAMES` names.
    """
    if _count(pattern) > MAX_NAMES:
        raise ValueError(f"the braces stand for more than {MAX_NAMES:,} names")
    return list(_expanded(pattern))


def _count(text: str) -> int:
    """Return the number of names that a pattern stands for."""
    result, end = 1, 0
    for start, content, stop in _braces(text):
        if start < end:
            continue  # nested in the previous braces
        steps = _steps(content)
        result *= len(steps) if steps is not None else sum(map(_count, _alternatives(content)))
        end = stop
    return result


def _expanded(text: str) -> Iterator[str]:
    for start, content, stop in _braces(text):
        for option in _options(content):
            for rest in _expanded(text[stop:]):
                yield text[:start] + option + rest
        return
    yield text


def _braces(text: str) -> Iterator[tuple[int, str, int]]:
    """Start, content and end (exclusive) of each pair of braces that stands for several names."""
    for start, character in enumerate(text):
        if character != "{":
            continue
        depth = 0
        for stop in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[stop], 0)
            if depth == 0:
                content = text[start + 1 : stop]
                if len(_alternatives(content)) > 1 or _steps(content) is not None:
                    yield start, content, stop + 1
                break


def _options(content: str) -> Iterator[str]:
    numbers, steps = _NUMBERS.fullmatch(content), _steps(content)
    if numbers is not None and steps is not None:
        padded = any(
            len(digits := limit.lstrip("-")) > 1 and digits[0] == "0"
            for limit in (numbers[1], numbers[2])
        )
        width = max(len(numbers[1]), len(numbers[2])) if padded else 0
        for number in steps:
            yield f"{number:0{width}d}" if width else str(number)
    elif steps is not None:
        yield from map(chr, steps)
    else:
        for part in _alternatives(content):
            yield from _expanded(part)


def _steps(content: str) -> range | None:
    """Return the numbers or character codes of a range such as `1..3`, None for anything else."""
    numbers, letters = _NUMBERS.fullmatch(content), _LETTERS.fullmatch(content)
    if numbers is not None:
        low, high, step = int(numbers[1]), int(numbers[2]), abs(int(numbers[3] or 1)) or 1
    elif letters is not None:
        low, high, step = ord(letters[1]), ord(letters[2]), 1
    else:
        return None
    return range(low, high + 1, step) if low <= high else range(low, high - 1, -step)


def _alternatives(content: str) -> list[str]:
    """Return the parts between commas outside inner braces."""
    parts, depth, begin = [], 0, 0
    for position, character in enumerate(content):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append(content[begin:position])
            begin = position + 1
    return [*parts, content[begin:]]
