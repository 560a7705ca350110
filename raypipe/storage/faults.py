"""Faults of storage: which pass and are waited for, and how those that stay are told.

One layer retries, with exponential back-off and full jitter (Brooker, *Exponential Backoff And Jitter*, AWS Architecture Blog, 2015).
Those of botocore and s3fs are off: three layers, one in the other, ask up to two hundred times, and that of s3fs has no jitter.
"""

from __future__ import annotations

import contextlib
import errno
import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from raypipe.errors import RaypipeError, StorageAccessError, StorageError

T = TypeVar("T")

RETRIES = 10
"""Attempts at a request; between them lie 36 s on average and 72 s at most."""
FIRST_DELAY, LONGEST_DELAY = 0.25, 20.0  # seconds
AFTER_GIVING_UP, FEWER = 60.0, 2
"""For so many seconds after a request failed for good, or until one succeeds, others are tried so often only: what tidies up
after the failure would else wait as long again, one request after the other."""

_gave_up = -AFTER_GIVING_UP


def delay(attempt: int) -> float:
    """Seconds to wait after the failure of attempt 0, 1, ...: anything up to a bound that doubles, so that many clients spread out."""
    return random.uniform(0, min(LONGEST_DELAY, FIRST_DELAY * 2**attempt))


class Attempts:
    """The attempts at one request. `what` names the URI in the error of the last one."""

    def __init__(self, what: str) -> None:
        self._what, self._failed = what, 0
        self._most = FEWER if time.monotonic() - _gave_up < AFTER_GIVING_UP else RETRIES

    def failed(self, error: Exception) -> float:
        """Seconds to wait before the next attempt. Raises the error where another attempt is of no use, StorageError after the last."""
        global _gave_up
        if not passing(error):
            raise error
        self._failed += 1
        if self._failed >= self._most:
            _gave_up = time.monotonic()
            raise StorageError(
                f"{self._what}: storage still fails after {self._failed} attempts: {_words(error)}. Look whether it can be reached "
                "from here, then run the same command again"
            ) from error
        return delay(self._failed - 1)

    def succeeded(self) -> None:
        global _gave_up
        _gave_up = -AFTER_GIVING_UP


def retrying(action: Callable[[], T], what: str, writing: bool = False) -> T:
    """Run `action`, again after passing faults. `what` names the URI in errors; see `advice` for `writing`.

    Raises StorageError for faults that stay and are for the user to mend; others (no such file, a bad range) as they are.
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
    """Faults that are for the user to mend become a StorageError that names the URI `what` and says what to do."""
    try:
        yield
    except Exception as error:
        found = advice(error, writing)
        if not found:
            raise
        kind = StorageAccessError if isinstance(error, PermissionError) else StorageError
        raise kind(f"{what}: {found}, then run the same command again") from error


# EINVAL and ENOSYS are what a request that S3 calls wrong (400, 412, 416, 501) becomes
_FINAL = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP,
    errno.EINVAL, errno.ENOSYS,
}  # fmt: skip
_FINAL_WORDS = (
    "expired",
    "invalidaccesskey",
    "signature",
    "access denied",
    "forbidden",
    "nosuchbucket",
    "credentials",
)
_FINAL_TYPES = {
    "ParamValidationError",
    "FileExpired",
}  # a bad name; an object replaced while it is read
_CUT_SHORT = {"IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch"}
"""What S3 says of content that was damaged on its way there: by its status a bad request, but the next one may arrive."""


def passing(error: BaseException) -> bool:
    """Whether an error may be gone a moment later."""
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
    if any(word in _said(error) for word in _FINAL_WORDS) or type(error).__name__ in _FINAL_TYPES:
        return False
    if isinstance(error, OSError):
        return error.errno not in _FINAL
    return _from_network(error)


def code_of(error: BaseException) -> str:
    """What S3 calls an error, such as ExpiredToken; its status where it says no more; "" for errors of other origin."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def advice(error: BaseException, writing: bool = False) -> str:
    """What is wrong and what would mend it, in words; "" for an error that says enough, or is not for the user to mend.

    writing  of a write: then a local file or folder that may not be touched is a fault, and not a property of a source
    """
    if isinstance(error, RaypipeError):
        return ""
    number, code, said, words = (
        getattr(error, "errno", None),
        code_of(error),
        _said(error),
        _words(error),
    )
    if isinstance(
        error, FileNotFoundError | FileExistsError | IsADirectoryError | NotADirectoryError
    ):
        if writing and code == "NoSuchBucket":
            return f"there is no such bucket ({words}). Create it"
        return f"cannot be written ({words}). Mend it" if writing else ""
    if number in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({words}). Free space there"
    if number == errno.EFBIG:
        return f"files may not grow so large here ({words}). Raise the limit (`ulimit -f`)"
    if number == errno.EROFS:
        return f"cannot be written ({words}). Mount it writable, or give another folder"
    if number in (errno.EACCES, errno.EPERM):
        return (
            f"may not be written ({words}). Change who may write there, or give another folder"
            if writing
            else ""
        )
    if "expired" in said and type(error).__name__ != "FileExpired":
        return f"the credentials have expired ({words}). Renew them"
    if any(word in said for word in ("invalidaccesskey", "signature", "credentials")):
        return f"the credentials are missing or wrong ({words}). Set them by the AWS variables, files or an instance profile"
    if isinstance(error, PermissionError) or "access denied" in said or "forbidden" in said:
        return f"access denied ({words}). Renew the credentials if they have expired, or allow them to read and write there"
    if code == "400":  # the answer to HEAD has no content that would say more
        return f"the request was refused ({words}). Renew the credentials if they have expired, and look at region and endpoint"
    if _from_network(error) and not isinstance(error, OSError):
        return f"{words}. Look at endpoint, region and network"
    return f"cannot be written ({words}). Mend it" if writing and isinstance(error, OSError) else ""


def _said(error: BaseException) -> str:
    """What an error of an object store says, in lower case; "" for others, in which such words are part of a path."""
    stored = (
        code_of(error)
        or _from_network(error)
        or (isinstance(error, OSError) and error.errno is None)
    )
    if not stored:
        return ""
    return f"{code_of(error)} {type(error).__name__} {error}".lower()


def _words(error: BaseException) -> str:
    said = (error.strerror if isinstance(error, OSError) else None) or error
    return " ".join(str(said).split()).rstrip(".")[:300] or type(error).__name__


def _from_network(error: BaseException) -> bool:
    # botocore, aiohttp and urllib3 have exception trees of their own for the network
    return type(error).__module__.split(".")[0] in {
        "botocore",
        "aiobotocore",
        "aiohttp",
        "urllib3",
        "asyncio",
    }
