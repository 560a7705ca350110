"""The command line: one module for each group of commands."""

from __future__ import annotations

import sys

import click

from raypipe._version import __version__
from raypipe.cli.estimates import inspect, plan
from raypipe.cli.keep_lists import compare, evaluate, export, select
from raypipe.cli.run_folder import clean, report, status, view
from raypipe.cli.running import demo, init, run, scores
from raypipe.cli.shared import epilog
from raypipe.cli.tables import attach, extrapolate
from raypipe.errors import EXIT_CODES, RaypipeError


@click.group(
    commands=[
        run,
        demo,
        init,
        scores,
        inspect,
        plan,
        select,
        export,
        evaluate,
        compare,
        status,
        report,
        view,
        clean,
        extrapolate,
        attach,
    ],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=epilog("raypipe demo", *EXIT_CODES),
)
@click.version_option(__version__, prog_name="raypipe")
def cli() -> None:
    """Find the samples of a large labelled image dataset that are worth training on.

    raypipe measures scores on a small random seed set, extrapolates them to every other sample,
    and writes scores and keep-lists. Any command can be interrupted and rerun to resume.
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. Errors that the user can fix become one line and an exit code."""
    if arguments is None and sys.argv[1:2] in (["select"], ["report"]):
        from raypipe.cli.without_pandas import pyarrow_without_pandas

        pyarrow_without_pandas()
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
