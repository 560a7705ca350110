"""Check that a Ray cluster answers at an address before Ray, which is silent for minutes, tries."""

from __future__ import annotations

import os
import re
import socket
import threading
import time

from raypipe.errors import RaypipeError
from raypipe.progress import Progress
from raypipe.text import error_text

WAIT_SECONDS = 40.0
"""How long a cluster that does not answer is waited for: it can be starting."""
TRY_SECONDS, PAUSE_SECONDS = 5.0, 1.0
"""Timeout of an attempt to connect, and the pause after one that failed."""


def address_of(setting: str) -> tuple[str, str]:
    """Return the address that `cluster.address` stands for, and where it is set.

    Both are "" for a cluster on this machine.
    """
    named = os.environ.get("RAY_ADDRESS", "") if setting == "auto" else setting
    if named in ("", "auto", "local"):
        return "", ""
    return named, "RAY_ADDRESS" if setting == "auto" else "cluster.address"


def check_reachable(setting: str, progress: Progress) -> None:
    """Raise RaypipeError unless a Ray cluster answers at the address of `cluster.address`.

    A cluster on this machine is not checked. Takes milliseconds if the cluster answers.
    """
    address, origin = address_of(setting)
    plain = address.removeprefix("ray://")
    if not address or "://" in plain:  # other schemes are those of plug-ins
        return
    match = re.fullmatch(r"\[?([^\]/]+?)\]?:(\d+)(/.*)?", plain)
    if match is None or int(match[2]) > 65535:
        raise RaypipeError(
            f"{origin} is {address!r}, which is not an address: give host:port, such as "
            "head-node:6379"
        )
    host, port, end = match[1], int(match[2]), time.monotonic() + WAIT_SECONDS
    reason = _refusal(host, port)
    if reason:
        progress.say(_waiting(address, reason))
    while reason and time.monotonic() < end:
        time.sleep(PAUSE_SECONDS)
        reason = _refusal(host, port)
    if not reason and not address.startswith("ray://"):
        reason = _no_ray(f"{host}:{port}", end, progress)
    if reason:
        raise RaypipeError(
            f"cannot reach the Ray cluster at {address!r} ({origin}): {reason}. Correct the "
            "address, or start the cluster; cluster.address local uses this machine"
        )


def _waiting(address: str, reason: str) -> str:
    return f"note: no Ray cluster answers at {address} ({reason}); waiting {WAIT_SECONDS:.0f} s"


def _refusal(host: str, port: int) -> str:
    """Return why no connection can be made; "" if it can."""
    try:
        socket.create_connection((host, port), TRY_SECONDS).close()
    except TimeoutError:
        return f"no answer in {TRY_SECONDS:.0f} s"
    except OSError as error:
        return error.strerror or str(error)
    except UnicodeError:  # a part of the name is empty or longer than 63 characters
        return "not a valid host name"
    return ""


def _no_ray(address: str, end: float, progress: Progress) -> str:
    """Return why what answers at an address is not the head of a Ray cluster; "" if it is.

    The attempt is made in a thread: what answers can be something else that never replies.

    Parameters
    ----------
    address : str
        host:port.
    end : float
        When to give up, by `time.monotonic`, but not before `TRY_SECONDS`.
    progress : Progress
        Where to report that it takes long.
    """
    no_cluster = "something answers there, but not as a Ray cluster does"
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    outcome: list[str] = []

    def attempt() -> None:
        try:
            GcsClient(address=address)
            outcome.append("")
        except Exception as error:
            outcome.append(error_text(error))

    thread = threading.Thread(target=attempt, daemon=True, name="raypipe-reach")
    thread.start()
    thread.join(TRY_SECONDS)
    if thread.is_alive():
        progress.say(_waiting(address, no_cluster))
        thread.join(max(0.0, end - time.monotonic()))
    return outcome[0] if outcome else no_cluster
