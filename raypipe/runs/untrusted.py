"""Read run folders of unknown origin: report damage in one line, and write nothing outside.

`raypipe status`, `report` and `select` can be applied to a folder that somebody else wrote. Its
files hold no code, and the readers limit sizes (`raypipe.storage.read_whole`,
`raypipe.storage.untrusted_parquet`). This module handles the rest: values that are missing or have
the wrong type, links that lead out of the folder, and text with terminal control codes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

from raypipe import storage
from raypipe.errors import RunError
from raypipe.runs.run import Run
from raypipe.text import error_line, error_text

DAMAGE_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
    pa.ArrowException,
)
"""Exceptions from reading files with unexpected content."""


@contextmanager
def damage_as_error(uri: str) -> Iterator[None]:
    """Turn errors from unexpected content into a RunError of one line; keep those of raypipe."""
    try:
        yield
    except FileNotFoundError as error:
        raise RunError(
            f"{uri}: {error.filename or error} is missing; "
            "check that the run is finished and its folder complete"
        ) from error
    except OSError as error:  # Arrow also raises one for damaged content
        raise RunError(f"{uri}: {error_text(error)}") from error
    except DAMAGE_ERRORS as error:
        raise RunError(
            f"{uri}: a file of this run has unexpected content ({error_line(error)})"
        ) from error


def refuse_links_out(run: Run, *folders: str) -> None:
    """Raise RunError if an output folder of a local run is a link that leads out of the run."""
    if not storage.is_local(run.uri):
        return
    root = os.path.realpath(storage.filesystem(run.uri)[1])
    for folder in folders:
        place = os.path.realpath(os.path.join(root, folder))
        if os.path.commonpath([root, place]) != root:
            raise RunError(
                f"{run.path(folder)}: leads out of the run, to {place}; nothing is written there. "
                "Replace the link with a folder"
            )


def printable(text: str) -> str:
    """Replace characters that a terminal would interpret."""
    return re.sub(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]",
        "\N{REPLACEMENT CHARACTER}",
        text,
    )
