"""Decide when a training saves its state within an epoch."""

from __future__ import annotations

import enum
import time

import torch
import torch.distributed as distributed

from raypipe.distributed.preemption import DrainWatch

SAVE_SECONDS = 25.0
"""Seconds between two saved states. A lost node costs at most this much work, plus the time of a
check and of writing the state: about 30 s."""
CHECK_SECONDS = 1.0
"""Seconds between two checks, in which all workers take part."""
MOST_ROUNDS = 1000


class Pause(enum.Enum):
    """What a training does before it continues."""

    NONE = enum.auto()
    SAVE = enum.auto()
    MOVE = enum.auto()
    """Save and end: a node will be taken away, and the training continues on others."""


class SaveClock:
    """Says after each batch whether to save, the same to all workers of a training.

    Parameters
    ----------
    rank : int
        Number of this worker. The clock of worker 0 counts.
    device : torch.device
        Where the collectives of the workers take place.
    drain : DrainWatch
        Whether the node of this worker will be taken away.
    """

    def __init__(self, rank: int, device: torch.device, drain: DrainWatch) -> None:
        self._rank, self._device, self._drain = rank, device, drain
        self._saved_at = self._checked_at = time.monotonic()
        self._rounds, self._check_after = 0, 1

    def saved(self) -> None:
        """Note that the state was saved."""
        self._saved_at = time.monotonic()

    def after_round(self) -> Pause:
        """Return what to do after a batch; all workers call it equally often."""
        self._rounds += 1
        if self._rounds < self._check_after:
            return Pause.NONE
        now = time.monotonic()
        rounds_per_check = CHECK_SECONDS * self._rounds / max(now - self._checked_at, 1e-9)
        first = self._rank == 0
        proposal = [
            int(self._drain.announced),
            int(first and now - self._saved_at >= SAVE_SECONDS),
            max(1, min(int(rounds_per_check), MOST_ROUNDS)) if first else 0,
        ]
        agreed = torch.tensor(proposal, dtype=torch.int64, device=self._device)
        distributed.all_reduce(agreed, distributed.ReduceOp.MAX)
        move, save, self._check_after = agreed.tolist()
        self._rounds, self._checked_at = 0, time.monotonic()
        return Pause.MOVE if move else Pause.SAVE if save else Pause.NONE


class SoloSaveClock:
    """Says after each batch whether a training of one process saves.

    Parameters
    ----------
    drain : DrainWatch
        Whether its node will be taken away. Then it saves at once, and every `SAVE_SECONDS` until
        the node is gone and Ray repeats the task on another.
    """

    def __init__(self, drain: DrainWatch) -> None:
        self._drain, self._saved_at, self._reacted = drain, time.monotonic(), False

    def is_due(self) -> bool:
        """Whether to save now."""
        announced = self._drain.announced and not self._reacted
        due = announced or time.monotonic() - self._saved_at >= SAVE_SECONDS
        if due:
            self._saved_at, self._reacted = time.monotonic(), self._drain.announced
        return due
