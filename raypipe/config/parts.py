"""Settings that name a part: one of raypipe's own, or one from outside, with options of its own.

A part from outside is `module:Class`, or a name that an installed package declares as an entry
point. Nothing is imported to validate a configuration: the names are checked here, the options by
`validated_options` once the class is known.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Protocol, get_args

from pydantic import AfterValidator, ValidationError
from pydantic_core import PydanticKnownError, core_schema

from raypipe.config.base import Settings
from raypipe.config.problems import problem_lines
from raypipe.errors import ConfigError
from raypipe.plugins import PartKind, declared, is_reference

PartOptions = dict[str, dict[str, Any]]
"""Options of parts from outside, by the name of the part."""

_accepted: ContextVar[Container[str]] = ContextVar("accepted", default=())


def _reference(value: str) -> str:
    if not is_reference(value):
        raise ValueError("expected module:name, such as my_module:function")
    return value


Reference = Annotated[str, AfterValidator(_reference)]
"""A function of the user's own, `module:name`."""


class NoOptions(Settings):
    """Options of a part that has none."""


class Configurable(Protocol):
    """A part with options."""

    Options: ClassVar[type[Settings]]


class _EveryName:
    """Contains every name."""

    def __contains__(self, name: object) -> bool:
        return True


@contextlib.contextmanager
def part_names_accepted(names: Container[str] = _EveryName()) -> Iterator[None]:
    """Accept names of parts that are not installed here during the `with` block.

    A run is read on machines that lack the packages of its parts.

    Parameters
    ----------
    names : container of str
        Default: every name.
    """
    token = _accepted.set(names)
    try:
        yield
    finally:
        _accepted.reset(token)


@dataclass(frozen=True)
class OrPart:
    """Annotation of a setting: one of the words of a `Literal`, or a part from outside.

    Attributes
    ----------
    kind : PartKind
        The kind of the part.
    own : object
        The `Literal` with the names of raypipe's own parts.
    """

    kind: PartKind
    own: Any

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        literal = handler.generate_schema(self.own)
        return core_schema.no_info_wrap_validator_function(
            self._validated, literal, serialization=core_schema.simple_ser_schema("str")
        )

    def _validated(self, value: Any, handler: Any) -> Any:
        if isinstance(value, str) and value not in get_args(self.own):
            others = declared(self.kind)
            if is_reference(value) or value in others or (value and value in _accepted.get()):
                return value
            words = ", ".join(map(repr, (*get_args(self.own), *others)))
            expected = f"{words} or module:Class of your own"
            raise PydanticKnownError("literal_error", {"expected": expected})
        return handler(value)


def check_names(options: Mapping[str, Any], own: Any, section: str) -> None:
    """Raise ValueError if options are given under the name of one of raypipe's own parts.

    Parameters
    ----------
    options : Mapping
        Options by the name of the part.
    own : object
        The `Literal` with the names of raypipe's own parts.
    section : str
        Where these have their settings instead.
    """
    wrong = sorted(set(options) & set(get_args(own)))
    if wrong:
        raise ValueError(
            f"options: {wrong[0]} is a part of raypipe; its settings are those of {section}"
        )


def validated_options(
    part: type[Configurable], kind: PartKind, name: str, options: Mapping[str, Mapping[str, Any]]
) -> Settings:
    """Return the options of a part from outside, validated by its own model.

    Raises
    ------
    ConfigError
        With one line per wrong option, or if `Options` of the part is not derived from `Settings`.
    """
    if not (isinstance(part.Options, type) and issubclass(part.Options, Settings)):
        raise ConfigError(
            f"{kind.setting}: Options of {name!r} is not derived from raypipe.config.base.Settings"
        )
    try:
        return part.Options.model_validate(dict(options.get(name, {})))
    except ValidationError as error:
        lines = problem_lines(error, part.Options, f"{kind.options}.{name}")
        raise ConfigError("bad configuration\n" + "\n".join(lines)) from None
