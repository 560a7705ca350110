#!/usr/bin/env bash
# Ray: the actors that an actor made end with it, its placement groups do not
#
# Versions   ray 2.60.0
# Expected   neither is detached, so both end with the actor that made them, and their CPUs are free again.
# Seen       the child actor ends within a second and frees its CPU. The placement group stays CREATED and keeps its CPU as long as
#            the driver lives, although nobody has a handle to it.
# Remedy     make placement groups in the driver and pass them on, or look for those of dead actors in `placement_group_table()`
#            by a name of your own, and remove them with `remove_placement_group`.
#
# Needs Python 3.11 or newer and a package index. Exits 0 as long as this is the behaviour.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check ray==2.60.0
"$folder/venv/bin/python" - <<'PYTHON'
import time

import ray
from ray.util import placement_group, placement_group_table

ray.init(num_cpus=2, log_to_driver=False, logging_level="ERROR")


@ray.remote(num_cpus=1)
class Child:
    def ready(self) -> bool:
        return True


@ray.remote(num_cpus=0)
class Parent:
    def make_child(self) -> None:
        self.child = Child.remote()
        ray.get(self.child.ready.remote())

    def make_group(self) -> None:
        self.group = placement_group([{"CPU": 1}], name="of the parent")
        ray.get(self.group.ready())


def free_after_death(make: str) -> float:
    """CPUs that are free once the parent is dead, of 2; it waits up to 20 s for all of them."""
    parent = Parent.remote()
    ray.get(getattr(parent, make).remote())
    ray.kill(parent)
    end = time.monotonic() + 20
    while ray.available_resources().get("CPU", 0) < 2 and time.monotonic() < end:
        time.sleep(0.2)
    return ray.available_resources().get("CPU", 0)


child, group = free_after_death("make_child"), free_after_death("make_group")
states = [row["state"] for row in placement_group_table().values() if row["name"] == "of the parent"]
print(f"free CPUs after the death of an actor that made an actor:           {child:.0f} of 2")
print(f"free CPUs after the death of an actor that made a placement group:  {group:.0f} of 2, its state: {states}")
assert (child, group, states) == (2, 1, ["CREATED"]), "the behaviour has changed"
PYTHON
