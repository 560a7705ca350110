#!/usr/bin/env bash
# Ray: forks of a process that defined an actor class, or imported ray.data or ray.train, draw the same random ids
#
# Versions   ray 2.60.0
# Expected   ids that Ray draws at random differ between processes. After `import ray` alone, those of forks do.
# Seen       `@ray.remote` on a class draws an id from Ray's generator in C++, whose state forks then share: the next ObjectID,
#            NodeID and WorkerID are equal in all of them, without a word. `import ray.train` defines such classes. An ActorID
#            comes from the system and differs.
# Remedy     fork before the first actor class is defined, or import such modules in the child. Nothing reseeds the generator.
#
# Needs Python 3.11 or newer and a package index. Exits 0 as long as this is the behaviour.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check ray==2.60.0
"$folder/venv/bin/python" - <<'PYTHON'
import os

import ray


def drawn_in_forks() -> list[bool]:
    """Whether two forks draw the same ObjectID, and the same ActorID."""
    ids = []
    for _ in range(2):
        receiver, sender = os.pipe()
        if os.fork() == 0:
            os.write(sender, f"{ray.ObjectID.from_random().hex()} {ray.ActorID.from_random().hex()}".encode())
            os._exit(0)
        os.wait()
        ids.append(os.read(receiver, 1000).split())
    return [first == second for first, second in zip(*ids, strict=True)]


before = drawn_in_forks()
print("equal in two forks, [ObjectID, ActorID], after `import ray`:      ", before)


@ray.remote
class Counter:
    pass


after = drawn_in_forks()
print("equal in two forks, [ObjectID, ActorID], after an actor class:    ", after)
assert before == [False, False] and after == [True, False], "the behaviour has changed"
PYTHON
