"""Storage faults: which are transient and retried, and how the others are reported.

One layer retries, with exponential back-off and full jitter (Brooker, *Exponential Backoff And
Jitter*, AWS Architecture Blog, 2015). The retries of botocore and s3fs are off: three nested layers
would send up to two hundred requests, and that of s3fs has no jitter.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from raypipe.errors import RaypipeError, StorageAccessError, StorageError

T = TypeVar("T")

RETRIES = 10
"""Attempts at a request. The pauses between them take 36 s on average and 72 s at most."""
FIRST_DELAY, LONGEST_DELAY = 0.25, 20.0  # seconds
AFTER_GIVING_UP, FEWER_RETRIES = 60.0, 2
"""For `AFTER_GIVING_UP` seconds after a request failed permanently, or until one succeeds, requests
get `FEWER_RETRIES` attempts. Otherwise each request of the clean-up would wait as long again."""

_gave_up = -AFTER_GIVING_UP


def delay(attempt: int) -> float:
    """Return the seconds to wait after attempt 0, 1, ... failed.

    Uniform between 0 and a bound that doubles, so that the requests of many clients spread out.
    """
    return random.uniform(0, min(LONGEST_DELAY, FIRST_DELAY * 2**attempt))


class Attempts:
    """Counts the attempts at one request to the URI `what`, which errors name."""

    def __init__(self, what: str) -> None:
        self._what, self._failed = what, 0
        self._max_attempts = (
            FEWER_RETRIES if time.monotonic() - _gave_up < AFTER_GIVING_UP else RETRIES
        )

    def failed(self, error: Exception) -> float:
        """Return the seconds to wait before the next attempt.

        Raises the error itself if it is not transient, and StorageError after the last attempt.
        """
        global _gave_up
        if not is_transient(error):
            raise error
        self._failed += 1
        if self._failed >= self._max_attempts:
            _gave_up = time.monotonic()
            raise StorageError(
                f"{self._what}: storage still fails after {self._failed} attempts: "
                f"{_words(error)}. Check that it can be reached from here, then run the same "
                "command again"
            ) from error
        return delay(self._failed - 1)

    def succeeded(self) -> None:
        global _gave_up
        _gave_up = -AFTER_GIVING_UP


def retrying(action: Callable[[], T], what: str, writing: bool = False) -> T:
    """Return the result of `action`, which is repeated after transient faults.

    Parameters
    ----------
    action : callable
        Sends one request.
    what : str
        The URI that errors name.
    writing : bool
        Whether the request writes; see `advice`.

    Raises
    ------
    StorageError
        For permanent faults that the user can fix. Other errors (a missing file, a bad range) are
        raised unchanged.
    """
    attempts = Attempts(what)
    while True:
        try:
            result = action()
        except Exception as error:
            with explaining(what, writing):
                pause = attempts.failed(error)
        else:
            attempts.succeeded()
            return result
        time.sleep(pause)


@contextlib.contextmanager
def explaining(what: str, writing: bool = False) -> Iterator[None]:
    """Turn faults that the user can fix into a StorageError that names `what` and the remedy.

    Something to read below a file does not exist: that is a FileNotFoundError, as in object stores.
    """
    try:
        yield
    except NotADirectoryError as error:
        if writing:
            raise
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), what) from error
    except Exception as error:
        remedy = advice(error, writing, what)
        if not remedy:
            raise
        kind = StorageAccessError if isinstance(error, PermissionError) else StorageError
        raise kind(f"{what}: {remedy}, then run the same command again") from error


# s3fs raises EINVAL and ENOSYS for requests that S3 rejects as wrong (400, 412, 416, 501)
_PERMANENT = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EPERM,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EINVAL,
    errno.ENOSYS,
    errno.ESPIPE,  # a pipe where a file is needed
    errno.ENXIO,  # a socket
    errno.ENODEV,
}
_PERMANENT_WORDS = (
    "expired",
    "invalidaccesskey",
    "signature",
    "access denied",
    "forbidden",
    "nosuchbucket",
    "credentials",
)
_PERMANENT_TYPES = {
    "ParamValidationError",  # a bad name
    "FileExpired",  # an object that was replaced while it was read
}
TRANSIENT_STATUS = {408, 429, 500, 502, 503, 504}
"""HTTP statuses after which another attempt can succeed."""
_CUT_SHORT = {"IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch"}
"""S3 error codes for content that was damaged in transit. The status says bad request, but another
attempt can succeed."""


def is_transient(error: BaseException) -> bool:
    """Return whether another attempt can succeed."""
    if isinstance(error, RaypipeError):
        return False
    if isinstance(
        error,
        FileNotFoundError
        | PermissionError
        | FileExistsError
        | IsADirectoryError
        | NotADirectoryError,
    ):
        return False
    if code_of(error) in _CUT_SHORT:
        return True
    if any(word in _store_text(error) for word in _PERMANENT_WORDS):
        return False
    if type(error).__name__ in _PERMANENT_TYPES:
        return False
    if isinstance(error, OSError):
        return error.errno not in _PERMANENT
    status = _status(error)
    return _from_network(error) and (status is None or status in TRANSIENT_STATUS)


def _status(error: BaseException) -> int | None:
    """Return the HTTP status in an error of gcsfs, Azure or the hub; None if it has none."""
    status = getattr(error, "status_code", None) or getattr(error, "code", None)
    status = status or getattr(getattr(error, "response", None), "status_code", None)
    return int(str(status)) if str(status).isdecimal() else None


def code_of(error: BaseException) -> str:
    """Return the S3 code of an error, such as ExpiredToken, or its status; "" for other errors."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


CREDENTIALS = {
    **dict.fromkeys(
        ("gs", "gcs"),
        "Set GOOGLE_APPLICATION_CREDENTIALS, run `gcloud auth application-default login`, or give "
        "the machine a service account",
    ),
    **dict.fromkeys(
        ("az", "abfs", "abfss"),
        "Set AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME with a key, a SAS "
        "token or a managed identity",
    ),
}
"""Protocol -> how to give credentials."""
_CREDENTIALS_OF_S3 = "Set them with the AWS variables, the AWS files or an instance profile"


def advice(error: BaseException, writing: bool = False, what: str = "") -> str:
    """Return what is wrong and how to fix it, as one sentence.

    Parameters
    ----------
    error : BaseException
        What a request raised.
    writing : bool
        Whether the request was a write. Only then is a local file or folder without permission a
        storage fault; otherwise it is a property of the source.
    what : str
        The URI, which tells the store.

    Returns
    -------
    str
        "" for an error that explains itself, or that the user cannot fix.
    """
    if isinstance(error, RaypipeError):
        return ""
    number, code = getattr(error, "errno", None), code_of(error)
    text, words = _store_text(error), _words(error)
    if isinstance(
        error, FileNotFoundError | FileExistsError | IsADirectoryError | NotADirectoryError
    ):
        if writing and code == "NoSuchBucket":
            return f"the bucket does not exist ({words}). Create it"
        return f"cannot be written ({words}). Fix this" if writing else ""
    if number in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({words}). Free space there"
    if number == errno.EFBIG:
        return f"the file is larger than allowed ({words}). Raise the limit (`ulimit -f`)"
    if number == errno.EROFS:
        return f"cannot be written ({words}). Mount it writable, or give another folder"
    if number in (errno.EACCES, errno.EPERM):
        return (
            f"no permission to write ({words}). Change the permissions, or give another folder"
            if writing
            else ""
        )
    if "expired" in text and type(error).__name__ != "FileExpired":
        return f"the credentials have expired ({words}). Renew them"
    if _status(error) == 401 or any(
        word in text for word in ("invalidaccesskey", "signature", "credentials")
    ):
        return (
            f"the credentials are missing or wrong ({words}). "
            f"{CREDENTIALS.get(what.partition('://')[0], _CREDENTIALS_OF_S3)}"
        )
    if isinstance(error, PermissionError) or "access denied" in text or "forbidden" in text:
        return (
            f"access denied ({words}). Renew the credentials if they have expired, or grant them "
            "read and write access"
        )
    if code == "400":  # the answer to HEAD has no body with details
        return (
            f"the request was refused ({words}). Renew the credentials if they have expired, and "
            "check region and endpoint"
        )
    if _from_network(error) and not isinstance(error, OSError):
        return f"{words}. Check endpoint, region and network"
    return (
        f"cannot be written ({words}). Fix this" if writing and isinstance(error, OSError) else ""
    )


def _store_text(error: BaseException) -> str:
    """Return the text of an object store's error in lower case, without the URLs it names.

    A bucket or folder may be called "expired". "" for errors of local files, whose paths stand
    among the words.
    """
    from_store = (
        code_of(error)
        or _from_network(error)
        or (isinstance(error, OSError) and error.errno is None)
    )
    if not from_store:
        return ""
    told = " ".join(word for word in str(error).split() if "/" not in word)
    return f"{code_of(error)} {type(error).__name__} {told}".lower()


def _words(error: BaseException) -> str:
    text = (error.strerror if isinstance(error, OSError) else None) or error
    return " ".join(str(text).split()).rstrip(".")[:300] or type(error).__name__


def _from_network(error: BaseException) -> bool:
    # botocore, aiohttp and urllib3 have their own exception hierarchies for network errors
    return type(error).__module__.split(".")[0] in {
        "botocore",
        "aiobotocore",
        "aiohttp",
        "urllib3",
        "asyncio",
        "azure",
        "gcsfs",
        "google",
        "httpx",
        "httpx2",
        "huggingface_hub",
        "requests",
    }


@contextlib.contextmanager
def errors_of_storage(uri: str) -> Iterator[None]:
    """Turn storage that fails permanently into a one-line error that names it."""
    try:
        yield
    except RaypipeError:
        raise
    except OSError as error:
        where = f"{error.filename}: " if getattr(error, "filename", None) else f"{uri}: "
        raise RaypipeError(
            f"{where}{error.strerror or error}. Fix this and rerun to resume"
        ) from error
