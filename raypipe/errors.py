"""Errors for users, each with the exit code of the command line."""

from __future__ import annotations

EXIT_CODES = {
    0: "done",
    1: "failed or stopped",
    2: "wrong usage or configuration; nothing was started",
    3: "scores and report are written, but too uncertain to prune by; no keep-lists are written",
    4: "done, and a refresh is advised (jobs/nightly.py)",
    5: "done; no evidence that the chosen list beats random lists (evaluate --certify)",
    6: "done; the chosen list is worse than random lists (evaluate --certify)",
}
"""What every command and job can exit with."""


class RaypipeError(Exception):
    """Base class: a problem that the user can fix. Printed as one line, without a traceback."""

    exit_code = 1


class ConfigError(RaypipeError):
    """A setting is unknown or has a value that is not allowed. Nothing was started."""

    exit_code = 2


class SourceError(RaypipeError):
    """The source cannot be used at all: it is empty, has an unknown format, or has no labels."""


class RunError(RaypipeError):
    """A run folder is missing, damaged, of another version, or in use by another driver."""


class TakenOverError(RunError):
    """Another driver has taken the run over. This driver and its workers write nothing more."""


class StorageError(RaypipeError, OSError):
    """Storage fails permanently: a full disk, expired credentials, an unreachable server."""


class StorageAccessError(StorageError, PermissionError):
    """Storage denies access: expired or insufficient credentials, or missing permissions."""


class StageError(RaypipeError):
    """A stage ended with incomplete output."""


class ResourceError(RaypipeError):
    """The cluster lacks resources that the settings request."""


class MemoryShortageError(ResourceError):
    """Workers were killed because their machine ran out of memory."""


class RejectError(RaypipeError):
    """More samples cannot be read than `source.max_reject_fraction` allows.

    Finished work is kept.
    """


class TrustError(RaypipeError):
    """The fidelity of the predicted scores is too low to prune by.

    Scores and report are written, keep-lists are not.
    """

    exit_code = 3
