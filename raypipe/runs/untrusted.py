"""A run folder of unknown origin: what is wrong in it becomes one sentence, and nothing outside of it is written.

`raypipe status`, `report` and `select` can be pointed at a folder that somebody else made. Its files hold no code, and
their readers bound what they take (`raypipe.storage.read_whole`, `raypipe.storage.untrusted_parquet`). What remains: figures
that are missing or have the wrong type, names that lead out of the folder, and text with terminal control codes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

from raypipe import storage
from raypipe.errors import RunError
from raypipe.runs.layout import Run

OUT_OF_PLACE = (
    ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError, pa.ArrowException,
)  # fmt: skip
"""What reading files of another form than expected ends in."""


@contextmanager
def damage_as_error(uri: str) -> Iterator[None]:
    """What a run holds that cannot be understood is raised as a RunError of one line; errors of ours stay what they are."""
    try:
        yield
    except FileNotFoundError as error:
        raise RunError(
            f"{uri}: {error.filename or error} is missing; is the run finished, and all of it here?"
        ) from error
    except OSError as error:  # Arrow raises one for damaged content, too
        raise RunError(f"{uri}: {' '.join(str(error).split())[:300]}") from error
    except OUT_OF_PLACE as error:
        what = " ".join(str(error).split())[:200]
        raise RunError(
            f"{uri}: a file of this run is not as raypipe writes it ({type(error).__name__}: {what})"
        ) from error


def refuse_links_out(run: Run, *folders: str) -> None:
    """Raises RunError where a folder of a local run that is to be written is a link to somewhere else."""
    if not storage.is_local(run.uri):
        return
    root = os.path.realpath(storage.filesystem(run.uri)[1])
    for folder in folders:
        place = os.path.realpath(os.path.join(root, folder))
        if os.path.commonpath([root, place]) != root:
            raise RunError(
                f"{run.path(folder)}: leads out of the run, to {place}; nothing is written there. Replace the link by a folder"
            )


def printable(text: str) -> str:
    """Text without what a terminal would act on."""
    return re.sub(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]",
        "\N{REPLACEMENT CHARACTER}",
        text,
    )
