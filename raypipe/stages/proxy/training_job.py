"""The training of one proxy, as the driver describes it to the workers.

Importable without torch, which the driver does not need.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from raypipe.config import ProxySettings
from raypipe.runs.partition import SeedPart

DIVERGED = "diverged.json"
"""File with the reason why a training ended before its last epoch."""


@dataclass(frozen=True)
class TrainingJob:
    """The training of one proxy, as its workers need to know it.

    Attributes
    ----------
    settings : ProxySettings
        The section `proxy` of the configuration.
    run_uri : str
        The run folder.
    part : SeedPart
        The part of the seed set to train on.
    gpu : bool
        Whether each worker has a GPU.
    threads : int
        Torch threads of a worker without a GPU.
    key : str
        Names this attempt of the stage; local copies of the seed set carry it.
    """

    settings: ProxySettings
    run_uri: str
    part: SeedPart
    gpu: bool
    threads: int
    key: str

    def as_arguments(self) -> dict[str, Any]:
        """Return the job as JSON values, which Ray Train passes to every worker."""
        settings = self.settings.model_dump(mode="json")
        return {**vars(self), "settings": settings, "part": dataclasses.asdict(self.part)}

    @classmethod
    def from_arguments(cls, arguments: dict[str, Any]) -> TrainingJob:
        """Restore the job from `as_arguments`."""
        settings = ProxySettings.model_validate(arguments["settings"])
        return cls(**{**arguments, "settings": settings, "part": SeedPart(**arguments["part"])})
