"""The function that Ray Train runs in every worker; the driver imports it, but not torch."""

from __future__ import annotations

from typing import Any


def train_worker(arguments: dict[str, Any]) -> bool:
    """Train a proxy; torch.distributed is ready.

    Parameters
    ----------
    arguments : dict
        A `TrainingJob`, as its `as_arguments` returns it.

    Returns
    -------
    bool
        Whether the training has to continue on other nodes.
    """
    from raypipe.stages.proxy.training_job import TrainingJob
    from raypipe.stages.proxy.worker import train

    return train(TrainingJob.from_arguments(arguments))
