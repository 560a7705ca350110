"""What a raylet runs to start a worker of a local cluster.

Does what Ray's own script of this name does for environments that only name a Python, without
importing Ray first, which takes 0.4 processor seconds in every worker. Leaves all others to it.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path

CONTEXT = "--serialized-runtime-env-context="
LANGUAGE = "--language="


def own_python(arguments: list[str]) -> tuple[str, list[str]] | None:
    """Return the command of a worker's Python and the arguments for it.

    None if the environment of the worker has more than a Python of its own.
    """
    special = (CONTEXT, LANGUAGE)
    context = json.loads(
        next((item[len(CONTEXT) :] for item in arguments if item.startswith(CONTEXT)), "{}")
    )
    if f"{LANGUAGE}PYTHON" not in arguments or [name for name in context if context[name]] != [
        "py_executable"
    ]:
        return None
    return context["py_executable"], [item for item in arguments if not item.startswith(special)]


if __name__ == "__main__":
    worker = own_python(sys.argv[1:])
    if worker is None:
        # next to Ray's script of the workers, whose path is the first argument
        script = Path(sys.argv[1]).with_name("setup_worker.py")
        os.execv(sys.executable, [sys.executable, str(script), *sys.argv[1:]])
    python, arguments = worker
    os.execvp("bash", ["bash", "-c", f"exec {python} {shlex.join(arguments)}"])
