"""Identify code that a configuration names by a short hash that changes when its result can."""

from __future__ import annotations

import hashlib
from importlib.metadata import packages_distributions, version
from typing import Any, NamedTuple

from raypipe.config.choices import is_own
from raypipe.distributed.function_identity import Describer, installed
from raypipe.plugins import load


class CodeIdentity(NamedTuple):
    """Identity of a function, a class or an object.

    Attributes
    ----------
    hash : str
        Covers its code and what the code can reach; see `raypipe.distributed.function_identity`. Of
        code in an installed package, it covers the name and the version of the package.
    unseen : tuple of str
        What the code uses whose changes do not show in the hash.
    """

    hash: str
    unseen: tuple[str, ...]


def code_identity(value: Any) -> CodeIdentity:
    """Return the identity of a function, a class or an object of one."""
    describer = Describer()
    kind = value if isinstance(value, type) or hasattr(value, "__code__") else type(value)
    text = f"{describer.describe(value)} {_release(getattr(kind, '__module__', None))}"
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    return CodeIdentity(digest, tuple(sorted(describer.unseen)))


def network_code(model: str) -> dict[str, str]:
    """Return the hash of a network's code by the name "code"; nothing unless it is the user's own.

    Raises ConfigError if the code cannot be imported.
    """
    return {"code": code_identity(load(model, "proxy.model")).hash} if is_own(model) else {}


def augment_code(augment: str | None) -> str:
    """Return the hash of the code of `proxy.augment`; "" without one.

    Raises ConfigError if the code cannot be imported.
    """
    return code_identity(load(augment, "proxy.augment")).hash if augment is not None else ""


def _release(module: str | None) -> str:
    """Return name and version of the installed packages that have a module; "" for other code."""
    if not installed(module) or module is None:
        return ""
    packages = sorted(set(packages_distributions().get(module.partition(".")[0], [])))
    return " ".join(f"{name} {version(name)}" for name in packages)
