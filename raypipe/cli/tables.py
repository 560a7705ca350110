"""The commands that extrapolate scores over embeddings from tables, and attach images to them."""

from __future__ import annotations

from typing import Any

import click

from raypipe.cli.shared import allow_code_option, epilog, set_option, verbose_option


@click.command(
    short_help="Extrapolate your own scores over embeddings.",
    epilog=epilog("raypipe extrapolate --embeddings emb.parquet --scores s.parquet --out runs/own"),
)
@click.option(
    "--embeddings",
    required=True,
    metavar="URI",
    help="Parquet file or folder with columns sample_id, embedding and optionally label.",
)
@click.option(
    "--scores",
    required=True,
    metavar="URI",
    help="Parquet file or folder with columns sample_id and score.",
)
@click.option(
    "--out",
    required=True,
    metavar="URI",
    help="Folder to write. To resume an earlier call, give the same folder.",
)
@click.option(
    "--score-column", default="score", show_default=True, help="Column of --scores to extrapolate."
)
@click.option("--method", help="Extrapolator: gnn, knn, mlp, trees or knn-published. Default: gnn.")
@click.option(
    "--confidence",
    type=float,
    help="Share of samples whose score should lie between lower and upper. Default: 0.9.",
)
@click.option(
    "--holdout",
    type=float,
    help="Share of the scored samples held out to assess fidelity. Default: 0.2.",
)
@click.option(
    "--seed",
    type=int,
    help="Random seed of the hold-out split and the initial weights. Default: 0.",
)
@verbose_option
def extrapolate(embeddings: str, scores: str, out: str, verbose: bool, **options: Any) -> None:
    """Extrapolate your own scores over your own embeddings, without images and without a proxy.

    An interrupted extrapolation resumes when the same command runs again.
    """
    from raypipe.api import extrapolate as predict
    from raypipe.runs.status import describe_extrapolation

    result = predict(embeddings, scores, out, verbose=verbose, **options)
    for line in describe_extrapolation(result.uri, result.summary):
        click.echo(line)


@click.command(
    short_help="Make a run over images from extrapolated scores.",
    epilog=epilog("raypipe attach runs/own --images s3://bucket/images --to runs/images"),
)
@click.argument("uri", metavar="OUT")
@click.option("--images", required=True, metavar="URI", help="The images: source.uri of the run.")
@click.option("--to", required=True, metavar="URI", help="Folder of the run to write.")
@set_option
@allow_code_option
@verbose_option
def attach(uri: str, images: str, to: str, overrides: tuple[str, ...], **options: Any) -> None:
    """Make a run over images from the folder OUT of `raypipe extrapolate`.

    Scores and images are matched by id, and each image is read once. Then select, report, evaluate
    and export work with the new run. What has no counterpart is counted and listed.
    """
    from raypipe.api import attach as attach_images
    from raypipe.runs.status import describe_attached

    result = attach_images(uri, images, to, overrides=overrides, **options)
    for line in describe_attached(result.uri, result.summary):
        click.echo(line)
