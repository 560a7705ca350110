"""The extrapolator of a run: created, written and loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raypipe import storage
from raypipe.config import Config
from raypipe.runs.run import Run
from raypipe.stages.extrapolate.fidelity_file import FidelityFile

if TYPE_CHECKING:
    from raypipe.assessment.conformal import Conformal
    from raypipe.assessment.intervals import Intervals
    from raypipe.extrapolators.base import Extrapolator

WHOLE_METHODS = {"gnn-published"}
"""Extrapolators whose graph spans the whole source."""
TRANSFER = "transfer.safetensors"
"""The map that a rehearsal learned, in `extrapolator/`."""


def make_extrapolator(config: Config, run: Run, proxy_run: Run | None = None) -> Any:
    """Create the extrapolator, not fitted.

    Parameters
    ----------
    config, run
        The configuration and the run.
    proxy_run
        The run whose proxy computed the embeddings, when it is another one.

    Returns
    -------
    Extrapolator or TransductiveExtrapolator
        The method of the settings.
    """
    from raypipe.extrapolators import make
    from raypipe.runs.checkpoints import last_layer

    extrapolator: Any = make(config.extrapolate, len(run.classes().names))
    if config.extrapolate.method == "gnn" and "proxy" in run.ledger():
        extrapolator.head = last_layer(proxy_run or run)
    return extrapolator


def save_extrapolator(run: Run, extrapolator: Extrapolator) -> None:
    """Write a fitted extrapolator."""
    from safetensors.numpy import save

    tensors, metadata = extrapolator.state()
    storage.write_bytes(run.model_weights, save(tensors))
    storage.write_json(run.model_file, metadata)


def load_extrapolator(config: Config, run: Run) -> Any:
    """Load the fitted extrapolator, with the map that a rehearsal learned."""
    from safetensors.numpy import load

    from raypipe.extrapolators import make

    extrapolator: Any = make(config.extrapolate, len(run.classes().names))
    metadata = storage.read_json(run.model_file)
    extrapolator.load_state(load(storage.read_bytes(run.model_weights)), metadata)
    if has_rehearsal(run):
        from raypipe.extrapolators.transfer import Transfer

        tensors = load(storage.read_bytes(run.transfer_weights))
        extrapolator.transfer = Transfer.from_tensors(tensors)
    return extrapolator


def load_intervals(run: Run) -> Intervals | Conformal:
    """Load the calibrated intervals."""
    return FidelityFile.read(run).calibrated()


def has_rehearsal(run: Run) -> bool:
    """Return whether the run has a rehearsal to learn from; a run within a run has none."""
    return "rehearse" in run.ledger()
