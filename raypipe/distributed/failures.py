"""Turn Ray errors into one line that says what went wrong."""

from __future__ import annotations

import re

import ray
from ray.train import TrainingFailedError

from raypipe import errors
from raypipe.errors import MemoryShortageError, RaypipeError, StageError


def as_raypipe_error(error: BaseException) -> Exception:
    """Ray's long error as one of ours with the line that matters. An error of ours raised in a worker stays what it is.

    MemoryShortageError where memory was the reason.
    """
    seen: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in seen:
        seen.append(link)
        of_training = [
            *getattr(link, "worker_failures", {}).values(),
            getattr(link, "controller_failure", None),
        ]
        link = getattr(link, "cause", None) or of_training[0] or link.__cause__
    for link in seen:
        # what Ray makes of an error is of its class as well, but not made as it is
        if isinstance(link, RaypipeError) and not isinstance(link, ray.exceptions.RayError):
            return type(link)(str(link))
    for link in seen:  # Ray Data keeps of an actor's error its text alone
        if ours := re.findall(r"^\s*raypipe\.(?:\w+\.)+(\w+): (.+)", str(link), re.MULTILINE):
            return getattr(errors, ours[-1][0], StageError)(ours[-1][1])
    for link in seen:
        if _of_memory(link):
            said = " ".join(str(link).split())
            return MemoryShortageError(
                f"workers ran out of memory ({said[:300] or type(link).__name__})"
            )
    if any(type(link).__name__ == "ExecutionTimeoutError" for link in seen):
        return StageError(
            "nothing was finished for cluster.patience_seconds: workers wait for machines, or die again and again (too little memory, a crash "
            "in a library), of which Ray's logs tell; run again to resume"
        )
    # Ray Data ends its chains with an empty SystemException or with what it calls every error of an actor
    texts = [
        f"{type(link).__name__}: {link}"
        for link in seen
        if type(link).__name__ != "SystemException" and str(link)
    ]
    for text in reversed(texts):
        lines = [
            line.strip()
            for line in text.splitlines()
            if re.match(r"\s*[\w.]*(Error|Exception|Interrupt): .", line)
        ]
        if lines := [
            line
            for line in lines
            if not re.match(r"(ray\.exceptions\.)?(UserCodeException|RayTaskError)\b", line)
        ]:
            return StageError(lines[-1][:600])
    return StageError(" ".join((texts[-1] if texts else type(error).__name__).split())[:600])


def _of_memory(error: BaseException) -> bool:
    """Whether memory was the reason. Ray names it among others that are possible where a worker just vanished: that does not count."""
    if (
        isinstance(error, MemoryError | ray.exceptions.OutOfMemoryError)
        or type(error).__name__ == "OutOfMemoryError"
    ):  # torch's
        return True
    if isinstance(error, ray.exceptions.RayTaskError):  # whose text is a traceback
        return (
            re.search(r"^\s*[\w.]*(MemoryError|OutOfMemoryError): ", str(error), re.MULTILINE)
            is not None
        )
    if not isinstance(error, ray.exceptions.RayError | TrainingFailedError):
        return False
    return (
        re.search(
            r"running low on memory|NODE_OUT_OF_MEMORY|CUDA out of memory|\bMemoryError\b",
            str(error),
        )
        is not None
    )
