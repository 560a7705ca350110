"""The errors a user can meet, and the exit code of each."""

from __future__ import annotations


class RaypipeError(Exception):
    """Something the user can act on; printed as one line, without a traceback."""

    exit_code = 1


class ConfigError(RaypipeError):
    """A setting is unknown or has a value that is not allowed; nothing was started."""

    exit_code = 2


class SourceError(RaypipeError):
    """The source cannot be used at all: nothing there, unknown format, no labels."""


class RunError(RaypipeError):
    """A run directory is missing, damaged, of another version or used by another driver."""


class TakenOverError(RunError):
    """Another driver has the run now; this one, and what still works for it, writes nothing more."""


class StorageError(RaypipeError, OSError):
    """Storage cannot be read or written, and somebody has to mend that: a full disk, expired credentials, a server that is gone."""


class StorageAccessError(StorageError, PermissionError):
    """Storage refuses what was asked: credentials that have expired or do not allow it, a folder of somebody else's."""


class StageError(RaypipeError):
    """A stage ended without everything it should have written."""


class ResourceError(RaypipeError):
    """The cluster does not have what the settings ask for."""


class MemoryShortageError(ResourceError):
    """Workers were ended because their machine had no memory left."""


class RejectError(RaypipeError):
    """More of the source cannot be read than `source.max_reject_fraction` allows; what is done is kept."""


class TrustError(RaypipeError):
    """Predicted scores are too unfaithful to prune by; scores and report are written, keep-lists are not."""

    exit_code = 3
