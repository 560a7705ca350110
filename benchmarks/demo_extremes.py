"""Whether the images at both ends of a report are those that belong there.

    raypipe demo && python benchmarks/demo_extremes.py [runs/demo] [--images 24]

Measures every sample of the source of a finished run again, in this process and without the run's embeddings and scores: the images are decoded,
passed through the run's proxies, and scored by linear probes. Prints how many of the images with the highest and with the lowest scores are the
same, and how far the scores of all samples agree.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr

from raypipe import storage
from raypipe.runs.checkpoints import load_checkpoint
from raypipe.runs.partition import proxy_parts
from raypipe.runs.proxy_roles import ProxyRoles
from raypipe.runs.run import Run
from raypipe.scores.linear_probe import LinearProbe
from raypipe.sources import open_source
from raypipe.stages.measure.outputs import OUTPUTS
from raypipe.vision.decode import decode_batch


def decoded(run: Run) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Ids, pixels and labels of all samples."""
    config, classes = run.config(), run.classes()
    source, size = open_source(config.source), config.proxy.image_size
    samples = [
        sample
        for fragment in run.fragments()
        if not fragment.error
        for sample in source.read(run.with_members(fragment))
    ]
    pixels, reasons = decode_batch(samples, size, config.source.max_pixels)
    good = [not reason for reason in reasons]
    ids = [sample.sample_id for sample, usable in zip(samples, good) if usable]
    labels = [classes.label_of(sample)[0] for sample, usable in zip(samples, good) if usable]
    return ids, pixels[np.array(good, bool)], np.array(labels)


def measured(run: Run) -> dict[str, float]:
    """The score of every sample by id."""
    config = run.config()
    roles = ProxyRoles.of(config)
    if not config.scores_embeddings:
        raise SystemExit(f"{run.uri}: the score {config.score} does not come from embeddings")
    ids, pixels, label = decoded(run)
    part, parts = roles.part_of(ids), proxy_parts(run)
    total = np.zeros(len(ids))
    for proxy in roles.embedders:
        model = load_checkpoint(run, parts[proxy].trained.final, folder=parts[proxy].checkpoints)
        with torch.inference_mode():
            batches = torch.from_numpy(pixels).split(64)
            embedding = torch.cat([model.embed(batch) for batch in batches]).numpy()
        viewed = roles.is_viewed(part, proxy)
        embedding = embedding.astype(config.embed.dtype)[viewed]
        probe = LinearProbe.fit(embedding, label[viewed], len(run.classes().names))
        total[viewed] += probe.statistics(embedding, label[viewed])[OUTPUTS[config.score]]
    mean = total / len(roles.viewers(0))
    return dict(zip(ids, mean.tolist(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", default="runs/demo")
    parser.add_argument("--images", type=int, default=24)
    arguments = parser.parse_args()
    run = Run(arguments.run)
    truth = measured(run)
    written = {
        row["sample_id"]: row["score"]
        for _, table in storage.iter_tables(run.scores_folder)
        for row in table.select(["sample_id", "score"]).to_pylist()
    }
    grids = storage.read_json(run.report_summary)["grids"]
    order = sorted(truth, key=lambda sample_id: truth[sample_id])
    print(f"{run.uri}: {len(truth):,} samples measured again, {len(written):,} in scores/")
    for name, right in (("lowest", order), ("highest", order[::-1])):
        shown = [tile["sample_id"] for tile in grids[name]][: arguments.images]
        same = len(set(shown) & set(right[: len(shown)]))
        print(
            f"{name}: {same} of the {len(shown)} images of the report are among the {len(shown)} {name}"
        )
    pairs = np.array([(truth[sample_id], score) for sample_id, score in written.items()])
    print(
        f"Spearman {spearmanr(*pairs.T)[0]:.4f}, Pearson {pearsonr(*pairs.T)[0]:.4f} over all samples"
    )


if __name__ == "__main__":
    main()
