"""The extrapolator of a run: created, written and loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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


def make_extrapolator(
    config: Config, run: Run, proxies: Sequence[int], proxy_run: Run | None = None
) -> Any:
    """Create the extrapolator, not fitted.

    Parameters
    ----------
    config, run
        The configuration and the run.
    proxies
        Numbers of the proxies that computed the embeddings.
    proxy_run
        The run that these proxies belong to, when it is another one.

    Returns
    -------
    Extrapolator or TransductiveExtrapolator
        The method of the settings.
    """
    from raypipe.extrapolators import make
    from raypipe.runs.checkpoints import last_layer

    extrapolator: Any = make(config.extrapolate, len(run.classes().names))
    by_proxy = "proxy" in run.ledger() and not config.embed.has_features
    if config.extrapolate.method == "gnn" and by_proxy:
        extrapolator.head = last_layer(proxy_run or run, proxies)
    return extrapolator


@dataclass(frozen=True)
class ModelFiles:
    """Files of a fitted extrapolator: `metadata` and `weights`, as URIs."""

    metadata: str
    weights: str

    @classmethod
    def of(cls, run: Run, part: int | None = None) -> ModelFiles:
        """Return the files of the only extrapolator, or with cross-fitting of that to a part."""
        if part is None:
            return cls(run.model_file, run.model_weights)
        return cls(run.part_model_file(part), run.part_model_weights(part))

    @classmethod
    def every(cls, config: Config, run: Run) -> list[ModelFiles]:
        """Return the files of all extrapolators of a run: one, or one for each part."""
        if not config.proxy.cross_fits:
            return [cls.of(run)]
        return [cls.of(run, part) for part in range(config.proxy.parts)]

    @property
    def names(self) -> set[str]:
        """Names of the files."""
        return {storage.name(self.metadata), storage.name(self.weights)}


def model_files(config: Config, run: Run) -> set[str]:
    """Return the names of the files in `extrapolator/` that samples are scored with."""
    if config.scores_embeddings:
        return {storage.name(run.probe_weights)}
    return set().union(*(files.names for files in ModelFiles.every(config, run)))


def save_extrapolator(files: ModelFiles, extrapolator: Extrapolator) -> None:
    """Write a fitted extrapolator; the metadata last."""
    from safetensors.numpy import save

    tensors, metadata = extrapolator.state()
    storage.write_bytes(files.weights, save(tensors))
    storage.write_json(files.metadata, metadata)


def load_extrapolator(config: Config, run: Run, part: int | None = None) -> Any:
    """Load a fitted extrapolator, with the map that a rehearsal learned."""
    from safetensors.numpy import load

    from raypipe.extrapolators import make

    files = ModelFiles.of(run, part)
    extrapolator: Any = make(config.extrapolate, len(run.classes().names))
    metadata = storage.read_json(files.metadata)
    extrapolator.load_state(load(storage.read_bytes(files.weights)), metadata)
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
