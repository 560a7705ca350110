#!/usr/bin/env bash
# Ray Train: an error while a worker loads the training function ends the training at once, and its workers keep their CPUs
#
# Versions   ray 2.60.0
# Expected   `max_failures=3` allows three more attempts, as it does for an error in the training function; and after `fit` has
#            raised, nothing of the training is left.
# Seen       `fit` raises ControllerError after one attempt. The actors of all workers stay alive, and so do their reservations:
#            20 s later no CPU is free, so that another training on this cluster waits for workers until the driver ends.
# Remedy     load what can fail inside the training function. Otherwise kill the controller's actor after the error, and remove its
#            placement groups.
#
# Needs Python 3.11 or newer and a package index. Exits 0 as long as this is the behaviour.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check 'ray[train]==2.60.0'
cd "$folder"
venv/bin/python - "$folder" <<'PYTHON'
import sys
import time
from pathlib import Path

import ray
from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

folder = Path(sys.argv[1])
ray.init(num_cpus=2, log_to_driver=False, logging_level="ERROR")


def attempts(name: str) -> int:
    return len(list(folder.glob(f"{name}-*")))


def train(work, name: str) -> str:
    trainer = DataParallelTrainer(
        work,
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(
            name=name, storage_path=str(folder / "runs"), failure_config=FailureConfig(max_failures=3)
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        return type(error).__name__
    return "done"


def once(name: str) -> None:
    """Fail once, as a file server does that is away for a moment."""
    if ray.train.get_context().get_world_rank() == 0:
        number = attempts(name)
        (folder / f"{name}-{number}").touch()
        if number == 0:
            raise OSError("the server is away")


class LoadedLater:
    def __setstate__(self, state):
        if ray.get_runtime_context().get_actor_id() is not None:
            once("loading")

    def __getstate__(self):
        return {"file": "weights"}

    def __call__(self):
        pass


in_function = train(lambda: once("running"), "running")
end = time.monotonic() + 20
while ray.available_resources().get("CPU", 0) < 2 and time.monotonic() < end:
    time.sleep(0.5)
free = ray.available_resources().get("CPU", 0)
print(f"error in the function:            {in_function}, attempts {attempts('running')}, CPUs free afterwards {free:.0f} of 2")
assert in_function == "done" and attempts("running") == 2 and free == 2

while_loading = train(LoadedLater(), "loading")
time.sleep(20)
free = ray.available_resources().get("CPU", 0)
print(f"error while the function loads:   {while_loading}, attempts {attempts('loading')}, CPUs free afterwards {free:.0f} of 2")
assert while_loading == ControllerError.__name__ and attempts("loading") == 1 and free == 0, "the behaviour has changed"
PYTHON
