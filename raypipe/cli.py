"""The command line. Exit codes: 0 done, 1 failed, 2 bad usage or configuration, 3 scores too unfaithful to prune by."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from raypipe._version import __version__
from raypipe.errors import RaypipeError, TrustError

DEMO: dict[str, Any] = {
    "source": {"uri": "digits://", "format": "digits", "fragment_samples": 256},
    "seed": {"fraction": 0.3},
    "proxy": {
        "model": "small",
        "image_size": 16,
        "epochs": 20,
        "batch_size": 64,
        "flip": False,
        "crop_padding": 1,
    },
    "extrapolate": {"epochs": 12, "folds": 1, "judge_published": False},
}
"""The demo's settings: the handwritten digits that ship inside scikit-learn."""


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="raypipe")
def cli() -> None:
    """Which samples of a large labelled image dataset are worth training on?

    Scores a small random seed set by measurement, extrapolates to every other sample, and writes score shards and keep-lists.
    """


class _StrategyOption(click.Option):
    """An option whose help names all strategies. The settings are imported once it is shown."""

    @property
    def help(self) -> str | None:
        from raypipe.config.choices import STRATEGY_NAMES

        return f"{', '.join(STRATEGY_NAMES[:-1])} or {STRATEGY_NAMES[-1]}. Default: the run's own."

    @help.setter
    def help(self, value: str | None) -> None:
        pass


_verbose = click.option(
    "-v", "--verbose", is_flag=True, help="Show every fragment that is done, and what Ray says."
)
_set = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="SECTION.FIELD=VALUE",
    help="Change a setting; may be repeated.",
)


_noise = click.option(
    "--inject-noise",
    type=float,
    metavar="SHARE",
    help="Rehearsal: replace the labels of this share of the samples by wrong ones.",
)


@cli.command()
@click.argument("config")
@_set
@_noise
@click.option("--until", metavar="STAGE", help="Stop after this stage.")
@_verbose
def run(
    config: str,
    overrides: tuple[str, ...],
    inject_noise: float | None,
    until: str | None,
    verbose: bool,
) -> None:
    """Do the whole job that CONFIG (YAML, a path or URI) describes, or resume it."""
    from raypipe.config import load_config

    _execute(load_config(config, _with_noise(overrides, inject_noise)), until, verbose)


@cli.command()
@click.option(
    "--run", "uri", default="runs/demo", show_default=True, help="Where everything is written."
)
@_set
@_noise
@_verbose
def demo(uri: str, overrides: tuple[str, ...], inject_noise: float | None, verbose: bool) -> None:
    """Do the whole job on 1,797 real images of handwritten digits; needs no download."""
    from raypipe.config import absolute_paths, apply_overrides, parse_config

    changes = _with_noise(overrides, inject_noise)
    _execute(
        absolute_paths(parse_config(apply_overrides({"run": uri, **DEMO}, changes))), None, verbose
    )


@cli.command()
def init() -> None:
    """Print a configuration with a comment on every setting."""
    from raypipe.config import commented_config

    click.echo(commented_config(), nl=False)


@cli.command()
def scores() -> None:
    """List the measured scores: what each is, what it needs, what it costs."""
    from raypipe.scores.registry import SCORES

    for info in SCORES.values():
        click.echo(f"{info.name:<20} {info.summary}")
        click.echo(f"{'':<20} needs {info.needs}; costs {info.cost}; {info.source}")


@cli.command()
@click.argument("source", required=False)
@click.option(
    "--config",
    metavar="CONFIG",
    help="Use the settings of this YAML file; its source, where SOURCE is not given.",
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="FIELD=VALUE",
    help="A setting of the section `source`, such as include='*.tar', or SECTION.FIELD=VALUE; may be repeated.",
)
@click.option(
    "--samples",
    default=256,
    show_default=True,
    help="How many samples to draw from all over the source.",
)
@click.option("--seed", default=0, show_default=True, help="Another number draws others.")
@click.option(
    "--grid", metavar="PNG", help="Write a sheet of 64 of the drawn images with class and id."
)
@click.option(
    "--like",
    metavar="RUN",
    help="Scale the ledger of this run of the past instead of using stored constants.",
)
@click.option("--cpus", type=float, help="Estimate for so many CPUs. Default: this machine's.")
@click.option("--gpus", type=float, help="Estimate for so many GPUs. Default: this machine's.")
@click.option("--address", help="Ask this Ray cluster for its CPUs and GPUs (auto: RAY_ADDRESS).")
@click.option("--json", "as_json", is_flag=True, help="Print everything found as JSON.")
def inspect(source: str | None, as_json: bool, **options: Any) -> None:
    """Look at SOURCE (a path or URI) before anything is run: what is in it, and about what a run would cost.

    Balance of the classes, sizes of the images, what would be rejected, from samples spread over all of it. Takes seconds.
    """
    from raypipe.api import inspect as look
    from raypipe.estimate.inspect_text import describe_survey

    found = look(source, **options)
    if as_json:
        click.echo(json.dumps(found.as_dict(), indent=2, ensure_ascii=False))
        return
    encoding = (getattr(sys.stdout, "encoding", None) or "ascii").lower()
    for line in describe_survey(found, "█" if encoding.startswith("utf") else "#"):
        click.echo(line)
    if options["grid"]:
        click.echo(f"grid        {options['grid']}")


@cli.command()
@click.argument("config")
@click.option(
    "--samples", type=int, required=True, help="Images in the source, which need not be there yet."
)
@click.option("--gpus", type=float, default=0, show_default=True, help="GPUs of the cluster.")
@click.option(
    "--cpus", type=float, help="CPUs of the cluster. Default: 8 for each GPU, 16 without."
)
@click.option(
    "--image-bytes",
    type=float,
    default=110_000,
    show_default=True,
    help="Mean size of an encoded image.",
)
@click.option(
    "--images-per-file", type=int, help="Default: 1 of folders and lists of images, else 1000."
)
@click.option("--classes", type=int, default=1000, show_default=True)
@click.option(
    "--rates",
    metavar="FILE",
    help="JSON with rates of your machines; see raypipe.estimate.plan.Rates.",
)
@click.option("--decode-rate", type=float, help="Images that a CPU decodes in a second.")
@click.option(
    "--forward-rate", type=float, help="Images that go through the proxy on one GPU in a second."
)
@click.option(
    "--run",
    "like",
    metavar="RUN",
    help="Take what its stages took from the ledger of this finished run.",
)
@click.option("--gpu-price", type=float, help="Dollars for an hour of a GPU.")
@click.option("--cpu-price", type=float, help="Dollars for an hour of a CPU.")
@click.option("--request-price", type=float, help="Dollars for a million requests to storage.")
@click.option("--storage-price", type=float, help="Dollars for a GB stored for a month.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
@_set
def plan(config: str, overrides: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Plan a run of CONFIG over a source of any size: hours, dollars, requests, files, bytes, and what breaks first.

    Nothing is read but CONFIG. For a source that is there, `raypipe inspect` looks into it.
    """
    from raypipe.config import load_config
    from raypipe.estimate.plan import plan_of_options
    from raypipe.estimate.plan_text import describe_plan

    found = plan_of_options(load_config(config, overrides), **options)
    if as_json:
        click.echo(json.dumps(found.as_dict(), indent=2, ensure_ascii=False))
        return
    for line in describe_plan(found):
        click.echo(line)


@cli.command()
@click.argument("uri", metavar="RUN")
def status(uri: str) -> None:
    """Show how far a run is, from any machine that can read it."""
    from raypipe.runs.status import describe_run
    from raypipe.runs.untrusted import damage_as_error, printable

    with damage_as_error(uri):
        for line in describe_run(uri):
            click.echo(printable(line))


@cli.command()
@click.option(
    "--embeddings",
    required=True,
    metavar="URI",
    help="Parquet, a file or folder: sample_id, embedding, optionally label.",
)
@click.option(
    "--scores", required=True, metavar="URI", help="Parquet, a file or folder: sample_id, score."
)
@click.option(
    "--out",
    required=True,
    metavar="URI",
    help="Folder for the scores; new, or of the same command before.",
)
@click.option(
    "--score-column", default="score", show_default=True, help="Column of --scores to extrapolate."
)
@click.option("--method", help="gnn, knn, mlp, trees or knn-published. Default: gnn.")
@click.option(
    "--confidence",
    type=float,
    help="Share of samples whose score lies between lower and upper. Default: 0.9.",
)
@click.option(
    "--holdout",
    type=float,
    help="Share of the scored samples kept out to judge fidelity. Default: 0.2.",
)
@click.option("--seed", type=int, help="Hold-out split and initial weights. Default: 0.")
@_verbose
def extrapolate(embeddings: str, scores: str, out: str, verbose: bool, **options: Any) -> None:
    """Extrapolate any score over any embeddings: no images, no proxy, no training of one."""
    from raypipe.api import extrapolate as predict
    from raypipe.runs.status import describe_extrapolation

    done = predict(embeddings, scores, out, verbose=verbose, **options)
    for line in describe_extrapolation(done.uri, done.summary):
        click.echo(line)


@cli.command()
@click.argument("uri", metavar="RUN")
@click.option(
    "--keep",
    type=float,
    multiple=True,
    help="Fraction to keep; may be repeated. Default: the run's own.",
)
@click.option("--strategy", cls=_StrategyOption)
@click.option("--seed", type=int, help="random, ccs, beta: another number draws other samples.")
@click.option("--easy-fraction", type=float, help="mixed: share of the list from the easy end.")
@click.option("--difficulty", help="mixed, ccs: auto, score or loss.")
@click.option(
    "--hard-cutoff",
    metavar="SHARE",
    help="ccs: share of the samples, the hardest, that is left out first; or auto.",
)
@click.option("--strata", type=int, help="ccs: intervals of the score.")
@click.option(
    "--beta-exponent", type=float, help="beta: the higher, the later easy samples are preferred."
)
@click.option(
    "--by-class/--over-classes",
    default=None,
    help="Within each class, the same share of every class; or over all.",
)
@click.option("--min-per-class", type=int, help="Samples each class keeps at least.")
@click.option(
    "--always-keep",
    metavar="URI",
    help="Ids in every list: text, one a line, or Parquet with sample_id.",
)
@click.option("--never-keep", metavar="URI", help="Ids in no list.")
@click.option(
    "--near-duplicates",
    type=float,
    help="Of embeddings with this cosine similarity only the highest score is kept.",
)
@click.option(
    "--weights",
    help="none, inclusion (inverse probability of being drawn) or class (frequencies of the source).",
)
@click.option("--force", is_flag=True, help="Even where the fidelity is below trust.min_spearman.")
def select(
    uri: str, keep: tuple[float, ...], strategy: str | None, force: bool, **options: Any
) -> None:
    """Cut keep-lists from the scores of RUN; nothing is scored again. Options not given are as in the run's configuration."""
    from raypipe.api import select as cut

    given = {name: value for name, value in options.items() if value is not None}
    for file, count in cut(uri, list(keep) or None, strategy, force=force, **given).items():
        click.echo(f"{file}  {count:,} samples")


@cli.command()
@click.argument("uri", metavar="RUN")
@click.option(
    "--keep", type=float, help="Fraction of the keep-list. Default: the only one there is."
)
@click.option(
    "--format",
    required=True,
    metavar="FORMAT",
    help="webdataset, parquet, indices (.npy, .json) or list (.csv, .txt).",
)
@click.option(
    "--to", required=True, metavar="URI", help="Folder for shards; file for indices and list."
)
@click.option(
    "--shard-samples", type=click.IntRange(1), help="Samples in a shard. Default: by --shard-mb."
)
@click.option(
    "--shard-mb", type=click.IntRange(1), help="Size of a shard in MiB, about. Default: 512."
)
@click.option(
    "--snapshot", metavar="NAME", help="The keep-list as it was in this snapshot of a nightly run."
)
@click.option(
    "--allow-missing", is_flag=True, help="Exit 0 although samples cannot be read any more."
)
@click.option("--force", is_flag=True, help="Replace another export that is there.")
@_verbose
def export(
    uri: str, keep: float | None, format: str, to: str, shard_mb: int | None, **options: Any
) -> None:
    """Write the samples of a keep-list of RUN for a training tool, or resume it."""
    from raypipe.api import export as write

    done = write(
        uri, keep, format, to, shard_bytes=None if shard_mb is None else shard_mb << 20, **options
    )
    less = f", {done['missing']:,} missing" if done["missing"] else ""
    files = f"{done['shards']:,} file{'s' * (done['shards'] != 1)}"
    click.echo(
        f"{done['to']}  {done['samples']:,} samples in {files}, {done['bytes']:,} bytes{less}"
    )


@cli.command()
@click.argument("uri", metavar="RUN")
@click.option(
    "--test",
    required=True,
    metavar="SOURCE",
    help="The test set: a path or URI, read as the run's source is.",
)
@click.option(
    "--test-set",
    multiple=True,
    metavar="FIELD=VALUE",
    help="A setting of the section `source` for the test set; may be repeated.",
)
@click.option(
    "--keep",
    metavar="FRACTIONS",
    help="Fractions to keep, with commas. Default: 0.1,0.3,0.5,0.7,0.9.",
)
@click.option(
    "--strategies",
    metavar="NAMES",
    help="Strategies that cut lists, with commas. Default: the run's own.",
)
@click.option(
    "--scores",
    metavar="NAMES",
    help="run, measured:NAME, with commas. Default: all that every sample has.",
)
@click.option(
    "--beside",
    multiple=True,
    metavar="RUN",
    help="Another run over the same source, for lists of its scores; may be repeated.",
)
@click.option("--seeds", type=int, help="Trainings of each list and fraction. Default: 3.")
@click.option(
    "--protocol",
    help="epochs, or steps: the same number of steps for all lists, that of the full set. Default: epochs.",
)
@click.option(
    "--attack",
    is_flag=True,
    help="Train adversarially, and test on adversarial examples as well (PGD; proxy.adversary).",
)
@click.option("--model", help="What is trained. Default: the run's proxy.model.")
@click.option("--image-size", type=int, help="Pixels. Default: the run's proxy.image_size.")
@click.option("--epochs", type=int, help="Default: the run's proxy.epochs.")
@click.option("--batch-size", type=int, help="Default: the run's proxy.batch_size.")
@click.option("--lr", type=float, help="Peak learning rate. Default: the run's proxy.lr.")
@click.option("--use-gpu", help="true, false or auto.")
@click.option(
    "--cpus-per-training",
    type=int,
    help="Default: 1 on a CPU where there are more trainings than CPUs.",
)
@_verbose
def evaluate(uri: str, test: str, test_set: tuple[str, ...], verbose: bool, **options: Any) -> None:
    """Does it help? Train on keep-lists of RUN, on random lists of the same size and on everything, and compare on a test set."""
    import yaml

    from raypipe.api import evaluate as compare
    from raypipe.evaluation.summary import describe_evaluation

    given = {name: value for name, value in options.items() if value not in (None, ())}
    for name in ("keep", "strategies", "scores"):
        if name in given:
            given[name] = [yaml.safe_load(part) for part in given[name].split(",")]
    if "use_gpu" in given:
        given["use_gpu"] = yaml.safe_load(given["use_gpu"])
    for line in describe_evaluation(
        compare(uri, test, test_settings=test_set, verbose=verbose, **given)
    ):
        click.echo(line)


@cli.command()
@click.argument("uri", metavar="RUN")
def report(uri: str) -> None:
    """Write the report of RUN again."""
    from raypipe.report import build
    from raypipe.runs.lease import Lease
    from raypipe.runs.run import Run
    from raypipe.runs.untrusted import damage_as_error, refuse_links_out

    found = Run(uri)
    found.record("extrapolate")
    refuse_links_out(found, "report")
    with damage_as_error(uri), Lease(found):
        click.echo(build(found))


def _with_noise(overrides: tuple[str, ...], share: float | None) -> tuple[str, ...]:
    return overrides if share is None else (*overrides, f"source.inject_noise={share}")


def _execute(config: Any, until: str | None, verbose: bool) -> None:
    from raypipe.pipeline import execute
    from raypipe.progress import Progress
    from raypipe.runs.run import Run
    from raypipe.runs.status import describe_result

    try:
        execute(config, until=until, progress=Progress(verbose=verbose), verbose=verbose)
    except TrustError:
        for line in describe_result(Run(config.run)):
            click.echo(line)
        raise
    for line in describe_result(Run(config.run)):
        click.echo(line)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: errors a user can act on become one line and an exit code."""
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
