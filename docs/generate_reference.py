"""Fill in the reference pages of the site from the code, as a hook of MkDocs.

`mkdocs.yml` names this file under `hooks`. A page marks what is filled in:

    <!-- generated: settings -->
    What a reader of the file itself sees.
    <!-- end -->

The marked part is replaced only while the site is built, so it cannot disagree with the code.
Nothing here starts Ray, imports torch, or needs a network.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import yaml

import raypipe
from raypipe import cli, errors
from raypipe.config import Config
from raypipe.distributed.installed_parts import described_parts
from raypipe.plugins import code_allowed

ROOT = Path(__file__).resolve().parents[1]
"""The repository."""
INCLUDED = {"CONTRIBUTING.md": "project/contributing.md", "CHANGELOG.md": "project/changelog.md"}
"""Files of the repository's root, and the pages that include them."""

_MARKED = re.compile(r"^<!-- generated: ([\w.-]+) -->\n.*?^<!-- end -->$", re.M | re.S)

_FENCE = re.compile(r"^ {0,3}(```+|~~~+)")
_LINK = re.compile(r"(?<!\\)(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)((?:\s+\"[^\"]*\")?)\)")
_CODE = re.compile(r"(`+)(?:.+?)\1")


# -- the command line -----------------------------------------------------------------------------


def commands(group: click.Command, name: str = "raypipe") -> Iterator[tuple[str, click.Command]]:
    """Yield every command with its full name, the group itself first."""
    yield name, group
    if isinstance(group, click.Group):
        for word in sorted(group.commands):
            yield from commands(group.commands[word], f"{name} {word}")


def cli_page() -> str:
    """Return every command with its arguments and options, for `reference/cli.md`."""
    every = [item for item in commands(cli.cli) if not item[1].hidden]
    lines = [
        "| command | |",
        "|---|---|",
        *(
            f"| [`{name}`](#{name.replace(' ', '-')}) | {_cell(_paragraphs(command.help)[0])} |"
            for name, command in every[1:]
        ),
    ]
    for name, command in every:
        lines += ["", f"## {name} {{#{name.replace(' ', '-')}}}", "", *_command(name, command)]
    return "\n".join(lines) + "\n"


def _command(name: str, command: click.Command) -> Iterator[str]:
    context = click.Context(command, info_name=name)
    usage = " ".join([name, *command.collect_usage_pieces(context)])
    yield from ("```text", usage, "```")
    for paragraph in _paragraphs(command.help):
        yield from ("", paragraph)
    rows = [
        _option(param)
        for param in command.params
        if isinstance(param, click.Option) and not param.hidden
    ]
    if rows:
        yield from ("", "| option | default | |", "|---|---|---|", *rows)


def _option(option: click.Option) -> str:
    facts = option.to_info_dict()
    value = option.metavar or ("" if facts["is_flag"] else facts["type"]["name"].upper())
    names = ", ".join(option.opts)
    if option.secondary_opts:
        names += " / " + ", ".join(option.secondary_opts)
    default = facts["default"]
    if option.required:
        shown = "required"
    elif facts["is_flag"] or default is None or default in ((), [], ""):
        shown = ""
    else:
        shown = f"`{default}`"
    text = option.help or ""
    bounds = facts["type"]
    if bounds.get("min") is not None:
        text += f" At least {bounds['min']}."
    if bounds.get("choices"):
        text += f" One of {', '.join(map(str, bounds['choices']))}."
    if option.multiple and "repeated" not in text:
        text += " May be repeated."
    return f"| `{f'{names} {value}'.strip()}` | {_cell(shown)} | {_cell(text.strip())} |"


def _paragraphs(text: str | None) -> list[str]:
    return [" ".join(part.split()) for part in inspect.cleandoc(text or "").split("\n\n")]


# -- settings -------------------------------------------------------------------------------------


def settings_page() -> str:
    """Return every section and setting of a configuration, for `reference/settings.md`."""
    schema = Config.model_json_schema()
    models = schema.get("$defs", {})
    sections = [
        (key, model)
        for key, field in schema["properties"].items()
        if (model := _model(field, models)) is not None
    ]
    single = {
        key: field for key, field in schema["properties"].items() if _model(field, models) is None
    }
    required = schema.get("required", [])
    lines = [
        *_table("", {"properties": single, "required": required}, models),
        "",
        "| section | |",
        "|---|---|",
        *(f"| [`{key}`](#{key}) | {_cell(_summary(model))} |" for key, model in sections),
    ]
    for key, model in sections:
        lines += ["", *_section(key, model, models, 2)]
    with code_allowed():  # of packages that are installed where the site is built
        parts = described_parts()
    for setting, texts in parts.items():
        lines += ["", f"## Parts of other packages: {setting} {{#parts-{setting}}}", ""]
        lines += [f"- {text}" for text in texts]
    return "\n".join(lines) + "\n"


def _section(
    name: str, model: Mapping[str, Any], models: Mapping[str, Any], level: int
) -> Iterator[str]:
    yield f"{'#' * level} {name} {{#{name}}}"
    yield from ("", _summary(model))
    plain, nested = {}, {}
    for key, field in model["properties"].items():
        inner = _model(field, models)
        if inner is None:
            plain[key] = field
        else:
            nested[key] = inner
        for inner in _alternatives(field, models):
            nested[key] = inner
    if plain:
        described = {"properties": plain, "required": model.get("required", [])}
        yield from ("", *_table(f"{name}.", described, models))
    for key, inner in nested.items():
        yield ""
        yield from _section(f"{name}.{key}", inner, models, min(level + 1, 4))


def _table(prefix: str, model: Mapping[str, Any], models: Mapping[str, Any]) -> Iterator[str]:
    yield from ("| setting | type | default | allowed | |", "|---|---|---|---|---|")
    for key, field in model["properties"].items():
        kind, allowed = _type(field, models)
        default = "*required*" if key in model["required"] else f"`{_value(field.get('default'))}`"
        anchor = f'<a id="{prefix}{key}"></a>' if not _alternatives(field, models) else ""
        cells = [f"`{prefix}{key}`", kind, default, allowed, field.get("description", "")]
        yield f"| {anchor}" + " | ".join(map(_cell, cells)) + " |"


def _type(field: Mapping[str, Any], models: Mapping[str, Any]) -> tuple[str, str]:
    """Return the type of a field and the values it can have, as a reader writes them in YAML."""
    if "$ref" in field:
        return "section", ""
    for union in ("anyOf", "oneOf"):
        if union in field:
            parts = [_type(part, models) for part in field[union]]
            kinds = dict.fromkeys(kind for kind, _ in parts)
            if "null" in kinds:
                kinds["null"] = kinds.pop("null")
            return " or ".join(kinds), "; ".join(dict.fromkeys(part for _, part in parts if part))
    choices = [field["const"]] if "const" in field else field.get("enum", [])
    if choices:
        return "name", ", ".join(f"`{_value(choice)}`" for choice in choices)
    kind = field.get("type", "any")
    if kind == "array":
        items = [_type(item, models) for item in field.get("prefixItems", [])]
        items = items or [_type(field.get("items", {}), models)]
        least = field.get("minItems", 0)
        count = "" if "prefixItems" not in field else f"{len(items)} "
        allowed = items[0][1]
        if least and not count:
            allowed = "; ".join(filter(None, ["not empty", allowed]))
        return f"list of {count}{_PLURAL.get(items[0][0], items[0][0])}", allowed
    bounds = [
        f"{sign} {_value(field[name])}"
        for name, sign in _BOUNDS.items()
        if field.get(name) is not None
    ]
    if field.get("minLength"):
        bounds.append("not empty")
    if field.get("pattern"):
        bounds.append(f"matches `{field['pattern']}`")
    return _KINDS.get(kind, kind), ", ".join(bounds)


_KINDS = {
    "integer": "whole number",
    "boolean": "true or false",
    "string": "text",
    "object": "mapping",
}
_PLURAL = {"whole number": "whole numbers", "number": "numbers", "name": "names", "text": "texts"}
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def _model(field: Mapping[str, Any], models: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the section that a field is; None for a field with a value."""
    reference = field.get("$ref") or next(
        (part["$ref"] for part in field.get("allOf", []) if "$ref" in part), None
    )
    model = models[reference.rsplit("/", 1)[1]] if reference else None
    return model if model and "properties" in model else None


def _alternatives(field: Mapping[str, Any], models: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the sections that a field's value can be instead of a plain value."""
    parts = [*field.get("anyOf", []), *field.get("oneOf", [])]
    return [model for part in parts if (model := _model(part, models)) is not None]


def _summary(model: Mapping[str, Any]) -> str:
    return _paragraphs(model.get("description"))[0]


def _value(value: Any) -> str:
    """Return a value as YAML has it in one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str):
        return yaml.safe_dump(value).removesuffix("...\n").strip()  # quoted where it has to be
    return str(value)


# -- Python ---------------------------------------------------------------------------------------


PARTS = {
    "raypipe.scores.base.Score": "raypipe.scores.base.Score",
    "raypipe.scores.trajectory.Trajectory": "raypipe.scores.trajectory.Trajectory",
    "raypipe.selection.KeepStrategy": "raypipe.selection.outside.KeepStrategy",
    "raypipe.extrapolators.base.Extrapolator": "raypipe.extrapolators.base.Extrapolator",
    "raypipe.sources.Source": "raypipe.sources.base.Source",
    "raypipe.testing.check_score": "raypipe.testing.scores.check_score",
    "raypipe.testing.check_strategy": "raypipe.testing.strategies.check_strategy",
    "raypipe.testing.check_extrapolator": "raypipe.testing.extrapolators.check_extrapolator",
    "raypipe.testing.check_source": "raypipe.testing.sources.check_source",
    "raypipe.testing.check_transform": "raypipe.testing.images.check_transform",
    "raypipe.testing.check_augment": "raypipe.testing.images.check_augment",
}
"""What parts of other packages are built from, and the modules that define it."""


def python_page() -> str:
    """Return every public name for mkdocstrings to document, for `reference/python.md`."""
    public = [name for name in raypipe.__all__ if not name.startswith("_")]
    homes = _imports("raypipe")
    functions = [name for name in public if name[0].islower()]
    classes = [name for name in public if not name[0].islower()]
    results = {
        name: home
        for function in functions
        for name, home in _returned(homes.get(function, "raypipe"), function).items()
        if name not in public
    }
    lines = [
        "The public API is what `import raypipe` gives: "
        + ", ".join(f"[`raypipe.{name}`](#raypipe.{name})" for name in public)
        + ", and `raypipe.__version__`, the version as a string. "
        "[Parts of your own](#parts-of-your-own) can rely on a few more. Anything else can change "
        "without notice.",
    ]
    for title, names in (("Functions", functions), ("Classes", classes)):
        lines += ["", f"## {title}"]
        for name in names:
            lines += ["", *_object(f"raypipe.{name}", f"{homes.get(name, 'raypipe')}.{name}")]
    if results:
        lines += ["", "## Return types"]
        for name, home in results.items():
            lines += ["", *_object(f"{home}.{name}", f"{home}.{name}", name)]
    lines += ["", "## Parts of your own {#parts-of-your-own}"]
    for name, home in PARTS.items():
        lines += ["", *_object(name, home)]
    return "\n".join(lines) + "\n"


def _object(anchor: str, path: str, heading: str = "") -> Iterator[str]:
    yield f'<a id="{anchor}"></a>'
    yield from ("", f"::: {path}", "    options:", f"      heading: {heading or anchor}")
    yield f"      toc_label: {heading or anchor.removeprefix('raypipe.')}"
    if path.endswith(".Config"):
        # its fields are settings.md
        yield from ("      members: false", "", "All fields: [Settings](settings.md).")


def _imports(module: str) -> dict[str, str]:
    """Return where the names come from that a module imports, also for type checkers alone."""
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        return {}
    tree = ast.parse(Path(found.origin).read_text(encoding="utf-8"))
    return {
        alias.asname or alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and not node.level
        for alias in node.names
    }


def _returned(module: str, function: str) -> dict[str, str]:
    """Return the class of raypipe that a function returns, with its module; or nothing."""
    home = importlib.import_module(module)
    annotation = getattr(getattr(home, function, None), "__annotations__", {}).get("return")
    if not isinstance(annotation, str) or not annotation.isidentifier():
        return {}
    here = getattr(home, annotation, None)
    where = getattr(here, "__module__", None) or _imports(module).get(annotation, "")
    return {annotation: where} if where.startswith("raypipe") else {}


# -- exit codes -----------------------------------------------------------------------------------


def error_classes() -> list[type[errors.RaypipeError]]:
    """Return the errors a user can meet, in the order of the code."""
    return [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, errors.RaypipeError)
    ]


def exit_code_table() -> str:
    """Return the exit codes of all commands and jobs, for `reference/exit-codes.md`."""
    rows = [f"| {code} | {text[0].upper()}{text[1:]} |" for code, text in errors.EXIT_CODES.items()]
    return "\n".join(["| Code | Meaning |", "|---|---|", *rows]) + "\n"


def exit_codes_page() -> str:
    """Return the errors a user can meet with their exit codes, for `reference/exit-codes.md`."""
    lines = [
        "| exception | is a | exit code | |",
        "|---|---|---|---|",
    ]
    for error in error_classes():
        bases = ", ".join(f"`{base.__name__}`" for base in error.__bases__)
        text = _paragraphs(error.__doc__)[0]
        name = error.__name__
        lines.append(
            f'| <a id="{name}"></a>`{name}` | {bases} | {error.exit_code} | {_cell(text)} |'
        )
    return "\n".join(lines) + "\n"


# -- pages and links ------------------------------------------------------------------------------


GENERATED: dict[str, Callable[[], str]] = {
    "cli": cli_page,
    "settings": settings_page,
    "python": python_page,
    "exit-code-table": exit_code_table,  # on the page exit-codes
    "exit-codes": exit_codes_page,
}
"""What a page can have filled in, besides the files of `INCLUDED`."""


def expanded(markdown: str, page: str, repository: str | None = None) -> str:
    """Return a page with its marked parts filled in.

    Parameters
    ----------
    markdown : str
        The page as it is in the repository.
    page : str
        Its path below `docs/`.
    repository : str, optional
        As in `links_of_site`.

    Raises
    ------
    KeyError
        A marker names nothing that can be filled in.
    """

    def filled(match: re.Match[str]) -> str:
        if match[1] in INCLUDED:
            file = ROOT / match[1]
            text = re.sub(r"\A# .*\n", "", file.read_text(encoding="utf-8"))  # the page has a title
            return links_of_site(text, ROOT, page, repository)
        return GENERATED[match[1]]()

    return _MARKED.sub(filled, markdown)


def links_of_site(markdown: str, folder: Path, page: str, repository: str | None = None) -> str:
    """Return a page whose links to files outside `docs/` do not break on the site.

    Parameters
    ----------
    markdown : str
        The page.
    folder : Path
        Folder that its relative links start from.
    page : str
        Where the page is on the site, as a path below `docs/`.
    repository : str, optional
        Address of the repository. With it, a file outside `docs/` is linked there; without it, the
        link becomes its text and the file's path. A file that does not exist stays a broken link,
        so that a strict build fails.
    """
    docs = ROOT / "docs"

    def replaced(match: re.Match[str]) -> str:
        image, text, target, title = match.groups()
        path, hash_, anchor = target.partition("#")
        if image or not path or "://" in path or path.startswith(("mailto:", "/")):
            return match[0]
        file = Path(os.path.normpath(folder / path))
        if file.is_relative_to(docs):
            below = posixpath.relpath(file.relative_to(docs).as_posix(), posixpath.dirname(page))
            return f"[{text}]({below}{hash_}{anchor}{title})"
        if not file.exists() or not file.is_relative_to(ROOT):
            return match[0]
        name = file.relative_to(ROOT).as_posix()
        if name in INCLUDED:
            below = posixpath.relpath(INCLUDED[name], posixpath.dirname(page))
            return f"[{text}]({below}{hash_}{anchor}{title})"
        if repository:
            kind = "tree" if file.is_dir() else "blob"
            return f"[{text}]({repository.rstrip('/')}/{kind}/main/{name}{hash_}{anchor}{title})"
        return text if name in text else f"{text} (`{name}`)"

    return "\n".join(
        line if code else _outside_code(line, replaced)
        for line, code in lines_and_code(markdown.split("\n"))
    )


def lines_and_code(lines: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Yield every line, and whether it belongs to a fenced code block."""
    fence = ""
    for line in lines:
        match = _FENCE.match(line)
        if fence:
            yield line, True
            if match and match[1].startswith(fence) and not line.strip().strip(fence[0]):
                fence = ""
        else:
            fence = match[1] if match else ""
            yield line, bool(fence)


def _outside_code(line: str, replaced: Callable[[re.Match[str]], str]) -> str:
    """Return a line with its links replaced, but those inside `code`."""
    code = [match.span() for match in _CODE.finditer(line)]

    def checked(match: re.Match[str]) -> str:
        inside = any(start <= match.start() and match.end() <= end for start, end in code)
        return match[0] if inside else replaced(match)

    return _LINK.sub(checked, line)


def _cell(text: str) -> str:
    """Return text for a cell of a table; what is not `code` has no other meaning to Markdown."""
    parts = re.split(r"(`[^`]*`|\[[^\]]*\]\([^)]*\)|\*required\*)", text.replace("\n", " "))
    plain = (re.sub(r"([*{}])", r"\\\1", part).replace("<", "&lt;") for part in parts[::2])
    joined = "".join(part for pair in zip(plain, [*parts[1::2], ""], strict=True) for part in pair)
    return joined.replace("|", "\\|")


# -- MkDocs ---------------------------------------------------------------------------------------


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Fill in a page and repair its links to files outside `docs/`; called by MkDocs."""
    name = page.file.src_uri
    folder = ROOT / "docs" / posixpath.dirname(name)
    repository = config.get("repo_url")
    return expanded(links_of_site(markdown, folder, name, repository), name, repository)
