"""What Ray Train is to run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

TrainWorker = Callable[[dict[str, Any]], bool]
"""The training function that every worker runs, given the arguments.

It returns whether it ended early because a node will be taken away, on all workers the same.
"""


@dataclass(frozen=True)
class Training:
    """A training function and the resources that it runs with.

    Attributes
    ----------
    worker : callable
        The training function; every worker runs it with the arguments.
    arguments : dict
        Arguments of the function.
    workers, cpus : int
        Number of workers, and CPUs of each.
    gpu : bool
        Whether each worker has a GPU.
    scratch : str
        URI of a folder for Ray Train's own files; it is deleted afterwards.
    label_selector : dict of str to str
        Labels of the nodes that workers can run on.
    """

    worker: TrainWorker
    arguments: dict[str, Any]
    workers: int
    gpu: bool
    cpus: int
    scratch: str
    label_selector: dict[str, str]
