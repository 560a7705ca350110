"""Show what takes room in a finished run, and remove what it no longer needs."""

from __future__ import annotations

from collections.abc import Iterator

from raypipe.errors import RunError
from raypipe.runs.intermediate import (
    REMOVED,
    find_intermediate,
    folder_sizes,
    remove_intermediate,
)
from raypipe.runs.lease import Lease
from raypipe.runs.run import Run
from raypipe.text import size as size_text


def clean_run(run: Run, remove: bool) -> Iterator[str]:
    """Yield lines about what takes room in a finished run and what can go; remove it if asked.

    Raises
    ------
    RunError
        If the run is not finished: an interrupted stage needs what a finished one does not.
    """
    records, config = run.ledger(), run.config()
    unfinished = [
        stage for stage, record in records.items() if record.state not in ("done", "refused")
    ]
    if unfinished or not {"proxy", "extrapolate"} <= set(records):
        missing = ", ".join(unfinished) or "stages are missing"
        raise RunError(
            f"{run.uri}: the run is not finished ({missing}); rerun `raypipe run` to resume, and "
            "clean it then"
        )
    sizes = folder_sizes(run)
    yield f"run         {size_text(sum(sizes.values()))}: {run.uri}"
    for folder, size in sizes.items():
        yield f"{folder:<11} {size_text(size)}"
    found = find_intermediate(run, config)
    if not found.bytes:
        yield "can go      nothing: every file is needed by the run, by evaluate or by a night"
    elif not remove:
        yield (
            f"can go      {size_text(found.bytes)} of {found}, from which no score of the run is "
            "measured. Nothing is removed without --yes"
        )
    else:
        with Lease(run):
            removed, size = remove_intermediate(run, config)
            records["proxy"].detail[REMOVED] = removed
            run.write_ledger(records)
        yield f"removed     {size_text(size)} of {found}; other scores need another training"
