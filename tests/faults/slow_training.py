"""A driver whose training takes slow steps, each of which leaves a file that names the node.

    python slow_training.py FOLDER STEPS

The training ends and continues elsewhere when its node is announced to be taken away. No failure of
a worker is allowed.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from raypipe.config import ClusterSettings
from raypipe.distributed.cluster import connect
from raypipe.distributed.preemption import DrainWatch
from raypipe.progress import Progress
from raypipe.runs.run import Run


def work(arguments: dict[str, Any]) -> bool:
    import ray

    folder = Path(arguments["folder"])
    node = int(ray.get_runtime_context().get_node_id(), 16)
    with DrainWatch() as drain:
        for step in range(len(list(folder.iterdir())), arguments["steps"]):
            if drain.announced:
                return True
            (folder / f"{step:03d}-{node}").touch()
            time.sleep(0.25)
    return False


def main(folder: str, steps: int) -> None:
    settings = ClusterSettings(address="auto")
    connect(settings, Run("s3://unused/run"), Progress(quiet=True), verbose=False)
    from raypipe.distributed.ray_train import train
    from raypipe.distributed.training import Training

    arguments = {"folder": folder, "steps": steps}
    train(Training(work, arguments, 1, False, 1, f"{folder}-scratch", {}), max_failures=0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
