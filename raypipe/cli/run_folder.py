"""Commands about the folder of a run: its status, report and samples, and what takes room."""

from __future__ import annotations

import click

from raypipe.cli.shared import allow_code_option, epilog


@click.command(
    short_help="Show progress, errors and cost of a run.",
    epilog=epilog("raypipe status runs/first"),
)
@click.argument("uri", metavar="RUN")
def status(uri: str) -> None:
    """Show the progress, errors and cost of RUN, from any machine that can read it."""
    from raypipe.runs.status import describe_run
    from raypipe.runs.untrusted import damage_as_error, printable

    with damage_as_error(uri):
        for line in describe_run(uri):
            click.echo(printable(line))


@click.command(
    short_help="Write the report of a run again.", epilog=epilog("raypipe report runs/first")
)
@click.argument("uri", metavar="RUN")
@allow_code_option
def report(uri: str, allow_code: bool) -> None:
    """Write the report of RUN again, and print where it is."""
    from raypipe.plugins import code_allowed
    from raypipe.report import build
    from raypipe.runs.lease import Lease
    from raypipe.runs.run import Run
    from raypipe.runs.untrusted import damage_as_error, refuse_links_out

    run = Run(uri)
    run.record("extrapolate")  # raises if the scores are not complete
    refuse_links_out(run, "report")
    with code_allowed(allow_code), damage_as_error(uri), Lease(run):
        click.echo(build(run))


@click.command(
    short_help="Search the samples of a run on a local page.",
    epilog=epilog("raypipe view runs/first --never-keep never.txt"),
)
@click.argument("uri", metavar="RUN")
@click.option(
    "--always-keep",
    metavar="FILE",
    help="Write the samples that you mark so to FILE, for `raypipe select --always-keep`. Text "
    "with one id per line, or .parquet. Ids that FILE already holds stay.",
)
@click.option("--never-keep", metavar="FILE", help="The same for `raypipe select --never-keep`.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port. Default: a free one.")
@allow_code_option
def view(
    uri: str, always_keep: str | None, never_keep: str | None, port: int, allow_code: bool
) -> None:
    """Serve a page on this machine that searches the samples of RUN.

    It filters by class, score, keep-list and labels to check, and shows similar samples. Only this
    machine can open it, with the token in the address. Nothing in RUN is written. Press Ctrl-C to
    end it.
    """
    from raypipe.errors import RunError
    from raypipe.plugins import code_allowed
    from raypipe.runs.run import Run
    from raypipe.runs.untrusted import damage_as_error
    from raypipe.view.answers import Answers
    from raypipe.view.server import ViewServer

    with code_allowed(allow_code):
        with damage_as_error(uri):
            answers = Answers(Run(uri), always_keep, never_keep)
        try:
            server = ViewServer(answers, port)
        except OSError as error:
            raise RunError(f"port {port}: {error.strerror}; choose another --port") from None
        with server:
            click.echo(f"{server.address}\nCtrl-C ends it")
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                click.echo()


@click.command(
    short_help="Show what takes room in a run, and remove what can go.",
    epilog=epilog("raypipe clean runs/first", 0, 1),
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
