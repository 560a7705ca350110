"""Code from outside raypipe: what `module:name` or an entry point names, imported where allowed.

A configuration can name code of its author: a network, a transform, a score. `run`, `evaluate` and
nightly runs execute it. Commands that open run folders of unknown origin (`status`, `select`,
`report`, `export`, `inspect`) read the same configurations, and must not import anything that they
name. So nothing is imported outside a `code_allowed` block. Ray workers have the permission of the
driver that sent them work (`raypipe.storage.fences.fenced`).
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import os
import re
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module, invalidate_caches
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from raypipe.errors import ConfigError, RaypipeError, StageError
from raypipe.text import error_line

REFERENCE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
"""The form of `module:name`; both can have dots."""

_allowed = False


@dataclass(frozen=True)
class PartKind:
    """A kind of part that packages can add.

    Attributes
    ----------
    noun : str
        What one is called in messages.
    setting : str
        The setting that names parts of this kind.
    group : str
        The entry points that declare them.
    """

    noun: str
    setting: str
    group: str

    @property
    def options(self) -> str:
        """The setting that holds the options of each part, by its name."""
        return f"{self.setting.partition('.')[0]}.options"


SCORE = PartKind("score", "measure.scores", "raypipe.scores")
EXTRAPOLATOR = PartKind("extrapolator", "extrapolate.method", "raypipe.extrapolators")
STRATEGY = PartKind("strategy", "select.strategy", "raypipe.strategies")
SOURCE = PartKind("source", "source.format", "raypipe.sources")


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


_all_entry_points = functools.cache(entry_points)
"""Those of every group: it takes as long to look for one group as for all."""


@functools.cache
def declared(kind: PartKind) -> dict[str, tuple[EntryPoint, ...]]:
    """Return the entry points of installed packages for a kind of part, by name.

    Nothing is imported. A name that two packages declare has two.
    """
    result: dict[str, tuple[EntryPoint, ...]] = {}
    points = _all_entry_points().select(group=kind.group)
    for point in sorted(points, key=lambda point: (point.name, point.value)):
        result[point.name] = (*result.get(point.name, ()), point)
    return result


def package_of(kind: PartKind, name: str) -> str:
    """Return name and version of the package that declares a part; "" for `module:Class`."""
    points = declared(kind).get(name, ())
    dist = points[0].dist if points else None
    return f"{dist.name} {dist.version}" if dist is not None else ""


def find(kind: PartKind, name: str, base: type, setting: str = "") -> Any:
    """Return the class of a part from outside raypipe.

    Parameters
    ----------
    kind : PartKind
    name : str
        `module:Class`, or the name of an entry point.
    base : type
        The class that it must be derived from.
    setting : str
        The setting that names it, for messages. Default: that of the kind.

    Raises
    ------
    ConfigError
        If importing is not allowed here, the class cannot be imported, or is not such a part.
    """
    setting, reference = setting or kind.setting, name
    if not is_reference(name):
        points = declared(kind).get(name, ())
        if len(points) != 1:
            raise ConfigError(
                f"{setting}: {_who_declares(kind, name, points)} (on {socket.gethostname()})"
            )
        reference = points[0].value
    refuse_unless_allowed(name, setting)
    try:
        value = load(reference, setting)
    except ConfigError as error:
        package = package_of(kind, name)
        if not package:
            raise
        raise ConfigError(f"{error} (entry point {name!r} of {package})") from error
    home = f"{base.__module__}.{base.__name__}"
    if not isinstance(value, type) or not issubclass(value, base):
        raise ConfigError(
            f"{setting}: {name!r} is no {kind.noun}: expected a class derived from {home}"
        )
    if not isinstance(getattr(value, "summary", None), str):
        raise ConfigError(f"{setting}: {name!r} has no summary; give the class a text `summary`")
    abstract = getattr(value, "__abstractmethods__", ())
    if abstract:
        missing = ", ".join(sorted(abstract))
        raise ConfigError(f"{setting}: {name!r} lacks {missing}, which {home} requires")
    return value


def _who_declares(kind: PartKind, name: str, points: tuple[EntryPoint, ...]) -> str:
    """Return why a name is not that of one entry point, and what to do."""
    if not points:
        return (
            f"no installed package declares the {kind.noun} {name!r} (entry point {kind.group}); "
            "install the package that has it on every node"
        )
    packages = " and ".join(str(point.dist and point.dist.name) for point in points)
    return (
        f"{packages} both declare the {kind.noun} {name!r}; uninstall one, or name the class: "
        f"{points[0].value}"
    )


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
            f"({failure(error)}); {_remedy(error, reference)}"
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


def _remedy(error: BaseException, reference: str) -> str:
    """Return what to do about `module:name` whose module cannot be imported."""
    missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
    module, _, name = reference.partition(":")
    if missing is None:
        return "fix the module"
    if module.endswith(".py") and missing in (module, module.removesuffix(".py")):
        return f"name the module without .py: {module.removesuffix('.py')}:{name}"
    if missing == module or module.startswith(f"{missing}."):
        return (
            "start raypipe in the folder that has it, install its package on every node, or submit "
            "it with `ray job submit --working-dir`"
        )
    return f"install {missing} on every node"


@contextlib.contextmanager
def named_failures(kind: PartKind, name: str) -> Iterator[None]:
    """Turn errors of a part from outside into a StageError of one line that names it."""
    try:
        yield
    except RaypipeError:
        raise
    except Exception as error:
        raise StageError(f"{kind.setting}: {name} failed ({failure(error)})") from error


def failure(error: BaseException) -> str:
    """Return what went wrong in code from outside, and where, in one line."""
    frame, line = error.__traceback__, ""
    others = (os.path.dirname(__file__), os.path.dirname(os.__file__), "<")  # "<": no file
    while frame is not None:
        file = frame.tb_frame.f_code.co_filename
        if not file.startswith(others) and f"{os.sep}site-packages{os.sep}" not in file:
            line = f", {os.path.basename(file)} line {frame.tb_lineno}"
        frame = frame.tb_next
    return f"{error_line(error)}{line}"
