"""Ray Train's trainer, which an interrupt ends at once."""

from __future__ import annotations

from typing import Any

import ray
from ray.train import Result
from ray.train.torch import TorchTrainer


class Trainer(TorchTrainer):
    """Ray Train answers the first interrupt by asking its controller to stop, which one that waits for workers never hears, and leaves
    its signal handler in place after the training, where it ends the process with exit code 0. Here the interrupt is an ordinary
    KeyboardInterrupt and the controller is killed, and with it its workers; what the finished epochs wrote is kept."""

    _controller: Any = None

    def _register_sigint_handler(self, controller: Any) -> None:
        self._controller = controller

    def fit(self) -> Result:
        try:
            return super().fit()
        except KeyboardInterrupt:
            if self._controller is not None:
                ray.kill(self._controller)
            raise
