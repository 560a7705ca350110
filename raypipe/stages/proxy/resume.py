"""States of a training within an epoch, from which it resumes after the loss of a node.

Files in the folder `resume` of the training, where a round is a batch, trained or evaluated:

- `0007-000123-of-2.safetensors`: weights and optimiser after 123 rounds of epoch 7, by 2 workers;
  written last.
- `0007-000100-000123-0-of-2.safetensors`: what only worker 0 knows: its sums, the state of its
  random numbers, and its predictions in the rounds after the 100th, up to which the file before
  has them.

A training with another number of workers resumes after the last finished epoch instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as distributed
from safetensors.torch import load, save
from torch import Tensor

from raypipe import storage
from raypipe.stages.proxy.predictions import BatchPredictions


@dataclass
class EpochProgress:
    """What a worker knows in the middle of an epoch.

    Attributes
    ----------
    epoch : int
        The epoch.
    sums : Tensor
        Loss and number of correct predictions, summed over this worker's samples, float32 [2].
    rounds : int
        Batches that are done: first those of the training, then those of an evaluation.
    predictions : list of BatchPredictions
        What the trajectory gets of this worker.
    cpu_seconds : float
        Processor seconds of this worker for the epoch, up to the last saved state.
    """

    epoch: int
    sums: Tensor
    rounds: int = 0
    predictions: list[BatchPredictions] = field(default_factory=list)
    cpu_seconds: float = 0.0


class ResumeFolder:
    """The saved states of a training, as one of its workers reads and writes them.

    Parameters
    ----------
    uri : str
        The folder.
    rank, workers : int
        Number of this worker, and of all workers.
    """

    def __init__(self, uri: str, rank: int, workers: int) -> None:
        self._uri, self._rank, self._workers = uri, rank, workers
        self._saved_rounds = self._saved_batches = 0

    def latest(self, epoch: int) -> int:
        """Return the rounds of the latest complete state of an epoch, or 0."""
        names = storage.names(self._uri)
        pattern = re.compile(rf"{epoch:04d}-(\d+)-of-{self._workers}\.safetensors")
        states = sorted(int(match[1]) for name in names if (match := pattern.fullmatch(name)))
        ranks = range(self._workers)
        complete = (
            rounds
            for rounds in reversed(states)
            if all(_chain(names, epoch, rounds, rank, self._workers) for rank in ranks)
        )
        return next(complete, 0)

    def read(self, epoch: int, rounds: int) -> tuple[dict[str, Tensor], EpochProgress]:
        """Return the state of weights and optimiser, and the progress of this worker.

        The state of the random numbers is restored.
        """
        names = _chain(storage.names(self._uri), epoch, rounds, self._rank, self._workers)
        parts = [load(storage.read_bytes(storage.join(self._uri, name))) for name in names]
        progress = EpochProgress(
            epoch,
            parts[-1]["sums"],
            rounds,
            [_unpack(part) for part in parts if len(part["rows"])],
            parts[-1]["cpu_seconds"].item(),
        )
        torch.set_rng_state(parts[-1]["random"])
        if "random_gpu" in parts[-1]:
            torch.cuda.set_rng_state(parts[-1]["random_gpu"])
        self._saved_rounds, self._saved_batches = rounds, len(progress.predictions)
        return load(storage.read_bytes(self._state_file(epoch, rounds))), progress

    def save(self, progress: EpochProgress, state: Callable[[], dict[str, Tensor]]) -> None:
        """Save the state of all workers; all of them call this after the same round.

        Parameters
        ----------
        progress : EpochProgress
            What this worker knows.
        state : callable
            Returns weights and optimiser. Worker 0 calls it.
        """
        part = _pack(progress.predictions[self._saved_batches :]) | {
            "sums": progress.sums.cpu(),
            "cpu_seconds": torch.tensor(progress.cpu_seconds, dtype=torch.float64),
            "random": torch.get_rng_state(),
        }
        if progress.sums.is_cuda:
            part["random_gpu"] = torch.cuda.get_rng_state()
        rounds = f"{self._saved_rounds:06d}-{progress.rounds:06d}"
        name = f"{progress.epoch:04d}-{rounds}-{self._rank}-of-{self._workers}.safetensors"
        storage.write_bytes(storage.join(self._uri, name), save(part))
        distributed.barrier()
        if self._rank == 0:
            storage.write_bytes(self._state_file(progress.epoch, progress.rounds), save(state()))
            if self._saved_rounds:
                storage.delete(self._state_file(progress.epoch, self._saved_rounds))
        self._saved_rounds, self._saved_batches = progress.rounds, len(progress.predictions)

    def clear(self) -> None:
        """Forget the states of an epoch that is finished; worker 0 deletes them."""
        if self._saved_rounds and self._rank == 0:
            storage.delete(self._uri)
        self._saved_rounds = self._saved_batches = 0

    def _state_file(self, epoch: int, rounds: int) -> str:
        name = f"{epoch:04d}-{rounds:06d}-of-{self._workers}.safetensors"
        return storage.join(self._uri, name)


def _chain(names: Collection[str], epoch: int, rounds: int, rank: int, workers: int) -> list[str]:
    """Return the files that hold all rounds of a worker up to a state; empty if one is missing."""
    pattern = re.compile(rf"{epoch:04d}-(\d+)-(\d+)-{rank}-of-{workers}\.safetensors")
    ending = {int(match[2]): match for name in names if (match := pattern.fullmatch(name))}
    chain: list[str] = []
    while rounds:
        if (match := ending.get(rounds)) is None:
            return []
        chain.insert(0, match[0])
        rounds = int(match[1])
    return chain


def _pack(predictions: list[BatchPredictions]) -> dict[str, Tensor]:
    """Return the predictions of several batches as three tensors; of none, rows are empty."""
    if not predictions:
        return {"rows": torch.zeros(0, dtype=torch.int64)}
    columns = ("rows", "statistics", "probabilities")
    return {
        name: torch.from_numpy(np.concatenate([getattr(batch, name) for batch in predictions]))
        for name in columns
    }


def _unpack(part: dict[str, Tensor]) -> BatchPredictions:
    rows, statistics, probabilities = (
        part[name].numpy() for name in ("rows", "statistics", "probabilities")
    )
    return BatchPredictions(rows, statistics, probabilities)
