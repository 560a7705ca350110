"""Run one way of computing alignments, in the environment of its package, and print JSON.

    python run_alignment.py MODULE:FUNCTION FILE --images 32 --batch 16 [--threads 1] [--repeats 2]

The function has run on one image before it is measured, so code that is imported late and tables
that are set up once don't count.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json

import torch
from given import Given, load
from measure import measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("function")
    parser.add_argument("file")
    parser.add_argument("--images", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    module, _, name = arguments.function.partition(":")
    function = getattr(importlib.import_module(module), name)

    def first(count: int) -> Given:  # a fresh network each time: some packages change it
        return load(arguments.file).first(count)

    function(first(1), 1)
    took, result = measure(
        lambda: functools.partial(function, first(arguments.images), arguments.batch),
        arguments.repeats,
    )
    print(json.dumps({**took, "result": result.detach().double().tolist()}))


if __name__ == "__main__":
    main()
