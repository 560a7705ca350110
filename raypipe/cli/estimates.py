"""Commands that look ahead: what a source contains, and what a run would cost."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from raypipe.cli.shared import allow_code_option, epilog, set_option


class _Count(click.ParamType):
    """A whole number, also as 1e6 or 1_000_000."""

    name = "integer"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number."""
        try:
            number = float(value)
        except ValueError:
            number = 0.0
        if not (number >= 1 and number.is_integer()):
            self.fail(f"{value!r} is not a whole number above 0, such as 1e6", param, ctx)
        return int(value) if str(value).isdecimal() else int(number)


@click.command(
    short_help="Preview a source and what a run would cost.",
    epilog=epilog("raypipe inspect /data/images --grid sheet.png"),
)
@click.argument("source", required=False)
@click.option(
    "--config",
    metavar="CONFIG",
    help="YAML file with the settings to use, and the source if SOURCE is not given.",
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="FIELD=VALUE",
    help="Override a setting of the section `source`, such as include='*.tar', or "
    "SECTION.FIELD=VALUE; may be repeated.",
)
@click.option(
    "--samples",
    default=256,
    show_default=True,
    help="Number of samples to draw, spread over the source.",
)
@click.option(
    "--seed", default=0, show_default=True, help="Random seed; another number draws other samples."
)
@click.option(
    "--grid", metavar="PNG", help="PNG file to write: 64 of the drawn images with class and id."
)
@click.option(
    "--like",
    metavar="RUN",
    help="Estimate the cost from the ledger of this finished run instead of stored constants.",
)
@click.option("--cpus", type=float, help="Number of CPUs to estimate for. Default: this machine's.")
@click.option("--gpus", type=float, help="Number of GPUs to estimate for. Default: this machine's.")
@click.option(
    "--address", help="Estimate for the CPUs and GPUs of this Ray cluster (auto: RAY_ADDRESS)."
)
@allow_code_option
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def inspect(source: str | None, as_json: bool, **options: Any) -> None:
    """Show what SOURCE (a path or URI) contains, and estimate the cost of a run.

    Reports the balance of the classes, the sizes of the images and the expected rejects, from
    samples spread over the source. Takes seconds and runs nothing.
    """
    from raypipe.api import inspect as inspect_source
    from raypipe.estimate.inspect_text import describe_survey

    survey = inspect_source(source, **options)
    if as_json:
        click.echo(json.dumps(survey.as_dict(), indent=2, ensure_ascii=False))
        return
    encoding = (getattr(sys.stdout, "encoding", None) or "ascii").lower()
    for line in describe_survey(survey, "█" if encoding.startswith("utf") else "#"):
        click.echo(line)
    if options["grid"]:
        click.echo(f"grid        {options['grid']}")


@click.command(
    short_help="Plan a run over a source of any size.",
    epilog=epilog("raypipe plan my.yaml --samples 100000000 --gpus 8"),
)
@click.argument("config")
@click.option(
    "--samples",
    type=_Count(),
    required=True,
    help="Number of images in the source. The source need not exist yet.",
)
@click.option(
    "--gpus", type=float, default=0, show_default=True, help="Number of GPUs in the cluster."
)
@click.option(
    "--cpus",
    type=float,
    help="Number of CPUs in the cluster. Default: 8 per GPU, or 16 without GPUs.",
)
@click.option(
    "--image-bytes",
    type=float,
    default=110_000,
    show_default=True,
    help="Mean size of an encoded image in bytes.",
)
@click.option(
    "--images-per-file",
    type=int,
    help="Images per file. Default: 1 for image folders and file lists, otherwise 1000.",
)
@click.option("--classes", type=int, default=1000, show_default=True, help="Number of classes.")
@click.option(
    "--rates",
    metavar="FILE",
    help="JSON file with the rates of your machines; see raypipe.estimate.plan_rates.Rates.",
)
@click.option("--decode-rate", type=float, help="Images that one CPU decodes per second.")
@click.option("--forward-rate", type=float, help="Images per second through the proxy on one GPU.")
@click.option(
    "--run",
    "like",
    metavar="RUN",
    help="Take the times of the stages from the ledger of this finished run.",
)
@click.option("--gpu-price", type=float, help="Price of a GPU hour in dollars.")
@click.option("--cpu-price", type=float, help="Price of a CPU hour in dollars.")
@click.option("--request-price", type=float, help="Price of a million storage requests in dollars.")
@click.option("--storage-price", type=float, help="Price of a GB stored for a month in dollars.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
@set_option
def plan(config: str, overrides: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Plan a run of CONFIG over a source of any size.

    Estimates hours, dollars, requests, files and bytes, and shows how close each limit is. Only
    CONFIG is read. For a source that exists, `raypipe inspect` reads samples of it.
    """
    from raypipe.config import load_config
    from raypipe.estimate.plan import plan_of_options
    from raypipe.estimate.plan_text import describe_plan

    result = plan_of_options(load_config(config, overrides), **options)
    if as_json:
        click.echo(json.dumps(result.as_dict(), indent=2, ensure_ascii=False))
        return
    for line in describe_plan(result):
        click.echo(line)
