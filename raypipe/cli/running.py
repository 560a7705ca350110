"""Commands that run a configuration, and those that help to write one."""

from __future__ import annotations

from typing import Any

import click

from raypipe.cli.shared import epilog, set_option, verbose_option
from raypipe.errors import TrustError

_noise = click.option(
    "--inject-noise",
    type=float,
    metavar="SHARE",
    help="Replace this share of the labels by wrong ones, to test the detection of label errors.",
)
_redo = click.option(
    "--redo",
    multiple=True,
    metavar="STAGE",
    help="Run this stage and those that depend on it again; may be repeated.",
)
_overwrite = click.option(
    "--overwrite",
    is_flag=True,
    help="Replace whatever run the folder holds, also one over another source.",
)


@click.command(
    short_help="Run all stages of a configuration, or resume.",
    epilog=epilog("raypipe run my.yaml --set source.limit=5000", 0, 1, 2, 3),
)
@click.argument("config")
@set_option
@_noise
@click.option(
    "--until",
    metavar="STAGE",
    help="Stop after this stage: index, seed, label, proxy, measure, rehearse, embed, extrapolate, "
    "pilot, select or report.",
)
@_redo
@_overwrite
@verbose_option
def run(
    config: str, overrides: tuple[str, ...], inject_noise: float | None, **options: Any
) -> None:
    """Run all stages of CONFIG (path or URI of a YAML file), or resume an interrupted run."""
    from raypipe.config import load_config

    _execute(load_config(config, _with_noise(overrides, inject_noise)), **options)


@click.command(
    short_help="Run everything on bundled images, without download.",
    epilog=epilog("raypipe demo --run runs/demo", 0, 1, 2, 3),
)
@click.option("--run", "uri", default="runs/demo", show_default=True, help="Run folder to write.")
@set_option
@_noise
@_redo
@_overwrite
@verbose_option
def demo(uri: str, overrides: tuple[str, ...], inject_noise: float | None, **options: Any) -> None:
    """Run all stages on 1,797 images of handwritten digits, without any download."""
    from raypipe.config import absolute_paths, apply_overrides, demo_settings, parse_config

    changes = _with_noise(overrides, inject_noise)
    config = parse_config(apply_overrides({"run": uri, **demo_settings()}, changes))
    _execute(absolute_paths(config), **options)


@click.command(
    short_help="Print a configuration with every setting.",
    epilog=epilog("raypipe init > my.yaml", 0),
)
@click.option("--minimal", is_flag=True, help="Print only what nearly every run sets.")
def init(minimal: bool) -> None:
    """Print a configuration with every setting, its default and a comment."""
    from raypipe.config.commented import commented_config, minimal_config
    from raypipe.distributed.installed_parts import described_parts
    from raypipe.plugins import code_allowed

    if minimal:
        click.echo(minimal_config(), nl=False)
        return
    with code_allowed():  # of installed packages
        parts = described_parts()
    click.echo(commented_config(parts), nl=False)


@click.command(
    short_help="List the scores that can be measured.", epilog=epilog("raypipe scores", 0)
)
def scores() -> None:
    """List the scores that can be measured: what each is, what it needs and what it costs."""
    from raypipe.config.choices import EXPERIMENTAL_SCORES
    from raypipe.distributed.installed_parts import installed_parts
    from raypipe.plugins import SCORE, code_allowed, package_of
    from raypipe.scores.registry import SCORES

    for info in SCORES.values():
        free = info.cost == "none"
        cost = "no cost beyond the training" if free else f"costs {info.cost}"
        click.echo(f"{info.name:<20} {info.summary}")
        click.echo(f"{'':<20} needs {info.needs}; {cost}; {info.source}")
        if info.name in EXPERIMENTAL_SCORES:
            click.echo(f"{'':<20} experimental: {EXPERIMENTAL_SCORES[info.name]}")
    with code_allowed():  # of installed packages
        others = dict(installed_parts(SCORE))
    for name, score in others.items():
        if isinstance(score, Exception):
            click.echo(f"{name:<20} cannot be used: {score}")
            continue
        click.echo(f"{name:<20} {score.summary}")
        cost = "needs trajectory; no cost beyond the training"
        click.echo(f"{'':<20} {cost}; {score.paper}; from {package_of(SCORE, name)}")


def _with_noise(overrides: tuple[str, ...], share: float | None) -> tuple[str, ...]:
    return overrides if share is None else (*overrides, f"source.inject_noise={share}")


def _execute(config: Any, *, verbose: bool, **options: Any) -> None:
    from raypipe.pipeline import execute
    from raypipe.progress import Progress
    from raypipe.runs.run import Run
    from raypipe.runs.status import describe_result

    try:
        execute(config, progress=Progress(verbose=verbose), verbose=verbose, **options)
    except TrustError:
        for line in describe_result(Run(config.run)):
            click.echo(line)
        raise
    for line in describe_result(Run(config.run)):
        click.echo(line)
