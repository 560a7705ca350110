"""How well every extrapolator ranks samples it never saw, for every score that a finished run can tell.

    python benchmarks/extrapolators.py RUN [--scores moso,el2n] [--methods gnn,knn] [--splits 3] [--threads 1]

Reads embeddings, signals, labels and measured scores of the seed set from a run, and computes every trajectory score from the
proxy's trajectory, whether or not the run measured it. For each split a random fifth of the seed set is held out; the table gives
the mean Spearman correlation on it over the splits (lowest to highest), and the mean seconds of a fit. `proxy_loss` and
`class_mean` are fidelity's baselines. Starts no cluster, writes nothing. What `fidelity.py` says needs no run, takes longer, and judges on
samples that the proxy was not trained on.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import pyarrow as pa
import torch
from common import predict

from raypipe import storage
from raypipe.assessment.rank_agreement import spearman
from raypipe.config import Config, load_config
from raypipe.errors import RaypipeError
from raypipe.extrapolators import METHODS
from raypipe.extrapolators.base import Nodes
from raypipe.runs.embeddings import COLUMNS, nodes_of
from raypipe.runs.manifests import SeedManifest
from raypipe.runs.measured_scores import measured_scores
from raypipe.runs.run import Run
from raypipe.scores.registry import SCORES
from raypipe.stages.measure.trajectories import score_rows

HELD = 0.2


def samples(run: Run) -> tuple[list[str], Nodes]:
    """Ids and nodes of every sample of the run."""
    parts = [
        storage.read_table(run.path("embeddings", f"{name}.parquet"), COLUMNS)
        for name in sorted(run.done("embeddings"))
    ]
    table = pa.concat_tables([part.replace_schema_metadata(None) for part in parts])
    return table["sample_id"].to_pylist(), nodes_of(table)


def seed_scores(config: Config, run: Run) -> dict[str, dict[str, float]]:
    """Every score that the run measured or that its trajectory gives, by sample id; those that need more epochs are left out."""
    found = {name: measured_scores(run, name, "seed") for name in config.measure.at_checkpoints}
    shards = [run.path("seed", f"{name}.parquet") for name in SeedManifest.read(run).shards]
    table = pa.concat_tables(
        [storage.read_table(shard, ["sample_id", "label"]) for shard in shards]
    )
    ids, label = table["sample_id"].to_pylist(), table["label"].to_numpy().astype(np.int64)
    for name in (
        name for name, info in SCORES.items() if info.needs == "trajectory" and name not in found
    ):
        try:
            options = {
                key: value for key, value in config.measure.options_of(name).items() if key != "at"
            }
            values = score_rows(run, 0, len(ids), label, {name: options})[name]
        except RaypipeError as error:
            print(f"left out: {error}")
        else:
            found[name] = dict(zip(ids, values.tolist(), strict=True))
    return found


def held_out(
    method: str, everything: Nodes, rows: np.ndarray, score: np.ndarray, classes: int, split: int
) -> tuple[float, float]:
    """Spearman on a held-out fifth, and seconds."""
    order = np.random.default_rng(split).permutation(len(rows))
    held, kept = order[: round(HELD * len(rows))], order[round(HELD * len(rows)) :]
    began = time.perf_counter()
    guess = predict(method, everything, rows[kept], score[kept], rows[held], classes)
    return spearman(guess, score[held]) or 0.0, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("--scores", help="names with commas; default: all there are")
    parser.add_argument(
        "--methods",
        default=",".join([*METHODS, "class_mean", "proxy_loss"]),
        help="names with commas",
    )
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    run = Run(arguments.run)
    config = load_config(run.path("config.yaml"))
    ids, everything = samples(run)
    scores = seed_scores(config, run)
    names, methods = (arguments.scores or ",".join(scores)).split(","), arguments.methods.split(",")
    place = {sample_id: row for row, sample_id in enumerate(ids)}
    classes = len(run.classes().names)
    print(
        f"{len(ids)} samples, {len(scores[names[0]])} of them scored, {arguments.splits} splits\n"
    )
    print("| score | " + " | ".join(methods) + " |\n|" + "---|" * (len(methods) + 1))
    for name in names:
        known = {
            sample_id: value for sample_id, value in scores[name].items() if sample_id in place
        }
        rows, score = (
            np.array([place[sample_id] for sample_id in known]),
            np.array(list(known.values())),
        )
        cells = []
        for method in methods:
            found, seconds = zip(
                *(
                    held_out(method, everything, rows, score, classes, split)
                    for split in range(arguments.splits)
                )
            )
            cells.append(
                f"{np.mean(found):.3f} ({min(found):.3f} to {max(found):.3f}), {np.mean(seconds):.0f} s"
            )
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
