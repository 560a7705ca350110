"""Turn the RayJob of a run, as JSON from the cluster, into the RayJob of a night.

    kubectl get rayjob run -o json | python jobs/k8s/night.py | kubectl create -f -

The schedule in base/schedule.yaml calls it. What the API server added is left out.
"""

from __future__ import annotations

import json
import sys
from typing import Any

RUN, NIGHT = "/jobs/run.py ", "/jobs/nightly.py --refresh-exit-code 0 "


def night_of(run: dict[str, Any]) -> dict[str, Any]:
    """Return the RayJob `night` in the namespace of a run.

    Raises
    ------
    ValueError
        If the run does not start jobs/run.py.
    """
    spec = {name: value for name, value in run["spec"].items() if name != "suspend"}
    if RUN not in spec["entrypoint"]:
        raise ValueError(f"the entrypoint does not start {RUN.strip()}: {spec['entrypoint']}")
    spec["entrypoint"] = spec["entrypoint"].replace(RUN, NIGHT)
    metadata = {"name": "night", "namespace": run["metadata"]["namespace"]}
    return {
        **{name: run[name] for name in ("apiVersion", "kind")},
        "metadata": metadata,
        "spec": spec,
    }


if __name__ == "__main__":
    try:
        json.dump(night_of(json.load(sys.stdin)), sys.stdout)
    except (ValueError, KeyError) as error:
        sys.exit(f"night.py: not the RayJob of a run: {error}")
