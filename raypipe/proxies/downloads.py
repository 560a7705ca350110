"""Downloads of published weights, which fail within seconds where there is no network.

The hub's own client tries each file again for up to a minute, whatever the reason.
"""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

TIMEOUT = 5.0
"""Seconds that a server has to answer."""


def unreachable(url: str) -> str:
    """Return why the server of a URL cannot be reached; "" if it answers, whatever it answers."""
    parts = urlsplit(url)
    server = f"{parts.scheme}://{parts.netloc}"
    try:
        urllib.request.urlopen(
            urllib.request.Request(server, method="HEAD"), timeout=TIMEOUT
        ).close()
    except urllib.error.HTTPError:
        return ""
    except (urllib.error.URLError, TimeoutError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):  # the library can have other certificates
            return ""
        return f"{server} cannot be reached: {getattr(reason, 'strerror', None) or reason}"
    return ""


@contextmanager
def from_hub() -> Iterator[None]:
    """Let code load files of the Hugging Face hub: from the cache alone if it cannot be reached.

    Raises
    ------
    OSError
        If it cannot be reached, and the cache lacks a file.
    """
    try:
        from huggingface_hub import constants, errors
    except ImportError:
        yield  # the library says what it needs
        return
    before = constants.HF_HUB_OFFLINE
    reason = "HF_HUB_OFFLINE is set" if before else unreachable(constants.ENDPOINT)
    constants.HF_HUB_OFFLINE = bool(reason)
    try:
        yield
    except Exception as error:
        lacking = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)
        if reason and any(isinstance(cause, lacking) for cause in _causes(error)):
            raise OSError(reason) from error
        raise
    finally:
        constants.HF_HUB_OFFLINE = before


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
