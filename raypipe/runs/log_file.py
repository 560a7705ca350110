"""The log of a driver: `RUN/logs/<start>.log`."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from raypipe import storage
from raypipe.errors import RaypipeError, RunError
from raypipe.runs.ledger import now
from raypipe.runs.run import Run

log = logging.getLogger("raypipe")


@contextmanager
def log_file(run: Run, verbose: bool = False) -> Iterator[None]:
    """Also write all messages to RUN/logs/<start>.log, with `verbose` a line per fragment."""
    handler = _LogHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
    uri = storage.join(run.logs_folder, now().replace(":", "") + ".log")
    handler.store = lambda text: storage.write_bytes(uri, text.encode())
    try:
        yield
    except BaseException as error:
        log.error("stopped: %s", error if isinstance(error, RaypipeError) else repr(error))
        raise
    finally:
        log.removeHandler(handler)
        with suppress(OSError, RunError):  # the stages report broken storage
            handler.save()
        log.setLevel(level)


class _LogHandler(logging.Handler):
    """Keeps the last lines and writes them all for every new line: object stores cannot append.

    Lines about fragments are written with the next other line, or after PAUSE seconds.
    """

    MAX_LINES, PAUSE = 5000, 10.0

    def __init__(self) -> None:
        super().__init__()
        self._lines: deque[str] = deque(maxlen=self.MAX_LINES)
        self._stored, self._changed = -math.inf, False
        self.store = lambda text: None

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(self.format(record))
        self._changed = True
        if record.levelno <= logging.DEBUG and time.monotonic() - self._stored < self.PAUSE:
            return
        # the stages report broken storage and a run that was taken over
        with suppress(OSError, RunError):
            self.save()

    def save(self) -> None:
        """Write the lines if there are new ones. Raises what storage raises."""
        if self._changed:
            self._stored, self._changed = time.monotonic(), False
            self.store("\n".join(self._lines) + "\n")
