"""The command line."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from raypipe._version import __version__
from raypipe.errors import RaypipeError, TrustError

EXIT_CODES = {
    0: "done",
    1: "failed",
    2: "wrong usage or configuration",
    3: "the scores cannot be trusted enough to prune by; no keep-lists are written",
    5: "no evidence that the chosen list is better than random lists (--certify)",
    6: "the chosen list is worse than random lists (--certify)",
}
"""Exit codes of all commands."""


def _epilog(example: str, *codes: int) -> str:
    r"""Return the end of a command's help: one example, and the exit codes.

    "\b" keeps click from joining the lines of a paragraph.
    """
    lines = [f"  {code}  {EXIT_CODES[code]}" for code in codes or (0, 1, 2)]
    return "\n".join(["\b", "Example:", f"  {example}", "", "\b", "Exit codes:", *lines])


def demo_settings() -> dict[str, Any]:
    """Return the configuration of the demo, without `run`: the digits of scikit-learn."""
    from importlib.resources import files

    import yaml

    return yaml.safe_load(files("raypipe.config").joinpath("demo.yaml").read_bytes())


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=_epilog("raypipe demo", 0, 1, 2, 3),
)
@click.version_option(__version__, prog_name="raypipe")
def cli() -> None:
    """Find the samples of a large labelled image dataset that are worth training on.

    raypipe measures scores on a small random seed set, extrapolates them to every other sample,
    and writes scores and keep-lists. Any command can be interrupted and rerun to resume.
    """


class _StrategyOption(click.Option):
    """An option whose help names all strategies. The settings are imported once it is shown."""

    @property
    def help(self) -> str | None:
        from raypipe.config.choices import STRATEGY_NAMES

        return f"{', '.join(STRATEGY_NAMES)} or auto. Default: the run's own."

    @help.setter
    def help(self, value: str | None) -> None:
        pass


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


_verbose = click.option(
    "-v", "--verbose", is_flag=True, help="Show every finished fragment, and the output of Ray."
)
_set = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="SECTION.FIELD=VALUE",
    help="Override a setting (`raypipe init` lists them); may be repeated.",
)


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


@cli.command(
    short_help="Run all stages of a configuration, or resume.",
    epilog=_epilog("raypipe run my.yaml --set source.limit=5000", 0, 1, 2, 3),
)
@click.argument("config")
@_set
@_noise
@click.option(
    "--until",
    metavar="STAGE",
    help="Stop after this stage: index, seed, label, proxy, measure, rehearse, embed, extrapolate, "
    "pilot, select or report.",
)
@_redo
@_overwrite
@_verbose
def run(
    config: str, overrides: tuple[str, ...], inject_noise: float | None, **options: Any
) -> None:
    """Run all stages of CONFIG (path or URI of a YAML file), or resume an interrupted run."""
    from raypipe.config import load_config

    _execute(load_config(config, _with_noise(overrides, inject_noise)), **options)


@cli.command(
    short_help="Run everything on bundled images, without download.",
    epilog=_epilog("raypipe demo --run runs/demo", 0, 1, 2, 3),
)
@click.option("--run", "uri", default="runs/demo", show_default=True, help="Run folder to write.")
@_set
@_noise
@_redo
@_overwrite
@_verbose
def demo(uri: str, overrides: tuple[str, ...], inject_noise: float | None, **options: Any) -> None:
    """Run all stages on 1,797 images of handwritten digits, without any download."""
    from raypipe.config import absolute_paths, apply_overrides, parse_config

    changes = _with_noise(overrides, inject_noise)
    config = parse_config(apply_overrides({"run": uri, **demo_settings()}, changes))
    _execute(absolute_paths(config), **options)


@cli.command(
    short_help="Print a configuration with every setting.",
    epilog=_epilog("raypipe init > my.yaml", 0),
)
@click.option("--minimal", is_flag=True, help="Print only what nearly every run sets.")
def init(minimal: bool) -> None:
    """Print a configuration with every setting, its default and a comment."""
    from raypipe.config.commented import commented_config, minimal_config

    click.echo(minimal_config() if minimal else commented_config(), nl=False)


@cli.command(
    short_help="List the scores that can be measured.", epilog=_epilog("raypipe scores", 0)
)
def scores() -> None:
    """List the scores that can be measured: what each is, what it needs and what it costs."""
    from raypipe.config.choices import EXPERIMENTAL_SCORES
    from raypipe.scores.registry import SCORES

    for info in SCORES.values():
        free = info.cost == "none"
        cost = "no cost beyond the training" if free else f"costs {info.cost}"
        click.echo(f"{info.name:<20} {info.summary}")
        click.echo(f"{'':<20} needs {info.needs}; {cost}; {info.source}")
        if info.name in EXPERIMENTAL_SCORES:
            click.echo(f"{'':<20} experimental: {EXPERIMENTAL_SCORES[info.name]}")


@cli.command(
    short_help="Preview a source and what a run would cost.",
    epilog=_epilog("raypipe inspect /data/images --grid sheet.png"),
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


@cli.command(
    short_help="Plan a run over a source of any size.",
    epilog=_epilog("raypipe plan my.yaml --samples 100000000 --gpus 8"),
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
@_set
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


@cli.command(
    short_help="Show progress, errors and cost of a run.",
    epilog=_epilog("raypipe status runs/first"),
)
@click.argument("uri", metavar="RUN")
def status(uri: str) -> None:
    """Show the progress, errors and cost of RUN, from any machine that can read it."""
    from raypipe.runs.status import describe_run
    from raypipe.runs.untrusted import damage_as_error, printable

    with damage_as_error(uri):
        for line in describe_run(uri):
            click.echo(printable(line))


@cli.command(
    short_help="Extrapolate your own scores over embeddings.",
    epilog=_epilog(
        "raypipe extrapolate --embeddings emb.parquet --scores s.parquet --out runs/own"
    ),
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
@_verbose
def extrapolate(embeddings: str, scores: str, out: str, verbose: bool, **options: Any) -> None:
    """Extrapolate your own scores over your own embeddings, without images and without a proxy.

    An interrupted extrapolation resumes when the same command runs again.
    """
    from raypipe.api import extrapolate as predict
    from raypipe.runs.status import describe_extrapolation

    result = predict(embeddings, scores, out, verbose=verbose, **options)
    for line in describe_extrapolation(result.uri, result.summary):
        click.echo(line)


@cli.command(
    short_help="Make a run over images from extrapolated scores.",
    epilog=_epilog("raypipe attach runs/own --images s3://bucket/images --to runs/images"),
)
@click.argument("uri", metavar="OUT")
@click.option("--images", required=True, metavar="URI", help="The images: source.uri of the run.")
@click.option("--to", required=True, metavar="URI", help="Folder of the run to write.")
@_set
@_verbose
def attach(uri: str, images: str, to: str, overrides: tuple[str, ...], verbose: bool) -> None:
    """Make a run over images from the folder OUT of `raypipe extrapolate`.

    Scores and images are matched by id, and each image is read once. Then select, report, evaluate
    and export work with the new run. What has no counterpart is counted and listed.
    """
    from raypipe.api import attach as attach_images
    from raypipe.runs.status import describe_attached

    result = attach_images(uri, images, to, overrides=overrides, verbose=verbose)
    for line in describe_attached(result.uri, result.summary):
        click.echo(line)


@cli.command(
    short_help="Cut keep-lists of a run, without scoring again.",
    epilog=_epilog("raypipe select runs/first --keep 0.5", 0, 1, 2, 3),
)
@click.argument("uri", metavar="RUN")
@click.option(
    "--keep",
    type=float,
    multiple=True,
    help="Fraction to keep, 0 to 1; may be repeated. Default: the run's.",
)
@click.option("--strategy", cls=_StrategyOption)
@click.option("--seed", type=int, help="random, ccs, beta: random seed.")
@click.option("--easy-fraction", type=float, help="mixed: share of the list from the easy end.")
@click.option(
    "--difficulty",
    help="What means hard, for strategies that go by difficulty: auto, score, loss, aum or el2n.",
)
@click.option(
    "--hard-cutoff",
    metavar="SHARE",
    help="ccs, band, d2, infomax, coverage: share of hardest samples that is removed first, or "
    "auto.",
)
@click.option("--strata", type=int, help="ccs, coverage: number of score intervals.")
@click.option(
    "--beta-exponent",
    type=float,
    help="beta: exponent. The higher, the more has to be pruned before easy samples are preferred.",
)
@click.option(
    "--by-class/--over-classes",
    default=None,
    help="Keep the same share of every class, or select over all classes together.",
)
@click.option(
    "--quotas",
    help="Share of each class: proportional, equal, or recall (the more, the lower its recall).",
)
@click.option("--min-per-class", type=int, help="Minimum number of samples to keep of each class.")
@click.option(
    "--always-keep",
    metavar="URI",
    help="File of ids that every list contains: text, one per line, or Parquet with sample_id.",
)
@click.option("--never-keep", metavar="URI", help="File of ids that no list contains.")
@click.option(
    "--near-duplicates",
    type=float,
    help="Count samples of at least this cosine similarity as near-duplicates, and keep only "
    "the one with the highest score.",
)
@click.option(
    "--weights",
    help="Training weights: none, inclusion (inverse probability of being drawn) or class "
    "(frequencies of the source).",
)
@click.option(
    "--force", is_flag=True, help="Write lists even if the fidelity is below trust.min_spearman."
)
def select(
    uri: str, keep: tuple[float, ...], strategy: str | None, force: bool, **options: Any
) -> None:
    """Cut keep-lists from the scores of RUN, without scoring anything again.

    Options that are not given are taken from the run's configuration.
    """
    from raypipe.api import select as cut

    changes = {name: value for name, value in options.items() if value is not None}
    for file, count in cut(uri, list(keep) or None, strategy, force=force, **changes).items():
        click.echo(f"{file}  {count:,} samples")


@cli.command(
    short_help="Write the samples of a keep-list for training.",
    epilog=_epilog("raypipe export runs/first --keep 0.5 --format webdataset --to shards"),
)
@click.argument("uri", metavar="RUN")
@click.option("--keep", type=float, help="Fraction of the keep-list. Default: the only list.")
@click.option(
    "--format",
    required=True,
    metavar="FORMAT",
    help="webdataset, parquet, indices (.npy, .json) or list (.csv, .txt).",
)
@click.option(
    "--to",
    required=True,
    metavar="URI",
    help="Folder to write for shards, file to write for indices and list.",
)
@click.option(
    "--shard-samples",
    type=click.IntRange(1),
    help="Samples per shard. Default: as many as fit into --shard-mb.",
)
@click.option(
    "--shard-mb", type=click.IntRange(1), help="Approximate size of a shard in MiB. Default: 512."
)
@click.option(
    "--snapshot",
    metavar="NAME",
    help="Export the keep-list as it was in this snapshot of a nightly run.",
)
@click.option(
    "--allow-missing", is_flag=True, help="Exit with 0 even if samples can no longer be read."
)
@click.option("--force", is_flag=True, help="Replace another export in the same place.")
@_verbose
def export(
    uri: str, keep: float | None, format: str, to: str, shard_mb: int | None, **options: Any
) -> None:
    """Write the samples of a keep-list of RUN for a training tool, or resume an export."""
    from raypipe.api import export as write

    shard_bytes = None if shard_mb is None else shard_mb << 20
    result = write(uri, keep, format, to, shard_bytes=shard_bytes, **options)
    missing = f", {result['missing']:,} missing" if result["missing"] else ""
    files = f"{result['shards']:,} file{'s' * (result['shards'] != 1)}"
    click.echo(
        f"{result['to']}  {result['samples']:,} samples in {files}, {result['bytes']:,} bytes"
        f"{missing}"
    )


@cli.command(
    short_help="Test whether the keep-lists of a run help.",
    epilog=_epilog("raypipe evaluate runs/first --test /data/test --keep 0.5", 0, 1, 2, 5, 6),
)
@click.argument("uri", metavar="RUN")
@click.option(
    "--test",
    required=True,
    metavar="SOURCE",
    help="Test set: a path or URI, read like the run's source.",
)
@click.option(
    "--test-set",
    multiple=True,
    metavar="FIELD=VALUE",
    help="Override a setting of the section `source` for the test set; may be repeated.",
)
@click.option(
    "--keep",
    metavar="FRACTIONS",
    help="Fractions to keep, separated by commas. Default: 0.1,0.3,0.5,0.7,0.9.",
)
@click.option(
    "--strategies",
    metavar="NAMES",
    help="Strategies that cut the lists, separated by commas. Default: the run's; ccs if that is "
    "auto.",
)
@click.option(
    "--scores",
    metavar="NAMES",
    help="Scores to cut lists from, separated by commas: run or measured:NAME. Default: all that "
    "every sample has.",
)
@click.option(
    "--beside",
    multiple=True,
    metavar="RUN",
    help="Another run over the same source to compare; may be repeated.",
)
@click.option("--seeds", type=int, help="Trainings per list and fraction. Default: 3.")
@click.option(
    "--protocol",
    help="epochs: every list is trained for the same number of epochs. steps: for as many steps as "
    "the full set. Default: epochs.",
)
@click.option(
    "--dynamic",
    metavar="NAMES",
    help="Trainings that take other samples in every epoch, separated by commas: redrawn, "
    "redrawn-by-score, infobatch.",
)
@click.option(
    "--attack",
    is_flag=True,
    help="Train adversarially, and also test on adversarial examples (PGD; proxy.adversary).",
)
@click.option(
    "--certify",
    is_flag=True,
    help="Choose among the lists on half of the test set, certify on the other half that the "
    "chosen one beats random lists. Exit code 5: no evidence; 6: harmful.",
)
@click.option("--model", help="Network to train. Default: the run's proxy.model.")
@click.option(
    "--image-size",
    type=int,
    help="Side of the images in pixels. Default: the run's proxy.image_size.",
)
@click.option("--epochs", type=int, help="Passes over a list. Default: the run's proxy.epochs.")
@click.option(
    "--batch-size", type=int, help="Images per step. Default: the run's proxy.batch_size."
)
@click.option("--lr", type=float, help="Peak learning rate. Default: the run's proxy.lr.")
@click.option("--use-gpu", help="One GPU per training: true, false or auto. Default: auto.")
@click.option(
    "--cpus-per-training",
    type=int,
    help="CPUs per training. Default: up to 4 with GPUs; without GPUs 1, or more if there are "
    "fewer trainings than CPUs.",
)
@_verbose
def evaluate(uri: str, test: str, test_set: tuple[str, ...], verbose: bool, **options: Any) -> int:
    """Test whether the keep-lists of RUN help.

    Trains on the lists, on random lists of the same size and on the full set, and compares the
    models on a test set. Finished trainings are not repeated.
    """
    import yaml

    from raypipe.api import evaluate as compare
    from raypipe.evaluation.certificate import VERDICT_EXIT_CODES
    from raypipe.evaluation.summary import describe_evaluation

    settings = {name: value for name, value in options.items() if value not in (None, ())}
    for name in ("keep", "strategies", "scores", "dynamic"):
        if name in settings:
            settings[name] = [yaml.safe_load(part) for part in settings[name].split(",")]
    if "use_gpu" in settings:
        settings["use_gpu"] = yaml.safe_load(settings["use_gpu"])
    summary = compare(uri, test, test_settings=test_set, verbose=verbose, **settings)
    for line in describe_evaluation(summary):
        click.echo(line)
    return VERDICT_EXIT_CODES[summary["certificate"]["verdict"]] if options["certify"] else 0


@cli.command(
    short_help="Write the report of a run again.", epilog=_epilog("raypipe report runs/first")
)
@click.argument("uri", metavar="RUN")
def report(uri: str) -> None:
    """Write the report of RUN again, and print where it is."""
    from raypipe.report import build
    from raypipe.runs.lease import Lease
    from raypipe.runs.run import Run
    from raypipe.runs.untrusted import damage_as_error, refuse_links_out

    run = Run(uri)
    run.record("extrapolate")  # raises if the scores are not complete
    refuse_links_out(run, "report")
    with damage_as_error(uri), Lease(run):
        click.echo(build(run))


@cli.command(
    short_help="Show what takes room in a run, and remove what can go.",
    epilog=_epilog("raypipe clean runs/first", 0, 1),
)
@click.argument("uri", metavar="RUN")
@click.option("--yes", is_flag=True, help="Remove what can go. Without it, nothing is removed.")
def clean(uri: str, yes: bool) -> None:
    """Show how much each folder of RUN takes, and what no score of it needs any more.

    A run removes the same when it is done, unless proxy.keep_intermediate is set.
    """
    from raypipe.runs.clean import clean_run
    from raypipe.runs.run import Run
    from raypipe.runs.untrusted import printable, refuse_links_out

    run = Run(uri)
    refuse_links_out(run, "proxy")
    for line in clean_run(run, yes):
        click.echo(printable(line))


@cli.command(
    short_help="Compare the scores and keep-lists of two runs.",
    epilog=_epilog("raypipe compare runs/first runs/second", 0, 1),
)
@click.argument("first", metavar="RUN")
@click.argument("second", metavar="RUN")
def compare(first: str, second: str) -> None:
    """Show how far two runs agree on the samples that both have, and which settings differ.

    Their ids must be the same, as they are for two runs over one source.
    """
    from raypipe.keeplists.compare import compare_runs, describe_comparison
    from raypipe.runs.run import Run
    from raypipe.runs.untrusted import damage_as_error, printable

    with damage_as_error(first), damage_as_error(second):
        for line in describe_comparison(compare_runs(Run(first), Run(second))):
            click.echo(printable(line))


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


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. Errors that the user can fix become one line and an exit code."""
    try:
        code = cli.main(arguments, prog_name="raypipe", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except RaypipeError as error:
        from raypipe.runs.untrusted import printable

        click.echo(printable(f"raypipe: {error}"), err=True)
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("raypipe: stopped; run the same command again to resume", err=True)
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
