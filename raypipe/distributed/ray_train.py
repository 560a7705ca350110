"""Train with Ray Train: on several workers, or in its local mode in a task for a single worker.

A training whose node will be taken away saves its state and ends; another continues on other nodes.
This does not count as a failure. Nor does it with a single worker if the node goes before the state
is saved. For several workers, Ray Train has its own rule for that case: a node that dies after its
deadline is no failure (`FailureConfig.max_preemption_failures`, unlimited by default).
"""

from __future__ import annotations

import logging

from raypipe.distributed.failures import as_raypipe_error
from raypipe.distributed.pending import requesting, resource_shape
from raypipe.distributed.single_worker import train_single
from raypipe.distributed.training import Training

log = logging.getLogger("raypipe")


def train(training: Training, max_failures: int) -> None:
    """Run a training function.

    Parameters
    ----------
    training : Training
        The function, and the resources that it runs with.
    max_failures : int
        How often workers that die are replaced, and Ray Train's controller, which looks after
        several workers.

    Raises
    ------
    StageError
        If the training fails.
    MemoryShortageError
        If it fails because memory is short.
    """
    if training.workers == 1:
        run = train_single
    else:
        from raypipe.distributed.worker_group import train_group as run  # imports torch
    try:
        with requesting(resource_shape(training.cpus, int(training.gpu))):
            while run(training, max_failures):
                log.info(
                    "a node of a training will be taken away; the training continues on others"
                )
    except Exception as error:
        raise as_raypipe_error(error) from error
