"""Entry point for a Ray job: one night of a finished run. What is new in its source is scored, what is gone is removed; nothing is trained.

    ray job submit --working-dir . -- python jobs/nightly.py --config jobs/configs/digits.yaml --set run=s3://bucket/runs/digits

The last line of the log is the night in one line of JSON. Exit codes: 0 done, 1 failed, 2 bad usage or configuration, 3 scores are
written, but too unfaithful to prune by, 4 done, and a refresh (a new seed set) is advised. See docs/guides/nightly.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# as in jobs/run.py
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def main(arguments: Sequence[str] | None = None) -> int:
    """Do the night of the run that the arguments name; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Score what is new in the source of a finished run; running it again resumes."
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="PATH",
        help="YAML file: a path in the working directory, or s3://",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="overrides one setting",
    )
    options = parser.parse_args(arguments)

    from raypipe.config import load_config
    from raypipe.errors import RaypipeError

    try:
        config = load_config(options.config, options.set)
        from raypipe.nightly import run_night

        night = run_night(config)
    except RaypipeError as error:
        print(f"raypipe: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    if night.refused:
        print(f"raypipe: {night.refused}", file=sys.stderr)
    sys.stderr.flush()
    print(one_line(night), flush=True)
    return night.exit_code


def one_line(night: Any) -> str:
    """What one looks for first; all of it is in RUN/snapshots/<snapshot>.json."""
    drift, fidelity = night.manifest["drift"] or {}, night.manifest["fidelity"] or {}
    figures = {
        "run": night.uri,
        "snapshot": night.snapshot,
        "made": night.wrote_snapshot,
        "files": night.manifest["files"],
        "samples": night.manifest["samples"],
        "auc": {window: found["auc"] for window, found in drift.items()},
        "spearman": fidelity.get("spearman"),
        "refresh": night.advice,
        "expired": len(night.expired),
    }
    return json.dumps(figures)


if __name__ == "__main__":
    sys.exit(main())
