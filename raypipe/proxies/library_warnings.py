"""What the libraries that networks come from print."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_warnings() -> Iterator[None]:
    """Silence logs and warnings of libraries: of retries, and of random weights even if requested.

    What matters of them is checked, and is one line of raypipe's own. A handler that a library adds
    to the root logger is removed, because it would print raypipe's messages a second time.
    """
    before, handlers = logging.root.manager.disable, list(logging.root.handlers)
    logging.disable(max(before, logging.ERROR))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        logging.root.handlers[:] = handlers
