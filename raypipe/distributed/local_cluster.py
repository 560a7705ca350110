"""Start a Ray cluster on this machine without the processes of Ray that a run never uses.

Ray starts an autoscaler, a process that forwards logs, a dashboard without pages, and workers
before any work, and it imports itself once more in every worker of a runtime environment. On two
cores that is most of the start (benchmarks/results/startup-cpu.txt). `ray.init` has no options for
these parts, but what it calls has: they are replaced while it runs. These are private parts of Ray,
so only versions that this was tested with (`TESTED`) start without them.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from raypipe.distributed.fork_server import new_fork_server
from raypipe.distributed.waiting import waiting_variables

TESTED = ("2.60.",)
"""Beginnings of the versions of Ray whose private parts are as `_few_processes` expects."""

NO_AUTOSCALER = b"raypipe:no-autoscaler"
"""Key in Ray's key-value store of a cluster without the process that reports an autoscaler."""


def start_local(options: dict[str, Any], preload: bool, libraries: Sequence[str]) -> None:
    """Start a Ray cluster on this machine and connect to it.

    Parameters
    ----------
    options : dict
        Arguments of `ray.init`.
    preload : bool
        Whether to fork the workers from a process that has imported torch and Ray.
    libraries : sequence of str
        Other packages for that process to import.
    """
    import ray

    # Ray protects a local cluster with a token. By default it writes the token to the home
    # directory, which can be read-only. The variable stays set, because this process and those of
    # the cluster need it as long as the cluster runs.
    if not any(
        name in os.environ for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    ):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # saves a process: this machine is not preemptible
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # instead of 15: next to other processes, a run got a small share of the machine
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.update(waiting_variables())  # workers inherit them
    if preload and sys.platform == "linux":
        # fails if the temporary folder has too long a path for a socket: workers then import torch
        with contextlib.suppress(OSError):
            options["runtime_env"] = {"py_executable": new_fork_server(libraries).python()}
            # they would not be forks, so that no task could use them
            os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    if not ray.__version__.startswith(TESTED):
        ray.init(address="local", include_dashboard=False, **options)
        return
    from ray._private.ray_constants import DASHBOARD_ADDRESS, KV_NAMESPACE_DASHBOARD
    from ray.experimental.internal_kv import _internal_kv_put

    with _few_processes(log_monitor=options.get("log_to_driver", True)):
        ray.init(address="local", include_dashboard=False, **options)
    _internal_kv_put(NO_AUTOSCALER, b"1")
    # Ray Data asks for it after a job, and would look for 40 s; nothing answers at this port
    _internal_kv_put(DASHBOARD_ADDRESS, b"127.0.0.1:1", namespace=KV_NAMESPACE_DASHBOARD)


@contextlib.contextmanager
def _few_processes(log_monitor: bool) -> Iterator[None]:
    """Let Ray start a node without autoscaler and dashboard, and workers without a second import.

    `log_monitor` keeps the process that forwards what workers print.
    """
    from ray._private import parameter, services, utils

    few = functools.partial(
        parameter.RayParams,
        no_monitor=True,
        include_log_monitor=log_monitor,
        setup_worker_path=str(Path(__file__).with_name("setup_worker.py")),
    )
    replaced = (
        (parameter, "RayParams", few),
        # no dashboard, and hence no process and no address of one
        (services, "start_api_server", lambda *_, **__: ("", None)),
        # its agent then works as in an installation without the packages of the dashboard
        (utils, "get_dashboard_dependency_error", lambda: ImportError("left out")),
    )
    with contextlib.ExitStack() as stack:
        for module, name, value in replaced:
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)
        yield
