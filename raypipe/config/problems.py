"""Describe validation errors: one line per wrong field, with the nearest valid name."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails


def problem_lines(error: ValidationError, root: Any, section: str = "") -> Iterable[str]:
    """Yield one indented line per wrong field.

    Parameters
    ----------
    error : pydantic.ValidationError
        What validation raised.
    root : type of Settings
        The model that was validated.
    section : str
        Where its settings stand in the configuration.
    """
    items = error.errors()
    for item in items:
        # Of the kinds that a setting can have, a word is meant by text: one line is enough.
        if (
            item["type"] != "literal_error"
            and isinstance(item["input"], str)
            and any(
                other["type"] == "literal_error" and other["loc"][:-1] == item["loc"][:-1]
                for other in items
            )
        ):
            continue
        # A list with a wrong item also counts as too short, which says nothing new.
        if item["type"] == "too_short" and any(
            len(other["loc"]) > len(item["loc"]) and other["loc"][: len(item["loc"])] == item["loc"]
            for other in items
        ):
            continue
        path = [str(part) for part in item["loc"] if not _is_union_branch(part)]
        where = ".".join([section] * bool(section) + path) or "configuration"
        if item["type"] == "extra_forbidden":
            yield f"  {where}: unknown setting{_suggestion(item['loc'], root)}"
        elif item["type"] == "missing":
            yield f"  {where}: required, but missing"
        else:
            # The input of a rule on several settings is the whole section. Its message names the
            # settings that matter.
            prefix = (
                ""
                if item["type"] == "value_error" and isinstance(item["input"], dict)
                else f"{_shown(item['input'])} is not allowed: "
            )
            message = item["msg"].removeprefix("Value error, ")
            if item["type"] == "literal_error" and any(
                other["type"] in {"int_parsing", "float_parsing"}
                and other["loc"][:-1] == item["loc"][:-1]
                for other in items
            ):
                message += ", or a number"
            if item["type"] == "tuple_type":
                message = "expected a list, such as [a, b]"
            if item["type"] == "too_short":
                message = f"give at least {item['ctx']['min_length']}"
            yield f"  {where}: {prefix}{message}{_nearest_choice(item)}"


def _shown(value: Any) -> str:
    """Return a value as short text: YAML anchors can expand to more than fits in memory."""
    short = reprlib.Repr()
    short.maxstring, short.maxother, short.maxlevel = 200, 200, 2
    return short.repr(value)[:400]


def _is_union_branch(part: str | int) -> bool:
    # pydantic adds the type it tried ("int", "literal['auto']", "constrained-int") to the location
    # of an error in a union
    return isinstance(part, str) and (
        part in {"int", "bool", "float", "str"} or "[" in part or "-" in part
    )


def _nearest_choice(item: ErrorDetails) -> str:
    """Return "; did you mean ...?" when one of the allowed words is close to the given one."""
    if item["type"] != "literal_error" or not isinstance(item["input"], str):
        return ""
    allowed = re.findall(r"'([^']*)'", item["ctx"]["expected"])
    near = difflib.get_close_matches(item["input"], allowed, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _suggestion(location: tuple[str | int, ...], model: Any) -> str:
    for part in location[:-1]:
        model = (
            model.model_fields[part].annotation
            if part in getattr(model, "model_fields", {})
            else None
        )
    names = list(getattr(model, "model_fields", {}))
    near = difflib.get_close_matches(str(location[-1]), names, n=1)
    return (
        f"; did you mean {near[0]!r}?"
        if near
        else f"; allowed: {', '.join(names)}"
        if names
        else ""
    )
