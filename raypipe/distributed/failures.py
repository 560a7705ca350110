"""Convert errors of Ray to errors of one line."""

from __future__ import annotations

import re

import ray
from ray.train import TrainingFailedError

from raypipe import errors
from raypipe.errors import MemoryShortageError, RaypipeError, StageError


def as_raypipe_error(error: BaseException) -> Exception:
    """Return the error of raypipe that an error of Ray stands for.

    Parameters
    ----------
    error : BaseException
        What Ray raised.

    Returns
    -------
    Exception
        A RaypipeError that a worker raised, unchanged; MemoryShortageError if memory was the
        reason; otherwise StageError with the relevant line of the message.
    """
    chain = _causes(error)
    if (raised := _raised_by_raypipe(chain)) is not None:
        return raised
    for link in chain:
        if _is_memory_shortage(link):
            text = " ".join(str(link).split())
            return MemoryShortageError(
                f"workers ran out of memory ({text[:300] or type(link).__name__})"
            )
    if any(type(link).__name__ == "ExecutionTimeoutError" for link in chain):
        return StageError(
            "no unit of work was finished within cluster.patience_seconds: workers are waiting for "
            "machines, or keep dying (too little memory, a crash in a library). See Ray's logs, "
            "then rerun to resume"
        )
    return StageError(_relevant_line(chain) or type(error).__name__)


def _causes(error: BaseException) -> list[BaseException]:
    """Return an error and its causes, in the several ways in which Ray links them."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        of_training = [
            *getattr(link, "worker_failures", {}).values(),
            getattr(link, "controller_failure", None),
        ]
        link = getattr(link, "cause", None) or of_training[0] or link.__cause__
    return chain


def _raised_by_raypipe(chain: list[BaseException]) -> Exception | None:
    """Return the error of raypipe in a chain, if there is one."""
    for link in chain:
        # Ray's wrapper of an error is a subclass of its class, with another constructor
        if isinstance(link, RaypipeError) and not isinstance(link, ray.exceptions.RayError):
            return type(link)(str(link))
    for link in chain:  # Ray Data keeps only the text of an actor's error
        lines = re.findall(r"^\s*raypipe\.(?:\w+\.)+(\w+): (.+)", str(link), re.MULTILINE)
        if lines:
            name, text = lines[-1]
            return getattr(errors, name, StageError)(text)
    return None


def _relevant_line(chain: list[BaseException]) -> str:
    """Return the last line of a chain that names an error other than Ray's wrappers, or ""."""
    # Ray Data ends chains with an empty SystemException, or with its name for every actor error
    texts = [
        f"{type(link).__name__}: {link}"
        for link in chain
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
            return lines[-1][:600]
    return " ".join((texts[-1] if texts else "").split())[:600]


def _is_memory_shortage(error: BaseException) -> bool:
    """Whether memory was the reason.

    If a worker just vanished, Ray lists memory as one of several possible reasons. That does not
    count.
    """
    if isinstance(error, MemoryError | ray.exceptions.OutOfMemoryError):
        return True
    if type(error).__name__ == "OutOfMemoryError":  # of torch
        return True
    if isinstance(error, ray.exceptions.RayTaskError):  # its text is a traceback
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
