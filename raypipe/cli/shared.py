"""What the commands share: options, the end of their help, and exit codes."""

from __future__ import annotations

import click

from raypipe.errors import EXIT_CODES

verbose_option = click.option(
    "-v", "--verbose", is_flag=True, help="Show every finished fragment, and the output of Ray."
)
allow_code_option = click.option(
    "--allow-code",
    is_flag=True,
    help="Import the code that the configuration names: module:name, or parts of other packages. "
    "Only for runs that you trust.",
)
set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="SECTION.FIELD=VALUE",
    help="Override a setting (`raypipe init` lists them); may be repeated.",
)


def epilog(example: str, *codes: int) -> str:
    r"""Return the end of a command's help: one example, and the exit codes.

    "\b" keeps click from joining the lines of a paragraph.
    """
    lines = [f"  {code}  {EXIT_CODES[code]}" for code in codes or (0, 1, 2)]
    return "\n".join(["\b", "Example:", f"  {example}", "", "\b", "Exit codes:", *lines])
