"""Commands that cut, export, test and compare keep-lists."""

from __future__ import annotations

from typing import Any

import click

from raypipe.cli.shared import allow_code_option, epilog, verbose_option


class _StrategyOption(click.Option):
    """An option whose help names all strategies. The settings are imported once it is shown."""

    @property
    def help(self) -> str | None:
        from raypipe.config.choices import STRATEGY_NAMES

        return (
            f"{', '.join(STRATEGY_NAMES)}, auto, or one of your own (module:Class). Default: the "
            "run's own."
        )

    @help.setter
    def help(self, value: str | None) -> None:
        pass


@click.command(
    short_help="Cut keep-lists of a run, without scoring again.",
    epilog=epilog("raypipe select runs/first --keep 0.5", 0, 1, 2, 3),
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
@allow_code_option
def select(
    uri: str,
    keep: tuple[float, ...],
    strategy: str | None,
    force: bool,
    allow_code: bool,
    **options: Any,
) -> None:
    """Cut keep-lists from the scores of RUN, without scoring anything again.

    Options that are not given are taken from the run's configuration.
    """
    from raypipe.api import select as cut

    changes = {name: value for name, value in options.items() if value is not None}
    counts = cut(uri, list(keep) or None, strategy, force=force, allow_code=allow_code, **changes)
    for file, count in counts.items():
        click.echo(f"{file}  {count:,} samples")


@click.command(
    short_help="Write the samples of a keep-list for training.",
    epilog=epilog("raypipe export runs/first --keep 0.5 --format webdataset --to shards"),
)
@click.argument("uri", metavar="RUN")
@click.option("--keep", type=float, help="Fraction of the keep-list. Default: the only list.")
@click.option(
    "--format",
    required=True,
    metavar="FORMAT",
    help="webdataset, parquet, huggingface, croissant, mds, lance, indices (.npy, .json) or list "
    "(.csv, .txt); of all samples: fiftyone, cleanlab (.csv, .parquet) or label-studio (.csv); of "
    "the list itself: openlineage (.json).",
)
@click.option(
    "--to",
    required=True,
    metavar="URI",
    help="Folder to write, or file for formats that are a single one.",
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
    "--push-to",
    metavar="NAME",
    help="huggingface: dataset on the Hub (user/name) to push the export to as well.",
)
@click.option(
    "--image-root",
    metavar="URI",
    help="fiftyone, label-studio: what the paths of images start with. Default: the source's "
    "folder.",
)
@click.option(
    "--allow-missing", is_flag=True, help="Exit with 0 even if samples can no longer be read."
)
@click.option(
    "--force",
    is_flag=True,
    help="Replace another export in the same place, or write next to other files.",
)
@allow_code_option
@verbose_option
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


@click.command(
    short_help="Test whether the keep-lists of a run help.",
    epilog=epilog("raypipe evaluate runs/first --test /data/test --keep 0.5", 0, 1, 2, 5, 6),
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
@verbose_option
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


@click.command(
    short_help="Compare the scores and keep-lists of two runs.",
    epilog=epilog("raypipe compare runs/first runs/second", 0, 1),
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
