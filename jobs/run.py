r"""Entry point for a Ray job: run a configuration.

    export RAY_AUTH_MODE=token
    ray job submit --working-dir . -- python jobs/run.py --config jobs/configs/digits.yaml \
        --set run=s3://bucket/runs/digits

The last line of the log is the summary of the run, as one line of JSON.

Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 3 the fidelity of the scores is too
low to prune by (scores and report are written, keep-lists are not).

The job uploads its working directory, which contains the package. The nodes only need its
dependencies.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# `python jobs/run.py` puts jobs/ on the path, not its parent folder. Ray adds the uploaded folder
# to the path of its workers.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(
        description="Run a raypipe configuration. The same command resumes an interrupted run."
    )
    result.add_argument(
        "--config",
        required=True,
        metavar="PATH",
        help="YAML file: a path in the working directory, or s3://",
    )
    result.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="override a setting; may be repeated",
    )
    result.add_argument(
        "--inject-noise",
        type=float,
        metavar="SHARE",
        help="replace this share of the labels by wrong ones, to test detection",
    )
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the configuration, and return the exit code."""
    options = parser().parse_args(arguments)

    import raypipe
    from raypipe.config import load_config
    from raypipe.errors import RaypipeError, TrustError

    noise = (
        [f"source.inject_noise={options.inject_noise}"] if options.inject_noise is not None else []
    )
    try:
        config = load_config(options.config, [*options.set, *noise])
        result = raypipe.run(config)
    except TrustError as error:
        from raypipe.api import summary_of
        from raypipe.runs.run import Run

        print(f"raypipe: {error}", file=sys.stderr, flush=True)
        print(one_line(config.run, summary_of(Run(config.run))), flush=True)
        return error.exit_code
    except RaypipeError as error:
        print(f"raypipe: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    sys.stderr.flush()
    print(one_line(result.uri, result.summary), flush=True)
    return 0


def one_line(uri: str, summary: dict[str, Any]) -> str:
    """Return the main figures of a run as one line of JSON; `report/summary.json` has all."""
    counts, fidelity, cost = (summary.get(name) or {} for name in ("counts", "fidelity", "cost"))
    figures = {
        "run": uri,
        **{name: counts.get(name) for name in ("samples", "measured", "rejects")},
        **{name: fidelity.get(name) for name in ("spearman", "spearman_low", "spearman_high")},
        "keep": {item["file"]: item["samples"] for item in summary.get("keep") or []},
        "wall_seconds": (cost.get("total") or {}).get("wall_seconds"),
    }
    if noise := summary.get("label_noise"):
        figures["warning"] = noise["warning"]
    return json.dumps(figures)


if __name__ == "__main__":
    sys.exit(main())
