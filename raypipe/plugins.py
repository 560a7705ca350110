"""Code from outside raypipe: import what `module:name` names, but only where that is allowed.

A configuration can name code of its author: a network, a transform, a score. `run`, `evaluate` and
nightly runs execute it. Commands that open run folders of unknown origin (`status`, `select`,
`report`, `export`, `inspect`) read the same configurations, and must not import anything that they
name. So nothing is imported outside a `code_allowed` block. Ray workers have the permission of the
driver that sent them work (`raypipe.storage.fences.fenced`).
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import socket
import sys
from collections.abc import Iterator
from importlib import import_module, invalidate_caches
from typing import Any

from raypipe.errors import ConfigError

REFERENCE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
"""The form of `module:name`; both can have dots."""

_allowed = False


def is_reference(name: str) -> bool:
    """Return whether a setting has the form `module:name`."""
    return REFERENCE.fullmatch(name) is not None


@contextlib.contextmanager
def code_allowed(allowed: bool = True) -> Iterator[None]:
    """Allow `load` to import code in this process during the `with` block.

    With `allowed` false, the permission of the process stays as it is.
    """
    before = _allowed
    allow_code(before or allowed)
    try:
        yield
    finally:
        allow_code(before)


def allows_code() -> bool:
    """Return whether `load` can import code in this process."""
    return _allowed


def allow_code(allowed: bool) -> None:
    """Allow or forbid `load` to import code in this process, until the next call."""
    global _allowed
    _allowed = allowed


def load(reference: str, setting: str) -> Any:
    """Import what `module:name` names.

    Modules are found as Python finds them, and also in the current folder. (Ray workers search the
    folder in which the driver started, and the working directory of `ray job submit`.)

    Parameters
    ----------
    reference : str
        `package.module:name`.
    setting : str
        The setting that names it, for messages, such as "proxy.model".

    Raises
    ------
    ConfigError
        If importing is not allowed here, the module cannot be imported, or it lacks the name.
    """
    if not is_reference(reference):
        raise ConfigError(
            f"{setting}: {reference!r} is not allowed: expected module:name, such as my_module:f"
        )
    refuse_unless_allowed(reference, setting)
    module_name, _, path = reference.partition(":")
    _search_current_folder()
    invalidate_caches()  # the file can be newer than the last look into its folder
    try:
        module = import_module(module_name)
    except (Exception, SystemExit) as error:  # a module runs any code of its author
        raise ConfigError(
            f"{setting}: cannot import {module_name} on {socket.gethostname()} "
            f"({_one_line(error)}); {_remedy(error, module_name)}"
        ) from error
    value: Any = module
    for name in path.split("."):
        if not hasattr(value, name):
            near = difflib.get_close_matches(name, dir(value), n=1)
            suggestion = f"; did you mean {near[0]!r}?" if near else "; check the name"
            where = getattr(module, "__file__", None) or module_name
            raise ConfigError(f"{setting}: {reference!r}: {where} has no {name!r}{suggestion}")
        value = getattr(value, name)
    return value


def refuse_unless_allowed(name: str, setting: str) -> None:
    """Raise ConfigError if code that a setting names must not be imported in this process."""
    if not _allowed:
        raise ConfigError(
            f"{setting}: {name!r} is code from outside raypipe, which is not imported because a "
            "run folder can come from anybody; if you trust it, add --allow-code "
            "(in Python: allow_code=True)"
        )


def _search_current_folder() -> None:
    """Let Python find modules in the current folder, after all others."""
    folder = os.getcwd()
    if not {"", folder} & set(sys.path):
        sys.path.append(folder)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _remedy(error: BaseException, module: str) -> str:
    """Return what to do about a module that cannot be imported."""
    missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
    if missing is None:
        return "fix the module"
    if missing == module or module.startswith(f"{missing}."):
        return (
            "start raypipe in the folder that has it, install its package on every node, or submit "
            "it with `ray job submit --working-dir`"
        )
    return f"install {missing} on every node"
