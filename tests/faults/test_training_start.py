"""A worker that dies while the workers of a training start costs only a restart."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.ray, pytest.mark.timeout(200)]


@pytest.mark.parametrize("deaths", [1, 2])
def test_a_worker_that_dies_while_all_start_leaves_nothing_behind(
    cluster: str, tmp_path: Path, deaths: int
) -> None:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig
    from ray.train.torch.config import _TorchBackend

    from raypipe.distributed.failures import as_raypipe_error
    from raypipe.distributed.worker_group import InterruptibleTrainer
    from raypipe.errors import StageError

    class Dies(_TorchBackend):
        """Like torch's, but at first one of the workers dies while they connect."""

        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            died = len(list(tmp_path.glob("died-*")))
            if died < deaths:
                (tmp_path / f"died-{died}").touch()
                worker_group.execute_single(0, os._exit, 1)
            super().on_start(worker_group, backend_config)

    class Config(TorchConfig):
        @property
        def backend_cls(self) -> type:
            return Dies

    def work() -> None:
        (tmp_path / f"rank-{ray.train.get_context().get_world_rank()}").touch()

    cpus = ray.cluster_resources()["CPU"]
    trainer = InterruptibleTrainer(
        work,
        torch_config=Config(backend="gloo"),
        scaling_config=ScalingConfig(
            num_workers=2, resources_per_worker={"CPU": cpus / 2}
        ),  # no room for two groups
        run_config=RunConfig(
            storage_path=str(tmp_path / "train"), failure_config=FailureConfig(max_failures=1)
        ),
    )
    if deaths > 1:
        with pytest.raises(TrainingFailedError) as caught:
            trainer.fit()
        assert str(as_raypipe_error(caught.value)).startswith(
            "workers of the training keep dying while they start"
        )
        assert type(as_raypipe_error(caught.value)) is StageError
    else:
        trainer.fit()
    wanted = {f"died-{number}" for number in range(deaths)} | (
        {"rank-0", "rank-1"} if deaths == 1 else set()
    )
    assert {path.name for path in tmp_path.iterdir()} - {"train"} == wanted
    assert_all_is_free(cpus)


@pytest.mark.parametrize("deaths", [1, 2])
def test_a_worker_that_dies_while_it_loads_the_training_function(
    cluster: str, tmp_path: Path, deaths: int
) -> None:
    import ray
    import ray.train

    from raypipe.distributed.training import Training
    from raypipe.distributed.worker_group import train_group
    from raypipe.errors import StageError

    class DiesWhereItIsLoaded:
        """Loading this training function ends the worker of rank 0, a few times."""

        def __init__(self) -> None:
            self.folder, self.deaths = tmp_path, deaths

        def __setstate__(self, state: dict[str, Any]) -> None:
            self.__dict__.update(state)
            if "RayTrainWorker" not in " ".join(psutil.Process().cmdline()):
                return
            died = len(list(self.folder.glob("died-*")))
            if ray.train.get_context().get_world_rank() == 0 and died < self.deaths:
                (self.folder / f"died-{died}").touch()
                os._exit(1)

        def __call__(self, arguments: dict[str, Any]) -> bool:
            rank = ray.train.get_context().get_world_rank()
            (Path(arguments["ranks"]) / str(rank)).touch()
            return False

    (tmp_path / "ranks").mkdir()
    cpus = ray.cluster_resources()["CPU"]
    training = Training(
        worker=DiesWhereItIsLoaded(),
        arguments={"ranks": str(tmp_path / "ranks")},
        workers=2,
        gpu=False,
        cpus=int(cpus) // 2,  # no room for two groups
        scratch=str(tmp_path / "scratch"),
        label_selector={},
    )
    if deaths > 1:
        with pytest.raises(StageError, match="or a worker that was starting; rerun to resume"):
            train_group(training, max_failures=1)
    else:
        assert train_group(training, max_failures=1) is False
    ranks = {path.name for path in (tmp_path / "ranks").iterdir()}
    assert ranks == {"0", "1"} if deaths == 1 else "0" not in ranks
    assert len(list(tmp_path.glob("died-*"))) == deaths
    assert not (tmp_path / "scratch").exists()
    assert_all_is_free(cpus)


def assert_all_is_free(cpus: float) -> None:
    import ray

    end = time.monotonic() + 30
    while ray.available_resources().get("CPU", 0) < cpus and time.monotonic() < end:
        time.sleep(0.1)
    assert ray.available_resources()["CPU"] == cpus
