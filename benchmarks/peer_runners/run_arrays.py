"""Run one way of selecting or extrapolating, in the environment of its package, and print JSON.

    python run_arrays.py MODULE:FUNCTION FILE [--threads 1] [--repeats 2]

The file is an npz. The function takes its arrays and returns another function, which is measured.
The result goes to FILE.NAME.npy, where NAME is that of the function.
"""

from __future__ import annotations

import argparse
import importlib
import json

import numpy as np
from measure import measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("function")
    parser.add_argument("file")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    module, _, name = arguments.function.partition(":")
    function = getattr(importlib.import_module(module), name)
    with np.load(arguments.file) as stored:
        arrays = dict(stored)
    took, result = measure(lambda: function(arrays), arguments.repeats)
    output = f"{arguments.file}.{module}.{name}.npy"
    np.save(output, np.asarray(result))
    print(json.dumps({**took, "result": output}))


if __name__ == "__main__":
    main()
