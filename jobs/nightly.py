r"""Entry point for a Ray job: the nightly run of a finished run.

New samples of the source are scored, samples that are gone are removed. Nothing is trained.

    export RAY_AUTH_MODE=token
    ray job submit --working-dir . -- python jobs/nightly.py --config jobs/configs/digits.yaml \
        --set run=s3://bucket/runs/digits

The last line of the log is the summary of the night, as one line of JSON.

Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 3 the fidelity of the scores is too
low to prune by (scores are written), 4 done and a refresh (a new seed set) is advised (0 with
`--refresh-exit-code 0`). See docs/guides/nightly.md.
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
    """Do the nightly run, and return the exit code."""
    parser = argparse.ArgumentParser(
        description="Score the new samples of a finished run. The same command resumes."
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
        help="override a setting; may be repeated",
    )
    parser.add_argument(
        "--refresh-exit-code",
        type=int,
        choices=(0, 4),
        default=4,
        help="exit code if a refresh is advised (default: 4); 0 for schedulers such as Ray and "
        "Kubernetes, to which any other code is a failure",
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
    return options.refresh_exit_code if night.exit_code == 4 else night.exit_code


def one_line(night: Any) -> str:
    """Return the main figures as one line of JSON; RUN/snapshots/<snapshot>.json has all."""
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
